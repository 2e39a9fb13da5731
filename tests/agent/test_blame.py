# SPDX-License-Identifier: Apache-2.0
"""Who is named as the killer: the one who did it, or nobody, whatever a siginfo says. And what the probe keeps, and what it drops first."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from kmonitor.agent import maps
from kmonitor.agent.interest import InterestTable
from kmonitor.agent.probe import ProbeOptions
from kmonitor.agent.source import Source
from kmonitor.agent.sources import open_source
from kmonitor.agent.sources.memory_ring import MemoryRing
from kmonitor.v1 import agent_pb2
from kmonitor.wire.masks import EventType
from kmonitor.wire.record import F_KILLED_BY, F_MATCH_PROCESS, F_OOM_KILLED, Slots, check_records, slots_of
from tests.agent.interest import apply
from tests.lab.control_groups import control_group
from tests.lab.memory_cgroup import memory_cgroup
from tests.lab.requires import capture_lack, need
from tests.lab.workload import Programs

pytestmark = pytest.mark.capture

EXIT = int(EventType.PROCESS_EXIT)
EXEC = int(EventType.PROCESS_EXEC)
FORK = int(EventType.PROCESS_FORK)
ABORT = int(EventType.PROCESS_ABORT)
THREADS = int(EventType.THREAD_CREATE | EventType.THREAD_EXIT | EventType.THREAD_ABORT)
RING = 16 << 20


@contextlib.contextmanager
def opened(name: str, *, ring_bytes: int = RING) -> Iterator[Source]:
    need(capture_lack)
    source = open_source("netlink" if name == "netlink" else "bcc" if name == "bcc" else "core", ProbeOptions(ring_bytes=ring_bytes), None)
    try:
        yield source
    finally:
        source.close()


@pytest.fixture(scope="module", params=["core", "bcc"])
def source(request: pytest.FixtureRequest) -> Iterator[Source]:
    with opened(request.param) as made:
        yield made


@dataclass
class Tree:
    """A workload that waits for the word, and is followed."""

    source: Source
    process: subprocess.Popen[str]
    said: list[dict[str, Any]] = field(default_factory=list)

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the workload has ended"
        told: dict[str, Any] = json.loads(line)
        return told

    def finish(self) -> None:
        """Until it has ended, well."""
        assert self.process.stdout is not None
        self.said += map(json.loads, self.process.stdout)
        assert self.process.wait() == 0


@contextlib.contextmanager
def followed(source: Source, programs: Programs, *case: str, mask: int = FORK | ABORT | EXIT) -> Iterator[Tree]:
    with subprocess.Popen(
        [programs.blame, *case], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        want = agent_pb2.Interest.ProcessInterest(pid=process.pid, event_mask=mask, follow=True, look_up=True)
        apply(InterestTable(source), agent_pb2.Interest(version=1, reset=True, processes=[want]))
        try:
            yield Tree(source, process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def records(source: Source) -> Slots:
    """All that is there; the ring is empty then."""
    source.catch_up()
    data = source.ring.read(RING)
    slots = slots_of(data or b"")
    rows: Slots = slots[check_records(slots)].copy()
    del data, slots
    source.ring.release(source.ring.position)
    return rows


def play(source: Source, programs: Programs, *case: str, mask: int = FORK | ABORT | EXIT) -> tuple[list[dict[str, Any]], Slots]:
    """What a case says, and the records of its tree."""
    with followed(source, programs, *case, mask=mask) as tree:
        tree.go()
        tree.finish()
        return tree.said, records(source)


def blamed(said: list[dict[str, Any]], rows: Slots) -> list[int | None]:
    """Who is named for each death. Fails for one that is not told, or for which another is named than caused it."""
    wrong = []
    named = []
    for death in said:
        mine = rows[(rows["tgid"] == death["pid"]) & (rows["type"] == EXIT)]
        assert len(mine) == 1, death
        row = mine[0]
        assert int(row["status"]) & 0x7F == death["signal"] != 0, death
        who = int(row["killer_tgid"]) if int(row["flags"]) & F_KILLED_BY else None
        named.append(who)
        if who != death["by"] and not (who is None and death["or_nobody"]):
            wrong.append((death, who))
    assert not wrong
    return named


def test_whoever_writes_the_siginfo_is_not_the_kernel(source: Source, programs: Programs) -> None:
    said, rows = play(source, programs, "forged")
    assert len(said) > 3 * 61
    named = blamed(said, rows)
    assert 0 not in named
    unknown = sum(1 for who in named if who is None)
    assert unknown <= sum(1 for death in said if death["or_nobody"])


def test_a_signal_of_its_own_that_looks_like_the_kernels(source: Source, programs: Programs) -> None:
    said, rows = play(source, programs, "forged_to_itself")
    assert len(said) > 5 * 5
    assert 0 not in blamed(said, rows)


@pytest.mark.parametrize("number", [15, 6, 40])
def test_a_debuggers_signal_is_not_that_of_whoever_sent_one_before(source: Source, programs: Programs, number: int) -> None:
    said, rows = play(source, programs, "injected", str(number))
    assert blamed(said, rows) == [None, None]


def test_nor_of_the_process_itself_that_blocked_it(source: Source, programs: Programs) -> None:
    assert blamed(*play(source, programs, "injected_and_blocked", "15")) == [None]


def test_nor_of_whose_signal_a_signalfd_took(source: Source, programs: Programs) -> None:
    assert blamed(*play(source, programs, "injected_after_signalfd", "15")) == [None]


@pytest.mark.parametrize("number", [15, 6, 9, 40])
def test_a_debugger_that_lets_a_signal_through(source: Source, programs: Programs, number: int) -> None:
    said, rows = play(source, programs, "traced", str(number))
    assert blamed(said, rows) == [said[0]["by"]]


def test_survived_and_then_ended_by_a_rule(source: Source, programs: Programs) -> None:
    """By seccomp: the kernel's, where it says so, and never whose signal was survived."""
    blamed(*play(source, programs, "seccomp"))


def test_no_number_of_caught_signals_makes_it_forget(source: Source, programs: Programs) -> None:
    """More than there is room for: only what waits is kept, and goes when it is delivered."""
    said, rows = play(source, programs, "many_caught", "24800")
    assert blamed(said, rows) == [said[0]["by"]]


def test_who_shares_a_victims_memory_died_of_the_same(source: Source, programs: Programs) -> None:
    with memory_cgroup(32 << 20) as procs:
        said, rows = play(source, programs, "shared_memory", str(procs))
    assert blamed(said, rows) == [0, 0]
    for death in said:
        ends = rows[(rows["tgid"] == death["pid"]) & (rows["type"] != FORK)]
        assert ends["type"].tolist() == [ABORT, EXIT]
        assert all(int(flags) & F_OOM_KILLED for flags in ends["flags"])


@pytest.mark.parametrize("name", ["core", "bcc", "netlink"])
def test_a_thread_that_the_kernel_makes_ends_only_if_it_began(name: str, programs: Programs) -> None:
    """io_uring's: the kernel tells the probe nothing when it makes one. To the proc connector it tells both."""
    with opened(name) as source:
        said, rows = play(source, programs, "kernels_thread", mask=THREADS | EXIT)
        if not said[0]["threads"]:
            pytest.fail("this kernel has no io_uring: find another such thread")
        begun_and_ended = [int(EventType.THREAD_CREATE), int(EventType.THREAD_EXIT)] if name == "netlink" else []
        assert rows["type"].tolist() == [*begun_and_ended, EXIT]


def test_nothing_is_kept_of_what_has_ended(source: Source, programs: Programs) -> None:
    """Of processes whose threads end together neither, waited for or not."""
    many = 9000
    with followed(source, programs, "two_threads", str(many)) as tree:
        tree.go()
        assert tree.hear() == {"zombies": many}
        left = [maps.pid_of(key) for key in source.watched.keys(maps.KEY_SIZE)]
        assert left == [tree.process.pid]
        tree.go()
        tree.finish()
        assert int((records(source)["type"] == EXIT).sum()) == many + 1
        assert not list(source.watched.keys(maps.KEY_SIZE))


@pytest.mark.parametrize("name", ["core", "bcc"])
def test_in_a_full_ring_ends_rank_above_execs(name: str) -> None:
    """A followed tree's execs take 4 KiB each; the ends of others get in all the same."""
    waiting = 40
    with opened(name, ring_bytes=1 << 18) as source, contextlib.ExitStack() as stack:
        # Each exec of the loop is a child's: it forks, execs with a long argument, and ends.
        script = "read x; i=0; while [ $i -lt 200 ]; do /bin/true $0; i=$((i+1)); done"
        tree = stack.enter_context(subprocess.Popen(["/bin/sh", "-c", script, "x" * 3000], stdin=subprocess.PIPE))
        others = [stack.enter_context(subprocess.Popen(["/bin/sh", "-c", "read x"], stdin=subprocess.PIPE)) for _ in range(waiting)]
        want = agent_pb2.Interest.ProcessInterest
        wants = [want(pid=other.pid, event_mask=EXIT, look_up=True) for other in others]
        wants.append(want(pid=tree.pid, event_mask=FORK | EXEC, follow=True, look_up=True))
        apply(InterestTable(source), agent_pb2.Interest(version=1, processes=wants))
        tree.communicate(b"\n")
        source.catch_up()
        _, lost = source.control.lost()
        assert lost[5] > 0, "execs did not find room"
        for other in others:
            other.communicate(b"\n")
        rows = records(source)
        assert set(rows["tgid"][rows["type"] == EXIT].tolist()) >= {other.pid for other in others}


def test_the_netlink_ring_does_the_same() -> None:
    """It is filled by hand: of a child that is gone the connector knows no long arguments."""
    with opened("netlink", ring_bytes=1 << 16) as source:
        assert isinstance(source.ring, MemoryRing)
        append = source.ring.append
        for _ in range(40):
            append(EXEC, F_MATCH_PROCESS, 1, 1, 7, 7, 1, 0, 0, b"tree", filename=b"/bin/true\0", args=b"x" * 2000 + b"\0")
        for pid in range(100, 140):
            append(ABORT, F_MATCH_PROCESS, 1, 1, pid, pid, 1, 0, 0, b"other")
            append(EXIT, F_MATCH_PROCESS, 1, 1, pid, pid, 1, 0, 0, b"other")
        _, lost = source.control.lost()
        assert lost[5] > 0
        assert int((records(source)["type"] == EXIT).sum()) == 40


def test_a_process_however_deep_below_a_group_that_is_watched(source: Source) -> None:
    """Whoever may make groups may not hide by making many."""
    with control_group() as group:
        deep = group.group("/".join(["d"] * 200))
        assert source.watched_cgroups is not None
        source.watched_cgroups.update(maps.cgroup_key(group.id), maps.pack_mask(EXIT))
        source.control["any_mask"] = maps.ANY_CGROUP | EXIT
        try:
            with subprocess.Popen(["/bin/sh", "-c", "read x"], stdin=subprocess.PIPE) as process:
                deep.take(process.pid)
                process.communicate(b"\n")
        finally:
            source.watched_cgroups.delete(maps.cgroup_key(group.id))
            source.control["any_mask"] = 0
        rows = records(source)
        assert [(int(row["tgid"]), int(row["match_cgroup_id"])) for row in rows] == [(process.pid, group.id)]
        assert not int(rows[0]["flags"]) & F_MATCH_PROCESS
