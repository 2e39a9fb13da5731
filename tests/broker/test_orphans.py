# SPDX-License-Identifier: Apache-2.0
"""Children whose fork was not told: known by the root that their records carry, and nobody else taken for one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kmonitor.broker.block import Block, ProcessKey
from kmonitor.broker.matching import Matcher, Span
from kmonitor.broker.router import Router
from kmonitor.wire.record import F_MATCH_PROCESS, Indices
from tests.broker.records import EXEC, EXIT, FORK, THREAD_CREATE, THREAD_EXIT, Rec, build, rec

ALL = 0x7F


@dataclass(eq=False)
class Monitor:
    """One session with one registration."""

    matcher: Matcher = field(default_factory=Matcher)
    takes: bool = True
    got: list[tuple[int, int]] = field(default_factory=list)
    """(position, pid) of what it was told."""

    def offer(self, block: Block, rows: Indices) -> None:
        self.got += zip(block.positions[rows].tolist(), block.column("tgid")[rows].tolist(), strict=True)

    @property
    def pids(self) -> list[int]:
        return [pid for _, pid in self.got]


@dataclass
class Node:
    """Its records, made by hand."""

    position: int = 0
    number: int = 0
    """Of the last change to its interest."""
    router: Router = field(init=False)
    made: list[ProcessKey] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.router = Router(self._note, lambda _: None, self._adopt)

    def _note(self, span: Span) -> None:
        assert span.process is not None
        self.made.append(span.process)

    def _adopt(self, span: Span) -> bool:
        self._note(span)
        return True

    def monitor(self, pid: int, *, follow: bool = True, start: int = 0, mask: int = ALL) -> Monitor:
        made = Monitor()
        self.number += 1
        key = (pid, start or pid * 10)
        self.router.add(Span(made, made, "a", 1, mask, self.position, key, follow=follow, root=True, since=self.number % (1 << 32)))
        return made

    def feed(self, *records: Rec) -> None:
        block = Block("a", 1, self.position, build(list(records)), 0)
        self.position = block.end
        self.router.route(block)

    def retire(self) -> None:
        self.router.retire("a", 1 << 62, self.position, 0)


def own(kind: int, pid: int, root: tuple[int, int] | int = 0, armed: int = 0, **more: Any) -> Rec:
    """A record that its process's own entry asked for. `root`: (pid, start time), or a pid with the usual start time."""
    root_pid, root_start = root if isinstance(root, tuple) else (root, root * 10)
    armed = armed or (1 if root_pid else 0)
    fields = {"root_tgid": root_pid, "root_start_boottime_ns": root_start, "root_armed": armed, **more}
    return rec(kind, pid, flags=F_MATCH_PROCESS, **fields)


def fork(pid: int, child: int, root: int = 0, armed: int = 0) -> Rec:
    return own(FORK, pid, root, armed, child_tgid=child, child_tid=child, child_start_boottime_ns=child * 10)


def test_all_of_an_orphan_and_of_what_it_forks() -> None:
    node = Node()
    follower, other = node.monitor(100), node.monitor(200)
    node.feed(fork(100, 101))
    # 102 is a child of 101; only its fork of 103 says that it is there. Both are told to their ends, of which there are no more spans then.
    node.feed(fork(102, 103, 100), own(THREAD_CREATE, 102, 100), own(EXEC, 103, 100), own(EXIT, 102, 100), own(THREAD_EXIT, 102))
    node.feed(own(EXIT, 103, 100), own(EXIT, 101, 100), own(EXIT, 100), own(EXIT, 200))
    assert follower.pids == [100, 102, 102, 103, 102, 102, 103, 101, 100]
    assert follower.got == sorted(set(follower.got))
    assert other.pids == [200]
    node.retire()
    assert not node.router.route_of("a").processes
    assert not len(node.router.route_of("a").trees)


def test_an_orphan_that_is_first_heard_of_by_its_exit() -> None:
    node = Node()
    follower = node.monitor(100)
    node.feed(own(EXIT, 102, 100))
    assert follower.pids == [102]
    node.retire()
    assert list(node.router.route_of("a").processes) == [(100, 1000)]


def test_the_root_has_ended_before() -> None:
    node = Node()
    follower = node.monitor(100)
    node.feed(fork(100, 101), own(EXIT, 100))
    node.retire()
    node.feed(own(EXEC, 102, 100))
    assert follower.pids == [100, 100, 102]
    # With the last of the tree it is over; what comes from then on is of nobody whom this registration can have.
    node.feed(own(EXIT, 102, 100), own(EXIT, 101, 100))
    node.retire()
    node.feed(own(EXEC, 103, 100))
    assert follower.pids == [100, 100, 102, 102, 101]


def test_an_orphan_that_was_registered_before_anything_was_followed() -> None:
    node = Node()
    other = node.monitor(101, follow=False)
    assert not node.router.route_of("a").trees.unchecked
    follower = node.monitor(100)  # one answer of the agent: the process was there first, its span comes second
    node.feed(own(EXEC, 101, 100, armed=node.number), own(EXIT, 100))
    assert (follower.pids, other.pids) == ([101, 100], [101])
    node.feed(own(EXIT, 101, 100, armed=node.number))
    node.retire()
    assert not node.router.route_of("a").trees.unchecked
    assert not len(node.router.route_of("a").trees)


def test_a_root_pid_that_was_given_out_again() -> None:
    node = Node()
    before = node.monitor(100, start=1)
    node.feed(own(FORK, 100, start_boottime_ns=1, child_tgid=101, child_start_boottime_ns=1010))
    node.feed(own(EXIT, 100, start_boottime_ns=1))
    after = node.monitor(100, start=2)
    node.feed(own(EXEC, 102, (100, 1)), own(EXEC, 103, (100, 2), node.number), own(EXEC, 104, (100, 3)), own(EXEC, 105))
    assert before.pids == [100, 100, 102]
    assert after.pids == [103]


def test_children_that_were_there_before_are_not_taken_up() -> None:
    node = Node()
    first = node.monitor(100)
    second = node.monitor(100)
    node.feed(own(EXEC, 102, 100, armed=1), own(EXEC, 103, 100, armed=2), own(EXEC, 104, 100, armed=3))
    assert first.pids == [102, 103, 104]
    assert second.pids == [103, 104]


def test_the_numbers_wrap() -> None:
    node = Node(number=(1 << 32) - 2)
    follower = node.monitor(100)
    node.feed(own(EXEC, 101, 100, armed=(1 << 32) - 1), own(EXEC, 102, 100, armed=1), own(EXEC, 103, 100, armed=(1 << 32) - 2))
    assert follower.pids == [101, 102]


def test_without_follow_nobody_is_taken_up() -> None:
    node = Node()
    single = node.monitor(100, follow=False)
    node.monitor(200)
    node.feed(own(EXEC, 101, 100), own(EXEC, 100))
    assert single.pids == [100]


def test_an_orphan_that_another_monitor_registered_before_it_was_heard_of() -> None:
    """What it forks carries it as its root, which is both monitors'."""
    node = Node()
    outer = node.monitor(100)
    inner = node.monitor(102)
    armed = node.number
    node.feed(fork(102, 103, 100), fork(103, 104, 102, armed), own(EXEC, 104, 102, armed), own(EXEC, 105, 102, armed), own(EXEC, 106, 100))
    assert outer.pids == [102, 103, 104, 105, 106]
    assert inner.pids == [102, 103, 104, 105]
    outers = [(pid, pid * 10) for pid in (102, 103, 104, 105, 106)]
    inners = [(pid, pid * 10) for pid in (103, 104, 105)]
    assert sorted(node.made) == sorted(outers + inners), "each once"
    # The inner root ends, and is forgotten; what it forked is both's all the same.
    node.feed(own(EXIT, 102, 100))
    node.retire()
    node.feed(own(EXEC, 107, 102, armed))
    assert outer.pids[-2:] == inner.pids[-2:] == [102, 107]


def test_an_orphan_that_another_monitor_registered_and_left_again() -> None:
    node = Node()
    outer, brief, single = node.monitor(100), node.monitor(102), node.monitor(102, follow=False)
    node.router.end(brief.matcher.spans("a")[0], 0, 0)
    node.feed(own(EXEC, 102, 100), own(EXIT, 102, 100))
    assert outer.pids == single.pids == [102, 102]
    assert brief.pids == []


def test_a_registration_that_is_over_gets_none() -> None:
    node = Node()
    node.router = Router(lambda _: None, lambda _: None, lambda _: False)
    follower = node.monitor(100)
    node.feed(own(EXEC, 102, 100))
    assert follower.pids == []
