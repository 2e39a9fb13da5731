# SPDX-License-Identifier: Apache-2.0
"""The probe, its ring and its maps on this machine's kernel, without a broker."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kmonitor.agent import maps
from kmonitor.agent.errors import PinError
from kmonitor.agent.interest import InterestTable
from kmonitor.agent.pins import PinFolder
from kmonitor.agent.probe import Probe, ProbeOptions, is_current
from kmonitor.agent.sources import open_source
from kmonitor.v1 import agent_pb2, monitor_pb2
from kmonitor.wire.masks import EventType
from kmonitor.wire.record import SLOT_SIZE, Slots, check_records, slots_of
from tests.agent.interest import apply
from tests.lab.requires import capture_lack, need


@pytest.fixture(autouse=True)
def _needs_capture() -> None:
    need(capture_lack)


Want = agent_pb2.Interest.ProcessInterest
EXIT = int(EventType.PROCESS_EXIT)
FORK = int(EventType.PROCESS_FORK)


@pytest.fixture
def probe(request: pytest.FixtureRequest) -> Iterator[Probe]:
    options: ProbeOptions = getattr(request, "param", ProbeOptions(ring_bytes=1 << 20))
    opened = open_probe(options, None)
    yield opened
    opened.close()


@pytest.fixture
def arm(probe: Probe) -> Callable[..., agent_pb2.InterestApplied]:
    table = InterestTable(probe)

    def arm_some(*processes: Want, node_mask: int = 0, reset: bool = False) -> agent_pb2.InterestApplied:
        return apply(table, agent_pb2.Interest(version=1, reset=reset, processes=processes, node_mask=node_mask))

    return arm_some


def open_probe(options: ProbeOptions, pins: PinFolder | None) -> Probe:
    opened = open_source("core", options, pins)
    assert isinstance(opened, Probe)
    return opened


class Child:
    """A child that lives until it is told to end. Not os.fork: gRPC, if it is loaded, starts threads in forked children."""

    def __init__(self, code: int = 0) -> None:
        self._process = subprocess.Popen(["/bin/sh", "-c", f"read line; exit {code}"], stdin=subprocess.PIPE)
        self.pid = self._process.pid

    def let_go(self) -> None:
        """Tell it to end, and leave it unwaited for."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def end(self) -> int:
        """Its wait status."""
        self.let_go()
        _, status = os.waitpid(self.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        return status


def records(probe: Probe) -> Slots:
    data = probe.ring.read(1 << 20)
    slots = slots_of(data or b"")
    found: Slots = slots[check_records(slots)]
    return found


def of(rows: Slots, pid: int) -> list[tuple[int, int]]:
    return [(int(row["type"]), int(row["status"])) for row in rows if row["tgid"] == pid]


def test_nothing_is_captured_before_anybody_asks(probe: Probe) -> None:
    subprocess.run(["/bin/true"], check=True)
    assert probe.ring.producer == 0


def test_a_watched_process_and_no_other(probe: Probe, arm: Callable[..., Any]) -> None:
    child, other = Child(code=3), Child()
    answer = arm(Want(pid=child.pid, event_mask=EXIT, look_up=True))
    assert answer.processes[0].state == monitor_pb2.REGISTRATION_STATE_RUNNING
    other.end()
    status = child.end()
    rows = records(probe)
    assert of(rows, child.pid) == [(EXIT, status)]
    assert len(rows) == 1
    assert int(rows[0]["start_boottime_ns"]) == answer.processes[0].process.start_time
    assert probe.watched.lookup(maps.pid_key(child.pid), maps.WATCHED_SIZE) is None, "the kernel forgets it at its exit"


@pytest.mark.parametrize("probe", [ProbeOptions(ring_bytes=1 << 20, force_claim=True)], indirect=True)
def test_a_kernel_that_does_not_tell_the_last_thread(probe: Probe, arm: Callable[..., Any]) -> None:
    script = "import threading as t; [x.start() for x in [t.Thread(target=lambda: None) for _ in range(8)]]"
    arm(node_mask=EXIT)
    pids = set()
    for _ in range(20):
        with subprocess.Popen([sys.executable, "-S", "-c", script]) as process:
            pids.add(process.pid)
    rows = records(probe)
    exits = [int(row["tgid"]) for row in rows if int(row["tgid"]) in pids]
    assert sorted(exits) == sorted(pids), "one exit for each process"


def test_states(probe: Probe, arm: Callable[..., Any]) -> None:
    child = Child()
    running = arm(Want(pid=child.pid, event_mask=EXIT, look_up=True)).processes[0]
    stranger = arm(Want(pid=child.pid, start_time=running.process.start_time - 1, event_mask=EXIT, look_up=True)).processes[0]
    assert stranger.state == monitor_pb2.REGISTRATION_STATE_EXITED
    child.let_go()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    zombie = arm(Want(pid=child.pid, event_mask=EXIT, look_up=True)).processes[0]
    assert zombie.state == monitor_pb2.REGISTRATION_STATE_EXITED
    child.end()
    gone = arm(Want(pid=child.pid, event_mask=EXIT, look_up=True)).processes[0]
    assert gone.state == monitor_pb2.REGISTRATION_STATE_NOT_FOUND
    assert probe.watched.lookup(maps.pid_key(child.pid), maps.WATCHED_SIZE) is None
    assert of(records(probe), child.pid) == [(EXIT, 0)]


def test_an_entry_for_another_start_time_matches_nothing(probe: Probe, arm: Callable[..., Any]) -> None:
    child = Child()
    answer = arm(Want(pid=child.pid, event_mask=EXIT, look_up=True))
    stale = maps.Watched(answer.processes[0].process.start_time - 1, EXIT, 0)
    probe.watched.update(maps.pid_key(child.pid), stale.pack())
    child.end()
    assert len(records(probe)) == 0


def test_follow_arms_children_in_the_kernel(probe: Probe, arm: Callable[..., Any]) -> None:
    with subprocess.Popen(["/bin/sh", "-c", "read x; (/bin/true); exit 4"], stdin=subprocess.PIPE) as shell:
        arm(Want(pid=shell.pid, event_mask=FORK | EXIT, follow=True, look_up=True))
        shell.communicate(b"\n")
    rows = records(probe)
    (child,) = (int(row["child_tgid"]) for row in rows if row["type"] == FORK)
    assert of(rows, child) == [(EXIT, 0)]
    assert of(rows, shell.pid) == [(FORK, 0), (EXIT, 4 << 8)]


def test_looking_again_waits_for_what_the_probe_is_about_to_tell(probe: Probe, arm: Callable[..., Any]) -> None:
    """After a reconnect: the end of a process that was armed all the time lies before `end_position`, or is told as RUNNING."""
    child = Child()
    start = arm(Want(pid=child.pid, event_mask=EXIT, look_up=True)).processes[0].process.start_time
    child.end()
    again = arm(Want(pid=child.pid, start_time=start, event_mask=EXIT, look_up=True), reset=True)
    assert again.processes[0].state == monitor_pb2.REGISTRATION_STATE_EXITED
    assert of(records(probe), child.pid) == [(EXIT, 0)]
    assert again.end_position >= probe.ring.position


def test_deregistering_disarms(probe: Probe, arm: Callable[..., Any]) -> None:
    child = Child()
    arm(Want(pid=child.pid, event_mask=EXIT, look_up=True))
    arm(Want(pid=child.pid, event_mask=0))
    assert probe.control["any_mask"] == 0
    child.end()
    assert len(records(probe)) == 0


def test_a_full_ring_is_counted_exactly_and_keeps_watched_exits(arm: Callable[..., Any]) -> None:
    small = open_probe(ProbeOptions(ring_bytes=64 << 10), None)  # 512 slots, of which 384 for what may be dropped
    try:
        table = InterestTable(small)
        child = Child()
        apply(table, agent_pb2.Interest(version=1, processes=[Want(pid=child.pid, event_mask=EXIT, look_up=True)], node_mask=FORK))
        made = 600
        for _ in range(made):
            Child().end()
        status = child.end()
        rows = records(small)
        node, _process = small.control.lost()
        forks = int(np.count_nonzero((rows["type"] == FORK) & (rows["tgid"] == os.getpid())))
        others = int(np.count_nonzero((rows["type"] == FORK) & (rows["tgid"] != os.getpid())))
        assert forks < made
        # Other processes of the machine fork too: they can only make the count larger.
        assert node[3] >= made - forks
        assert node[3] + forks + others >= made
        assert of(rows, child.pid) == [(EXIT, status)], "above the mark there is room for what somebody waits for"
    finally:
        small.close()


def test_what_is_not_released_is_read_again(probe: Probe, arm: Callable[..., Any]) -> None:
    child = Child()
    arm(Want(pid=child.pid, event_mask=EXIT, look_up=True))
    child.end()
    first = probe.ring.read(1 << 20)
    assert first
    assert probe.ring.read(1 << 20) is None
    probe.ring.rewind()
    assert probe.ring.read(1 << 20) == first
    probe.ring.release(probe.ring.position)
    probe.ring.rewind()
    assert probe.ring.read(1 << 20) is None


def test_a_sleeping_reader_is_woken(probe: Probe, arm: Callable[..., Any]) -> None:
    child = Child()
    arm(Want(pid=child.pid, event_mask=EXIT, look_up=True))
    assert probe.ring.prepare_sleep()
    child.end()
    outer = select.epoll()
    with outer:
        outer.register(probe.ring.wakeups.fileno(), select.EPOLLIN)
        assert outer.poll(5.0)
        probe.ring.awake()
        assert not outer.poll(0), "data that is not released does not make it ready again"
    assert probe.ring.has_unread()


def test_a_reader_that_naps_is_woken_by_what_is_urgent_and_by_much(probe: Probe, arm: Callable[..., Any]) -> None:
    """Not by what others do, until that is much; and not by what is urgent, if it says so."""
    ring = probe.ring
    child, later = Child(), Child()
    arm(Want(pid=child.pid, event_mask=EXIT, look_up=True), Want(pid=later.pid, event_mask=EXIT, look_up=True), node_mask=EXIT)
    with select.epoll() as outer:
        outer.register(ring.wakeups.fileno(), select.EPOLLIN)
        assert ring.prepare_nap(64 * SLOT_SIZE, calm=False)
        subprocess.run(["/bin/true"], check=True)
        assert ring.has_unread()
        assert not outer.poll(0)
        child.end()
        assert outer.poll(5.0), "a watched process has ended"
        ring.awake()
        assert ring.prepare_nap(64 * SLOT_SIZE, calm=True)
        later.end()
        assert not outer.poll(0)
        while ring.producer - ring.position < 66 * SLOT_SIZE:
            subprocess.run(["/bin/true"], check=True)
        assert outer.poll(5.0), "so much is there"
        ring.awake()
        assert not ring.prepare_nap(64 * SLOT_SIZE, calm=True), "it is there still"
        ring.read(1 << 20)
        ring.release(ring.position)
        assert ring.prepare_nap(2 * SLOT_SIZE, calm=True)
        for _ in range(4):
            subprocess.run(["/bin/true"], check=True)
        assert outer.poll(5.0), "counted from what is released"
        ring.awake()


def test_pins_outlive_the_agent(pins: Path) -> None:
    folder = PinFolder(pins, "a.node", "host")
    folder.open()
    probe = open_probe(ProbeOptions(ring_bytes=1 << 20), folder)
    child = Child()
    apply(InterestTable(probe), agent_pb2.Interest(version=1, processes=[Want(pid=child.pid, event_mask=EXIT, look_up=True)]))
    epoch = probe.epoch
    second = PinFolder(pins, "a.node", "host")
    with pytest.raises(PinError, match="another agent"):
        second.open()
    probe.close()
    folder.close()
    status = child.end()
    second.open()
    again = open_probe(ProbeOptions(), second)
    try:
        assert again.adopted
        assert is_current(second)
        assert again.epoch == epoch
        assert of(records(again), child.pid) == [(EXIT, status)], "the ring went on filling without an agent"
    finally:
        again.close()
        second.remove()
        second.close()
    assert not second.path.exists()


def test_a_folder_that_is_not_in_a_bpffs(tmp_path: Path) -> None:
    with pytest.raises(PinError, match="mount -t bpf"):
        PinFolder(tmp_path / "pins", "n", "host").open()
    assert not (tmp_path / "pins").exists()


def test_no_descriptor_is_left_behind() -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    open_probe(ProbeOptions(ring_bytes=1 << 20), None).close()
    before = descriptors()
    for _ in range(3):
        open_probe(ProbeOptions(ring_bytes=1 << 20), None).close()
    assert descriptors() == before
