# SPDX-License-Identifier: Apache-2.0
"""What the tests of faults have in common. All of them need real kernel events, as those in tests/capture do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.lab.namespaces import namespaces_lack
from tests.lab.requires import capture_lack, need
from tests.lab.workload import Programs
from tests.robustness.rig import MEMORY, PATIENT, SQLITE, Rig, rig

HERE = Path(__file__).parent

SMALL_RING = ("--ring-size", "64K")
"""512 records: soon full."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.capture)


Maker = Callable[..., AbstractContextManager[Rig]]


@pytest.fixture(scope="module")
def make_rig(pins: Path, programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Makes a rig of the nodes that are given."""
    need(capture_lack, namespaces_lack)

    def make(*broker_options: str, nodes: dict[str, tuple[str, ...]], log: str = MEMORY, disk: str = "") -> AbstractContextManager[Rig]:
        return rig(pins, programs, tmp_path_factory.mktemp("rig"), *broker_options, nodes=nodes, log=log, disk=disk)

    return make


@pytest.fixture(scope="module")
def in_memory(make_rig: Maker) -> Iterator[Rig]:
    """Node a with a ring as it is by default, node s with a small one; the broker's log is in memory."""
    with make_rig(*PATIENT, nodes={"a": (), "s": SMALL_RING}) as made:
        yield made


@pytest.fixture(scope="module")
def on_disk(make_rig: Maker) -> Iterator[Rig]:
    """Nodes a and s, as `in_memory`; the broker's log outlives it."""
    with make_rig(*PATIENT, nodes={"a": (), "s": SMALL_RING}, log=SQLITE) as made:
        yield made
