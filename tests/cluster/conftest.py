# SPDX-License-Identifier: Apache-2.0
"""The cluster of a test file. All tests in here need real kernel events, as those in tests/capture do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.cluster import ZONES, Cluster, running
from tests.lab.namespaces import namespaces_lack
from tests.lab.requires import capture_lack, need

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.capture)


@pytest.fixture(scope="module")
def cluster(pins: Path) -> Iterator[Cluster]:
    """Nodes a, b and c, which are up. The lease is long: an agent that waits for a CPU is not to be taken for one that is gone."""
    need(capture_lack, namespaces_lack)
    with running(pins, "--lease", "15s", zones=ZONES) as cluster:
        yield cluster


@pytest.fixture
def brief_cluster(pins: Path) -> Iterator[Cluster]:
    """Nodes a and b, of a broker that gives short leases; for one test."""
    need(capture_lack, namespaces_lack)
    with running(pins, "--lease", "500ms", zones={"a": "east", "b": "east"}) as cluster:
        yield cluster
