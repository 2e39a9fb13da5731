# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the end-to-end tests: the lab of tests/lab, and the built workloads."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.lab import bpffs, knowledge, workload
from tests.lab.requires import capture_lack, need
from tests.lab.services import Lab, stderr_of_all
from tests.lab.workload import Programs, Stage


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows what the processes of its lab wrote to standard error."""
    report = yield
    if report.failed:
        report.sections.extend((name, text) for name, text in stderr_of_all() if text)
    return report


@pytest.fixture(scope="session")
def pins() -> Iterator[Path]:
    """A folder in the bpf file system, for this run only."""
    need(capture_lack)
    with bpffs.mounted() as folder:
        yield folder


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """The workloads, built."""
    need(capture_lack)
    return workload.build(tmp_path_factory.mktemp("workload"))


@pytest.fixture
def lab(pins: Path) -> Iterator[Lab]:
    """For one test: what it starts is stopped behind it, and must end well."""
    lab = Lab(pins)
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def module_lab(pins: Path) -> Iterator[Lab]:
    """For all tests of a file."""
    lab = Lab(pins)
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def source() -> str:
    """What the agent captures with; the tests of a folder may be made for several (tests/capture/conftest.py)."""
    return "core"


@pytest.fixture(scope="module")
def service(module_lab: Lab, source: str) -> Iterator[tuple[str, str]]:
    """A broker with one agent: its address, and the node's name."""
    broker = module_lab.broker("--linger", "2s")
    agent = module_lab.agent("alpha", broker.address, source=source)
    yield broker.address, agent.node
    module_lab.stop(agent, broker)  # the next source's comes now: two at once would only take each other's time


@pytest.fixture
def stage(lab: Lab, service: tuple[str, str], source: str, programs: Programs, tmp_path: Path) -> Stage:
    """Where a test plays its scenes."""
    address, node = service
    return Stage(lab, address, node, programs, tmp_path, knowledge.of(source))
