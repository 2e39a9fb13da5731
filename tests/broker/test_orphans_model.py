# SPDX-License-Identifier: Apache-2.0
"""Followed processes of which some records are lost, against a model of the kernel and of what can be known."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from kmonitor.broker.block import ProcessKey
from kmonitor.broker.matching import Span
from kmonitor.wire.record import F_MATCH_PROCESS, SLOT_SIZE
from tests.broker.records import EXEC, EXIT, FORK, Rec, rec
from tests.broker.test_orphans import ALL, Monitor, Node

ACTIONS = st.one_of(
    st.tuples(st.sampled_from(["fork", "fork", "fork", "exec", "exit"]), st.integers(0, 30), st.booleans()),
    st.tuples(st.just("register"), st.integers(0, 30), st.just(True)),
    st.tuples(st.sampled_from(["cut", "cut", "retire"]), st.just(0), st.just(True)),
)
Label = tuple[ProcessKey, int]


@dataclass(eq=False)
class Process:
    """As the kernel has it."""

    key: ProcessKey
    label: Label | None
    followers: set[Monitor]
    """Whose it is in truth."""
    registered_at: int | None = None


@dataclass(eq=False)
class Known:
    """What a monitor's registration has been told of, in words as plain as can be."""

    first: int
    since: int
    ever: set[ProcessKey]
    open: set[ProcessKey]
    ended: set[ProcessKey] = field(default_factory=set)
    expected: list[int] = field(default_factory=list)


class World:
    """Processes that are forked, registered and end, and what the router makes of those records that were not lost."""

    def __init__(self) -> None:
        self.node = Node()
        self.live = [Process((pid, pid), None, set()) for pid in (1, 2)]
        self.starts = 10
        self.pending: list[Rec] = []
        self.position = 0
        self.number = 0
        self.known: dict[Monitor, Known] = {}
        self.truth: dict[Monitor, list[int]] = {}
        self.nested = False

    def fork(self, parent: Process, *, told: bool) -> None:
        self.starts += 1
        pid = next(number for number in range(1, 100) if all(each.key[0] != number for each in self.live))
        label = parent.label
        if parent.registered_at is not None:
            label = (parent.key, parent.registered_at)
        child = Process((pid, self.starts), label, set(parent.followers))
        self.live.append(child)
        self.tell(parent, FORK, told=told, child=child.key)

    def exit(self, process: Process, *, told: bool) -> None:
        self.tell(process, EXIT, told=told)
        self.live.remove(process)

    def register(self, process: Process) -> None:
        self.nested |= bool(process.followers) or process.label is not None
        monitor = Monitor()
        process.followers.add(monitor)
        self.number += 1
        process.registered_at = self.number
        self.known[monitor] = Known(self.position, self.number, {process.key}, {process.key})
        self.truth[monitor] = []
        # The answer is here before the records that are pending: as when blocks are on their way.
        span = Span(monitor, monitor, "a", 1, ALL, self.position, process.key, follow=True, root=True, since=self.number)
        self.node.router.add(span)

    def tell(self, process: Process, kind: int, *, told: bool, child: ProcessKey = (0, 0)) -> None:
        if not process.followers or not told:
            return
        (root_pid, root_start), armed = process.label or ((0, 0), 0)
        self.pending.append(
            rec(
                kind, process.key[0], flags=F_MATCH_PROCESS, start_boottime_ns=process.key[1], child_tgid=child[0],
                child_start_boottime_ns=child[1], root_tgid=root_pid, root_start_boottime_ns=root_start, root_armed=armed,
            )
        )  # fmt: skip
        for monitor, known in self.known.items():
            if monitor in process.followers and self.position >= known.first:
                self.truth[monitor].append(self.position)
            self.learn(known, process, kind, child)
        self.position += SLOT_SIZE

    def learn(self, known: Known, process: Process, kind: int, child: ProcessKey) -> None:
        if not known.open or self.position < known.first:
            return
        key, label = process.key, process.label
        if key not in known.open and label is not None and label[0] in known.ever and label[1] >= known.since:
            known.ever.add(key)
            known.open.add(key)
        if key in known.open:
            known.expected.append(self.position)
            if kind == FORK:
                known.ever.add(child)
                known.open.add(child)
            if kind == EXIT:
                known.ended.add(key)

    def cut(self) -> None:
        if self.pending:
            self.node.feed(*self.pending)
            self.pending.clear()

    def retire(self) -> None:
        self.cut()
        self.node.retire()
        for known in self.known.values():
            known.open -= known.ended


@given(st.lists(ACTIONS, max_size=60))
def test_same_as_the_model(actions: list[tuple[str, int, bool]]) -> None:
    world = World()
    world.register(world.live[0])
    for what, number, told in actions:
        process = world.live[number % len(world.live)] if world.live else None
        if what == "cut":
            world.cut()
        elif what == "retire":
            world.retire()
        elif process is not None:
            if what == "fork":
                world.fork(process, told=told)
            elif what == "register":
                world.register(process)
            elif what == "exec":
                world.tell(process, EXEC, told=told)
            else:
                world.exit(process, told=told)
    world.cut()
    for monitor, known in world.known.items():
        got = [position for position, _ in monitor.got]
        assert got == known.expected
        assert set(got) <= set(world.truth[monitor]), "never of a stranger"
        if not world.nested and known.open:
            assert got == world.truth[monitor], "with one registration a process nothing stays unknown"
