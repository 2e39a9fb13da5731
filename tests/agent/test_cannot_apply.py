# SPDX-License-Identifier: Apache-2.0
"""What an agent cannot do at the moment is said to whoever asked; it goes on, and does it when it can."""

from __future__ import annotations

import contextlib
import errno
import resource
from collections.abc import Iterator

import pytest

from kmonitor.agent.errors import BpfError
from kmonitor.agent.interest import InterestTable
from kmonitor.agent.probe import ProbeOptions
from kmonitor.agent.sources import open_source
from kmonitor.agent.sources.netlink import Netlink
from kmonitor.v1 import agent_pb2, monitor_pb2
from kmonitor.wire.masks import EventType
from tests.agent.interest import apply
from tests.lab.connector import connector_lack
from tests.lab.process import Running
from tests.lab.requires import capture_lack, need
from tests.lab.services import Lab

pytestmark = pytest.mark.capture

EXIT = int(EventType.PROCESS_EXIT)
RUNNING = monitor_pb2.REGISTRATION_STATE_RUNNING
Want = agent_pb2.Interest.ProcessInterest


@contextlib.contextmanager
def no_descriptors(process: Running) -> Iterator[None]:
    """It can open nothing."""
    before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, before[1]))
    yield
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("core", "pid", "cannot read the kernel's list of processes: Too many open files"),
        ("bcc", "pid", "Too many open files"),
        ("netlink", "pid", "the proc connector cannot be used: Too many open files"),
        ("netlink", "node", "the proc connector cannot be used: Too many open files"),
    ],
)
def test_no_descriptor_is_left(lab: Lab, source: str, target: str, words: str) -> None:
    need(connector_lack if source == "netlink" else capture_lack)
    broker = lab.broker()
    agent = lab.agent("spent", broker.address, source=source)
    process = lab.command("cat")
    what = ("--pid", str(process.pid)) if target == "pid" else ("--comm", "cat")
    options = ("--broker", broker.address, "--node", "spent", *what, "--events", "exit")
    with no_descriptors(agent):
        done = lab.run("kmon", "watch", *options, "--for", "20s")
    assert done.code != 0
    assert f"node spent: {words}" in done.stderr or words in done.stderr
    assert "Traceback" not in done.stderr + agent.stderr_text()
    watch = lab.watch(*((broker.address, *options[2:])))
    watch.wait_registered(1, "RUNNING" if target == "pid" else "ARMED")
    process.close_input()
    watch.wait_end_of(process.pid)
    lab.stop(watch)


def test_an_entry_that_cannot_be_written(lab: Lab) -> None:
    """Only whose entry it is hears of it."""
    need(connector_lack)
    source = open_source("netlink", ProbeOptions(ring_bytes=64 << 10), None)
    assert isinstance(source, Netlink)
    try:
        first, second, third = (lab.command("cat") for _ in range(3))
        write = source.watched.update

        def update(key: bytes, value: bytes, flags: int = 0) -> bool:
            if int.from_bytes(key, "little") == second.pid:
                raise BpfError("cannot write map watched: Cannot allocate memory", errno.ENOMEM)
            return write(key, value, flags)

        source.watched.update = update  # type: ignore[method-assign]
        wanted = [Want(pid=each.pid, event_mask=EXIT, look_up=True) for each in (first, second, third)]
        answer = apply(InterestTable(source), agent_pb2.Interest(version=1, processes=wanted))
        results = {result.pid: result for result in answer.processes}
        assert answer.error == ""
        assert (results[first.pid].state, results[third.pid].state) == (RUNNING, RUNNING)
        assert results[second.pid].error == "the process cannot be armed: cannot write map watched: Cannot allocate memory"
    finally:
        source.close()
