# SPDX-License-Identifier: Apache-2.0
"""Where a followed process has that from: as the kernel copies it at forks, and what the agent leaves of it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from kmonitor.agent.interest import InterestTable
from kmonitor.agent.maps import NO_ROOT, WATCHED_FOLLOW, WATCHED_ROOT, WATCHED_SIZE, Root, Watched, pid_key
from kmonitor.agent.probe import ProbeOptions
from kmonitor.agent.source import Source
from kmonitor.agent.sources import open_source
from kmonitor.v1 import agent_pb2
from kmonitor.wire.masks import EventType
from kmonitor.wire.record import Slots, check_records, slots_of
from tests.agent.interest import apply
from tests.lab.requires import capture_lack, need

pytestmark = pytest.mark.capture

EXIT = int(EventType.PROCESS_EXIT)
ALL = 0x7F
FAMILY = "read a; sh -c 'echo $$; read b; /bin/true; echo; read c; exit 0'; exit 0"
"""The parent forks a child at the first word, which says its pid; that forks one at the second, and ends at the third."""


@dataclass
class Family:
    """Followed from its first process on."""

    source: Source
    table: InterestTable
    process: subprocess.Popen[bytes]
    root: Root
    """What a child of the first one is to carry."""
    number: int = 0
    """Of the last change."""

    def say(self) -> bytes:
        """One more word; what is said to it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"go\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def arm(self, pid: int, *, reset: bool = False, **how: Any) -> int:
        """As the broker would; returns the start time of the process."""
        want = agent_pb2.Interest.ProcessInterest(pid=pid, look_up=True, event_mask=how.pop("mask", ALL), **how)
        applied = apply(self.table, agent_pb2.Interest(version=1, reset=reset, processes=[want]))
        assert applied.number > self.number
        self.number = applied.number
        return applied.processes[0].process.start_time

    def entry(self, pid: int) -> Watched:
        """That of the kernel's map."""
        value = self.source.watched.lookup(pid_key(pid), WATCHED_SIZE)
        assert value is not None
        return Watched.unpack(value)

    def end(self) -> Slots:
        """All records, once all have ended."""
        self.process.communicate(b"go\ngo\ngo\n", timeout=20)
        data = self.source.ring.read(1 << 20)
        slots = slots_of(data or b"")
        found: Slots = slots[check_records(slots)]
        return found


@pytest.fixture(params=["core", "bcc"])
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    need(capture_lack)
    source = open_source(request.param, ProbeOptions(ring_bytes=1 << 20), None)
    with subprocess.Popen(["/bin/sh", "-c", FAMILY], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        made = Family(source, InterestTable(source), process, NO_ROOT)
        start = made.arm(process.pid, follow=True, root=True)
        made.root = Root(start, process.pid, made.number)
        yield made
        process.kill()
    source.close()


def roots(rows: Slots, pid: int) -> set[Root]:
    """What the records of one process carry."""
    own = rows[rows["tgid"] == pid]
    names = ["root_start_boottime_ns", "root_tgid", "root_armed"]
    return {Root(*values) for values in zip(*(own[name].tolist() for name in names), strict=True)}


def test_over_generations(family: Family) -> None:
    child = int(family.say())
    rows = family.end()
    assert roots(rows, family.process.pid) == {NO_ROOT}
    assert roots(rows, child) == {family.root}
    (grandchild,) = rows["child_tgid"][(rows["tgid"] == child) & (rows["child_tgid"] != 0) & (rows["type"] == EventType.PROCESS_FORK)]
    assert roots(rows, grandchild) == {family.root}


def test_kept_when_the_agent_rewrites_the_entry(family: Family) -> None:
    child = int(family.say())
    entry = family.entry(child)
    assert entry == Watched(entry.start_boottime_ns, ALL, WATCHED_FOLLOW, family.root)
    for reset in (False, True):  # after a loss, after a reconnect
        family.arm(child, start_time=entry.start_boottime_ns, follow=True, reset=reset)
        assert family.entry(child) == entry
    change = agent_pb2.Interest.ProcessInterest(pid=child, start_time=entry.start_boottime_ns, event_mask=EXIT, follow=True)
    apply(family.table, agent_pb2.Interest(version=2, processes=[change]))
    assert family.entry(child) == Watched(entry.start_boottime_ns, EXIT, WATCHED_FOLLOW, family.root)
    rows = family.end()
    assert roots(rows, child) == {family.root}


def test_a_child_that_is_registered_too_is_the_root_of_what_it_forks(family: Family) -> None:
    """And its own records still name what is above it."""
    child = int(family.say())
    start = family.entry(child).start_boottime_ns
    # A broker that does not know yet that it is followed: what is there already stays.
    family.arm(child, start_time=start, mask=EXIT, root=True, follow=True)
    assert family.entry(child) == Watched(start, ALL, WATCHED_FOLLOW | WATCHED_ROOT, family.root, family.number)
    family.say()
    rows = family.end()
    assert roots(rows, child) == {family.root}
    (grandchild,) = rows["child_tgid"][(rows["tgid"] == child) & (rows["child_tgid"] != 0) & (rows["type"] == EventType.PROCESS_FORK)]
    assert roots(rows, grandchild) == {Root(start, child, family.number)}


def test_armed_again_by_another_registration(family: Family) -> None:
    """Children say before which arming they were made, and after which."""
    child = int(family.say())
    family.arm(family.process.pid, start_time=family.root.start_boottime_ns, follow=True, root=True)
    start = family.root.start_boottime_ns
    assert family.entry(family.process.pid) == Watched(start, ALL, WATCHED_FOLLOW | WATCHED_ROOT, NO_ROOT, family.number)
    assert family.entry(child).root == family.root
    family.end()
