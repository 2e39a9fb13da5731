# SPDX-License-Identifier: Apache-2.0
"""Who gets which rows of a block. The cost of a block does not grow with the sessions that it does not concern."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from kmonitor.broker.block import Block, ProcessKey
from kmonitor.broker.matching import NO_GROUPS, CgroupTree, Group, Matcher, Span, rows_of_cgroups
from kmonitor.broker.multimap import Multimap
from kmonitor.broker.trees import Trees
from kmonitor.wire.masks import EventType
from kmonitor.wire.record import F_MATCH_NODE, F_MATCH_PROCESS, Indices

_FORK = int(EventType.PROCESS_FORK)
_EXIT = int(EventType.PROCESS_EXIT)

LATE_NS = 2_000_000_000
"""By the node's clock: no thread is recorded so long after the end of its process. The kernel counts a thread out of its process some
microseconds before it records the thread's end, unless it does not let it run just then."""


class Receiver(Protocol):
    """What the router knows of a session."""

    matcher: Matcher

    @property
    def takes(self) -> bool:
        """Whether there is anybody to bring rows to."""
        ...

    def offer(self, block: Block, rows: Indices) -> None:
        """Take these rows. Never blocks."""
        ...


@dataclass(slots=True)
class _Idle:
    """A control group that the node's kernel is to watch no more."""

    version: int
    """With this Interest, or a later one, it is told so."""
    until_ns: int = 0
    """By then, boot-time nanoseconds, it had been; 0 if that is not known."""
    offset: int = -1
    """No record that names it comes from this log offset on; -1 if one may still."""


@dataclass(frozen=True, slots=True)
class Heard:
    """How far a node's agent has obeyed and told."""

    epoch: int
    next_version: int
    """Of the Interest that comes next."""
    applied: int
    """Version of the last one that was answered ..."""
    applied_ns: int
    """... and when it had taken effect, boot-time nanoseconds."""
    complete_ns: int
    """All from before it has come, boot-time nanoseconds."""


@dataclass(slots=True)
class Route:
    """The open spans of all sessions on one node, by what they match."""

    cgroup_tree: CgroupTree = field(default_factory=CgroupTree)
    processes: Multimap[ProcessKey, Span] = field(default_factory=Multimap)
    cgroups: Multimap[int, Span] = field(default_factory=Multimap)
    everything: dict[Span, None] = field(default_factory=dict)
    following: int = 0
    """How many of the process spans follow."""
    trees: Trees = field(default_factory=Trees)
    lingering: OrderedDict[Span, None] = field(default_factory=OrderedDict)
    """Those whose processes have ended, in about that order."""
    idle: dict[Group, _Idle] = field(default_factory=dict)
    """Those of `cgroup_tree` without an open span."""

    def __bool__(self) -> bool:
        """Whether there is anything in it."""
        return bool(self.processes or self.cgroups or self.everything or self.cgroup_tree.above or len(self.trees))


class Router:
    """Index of open spans, and the life of the processes they are for, as the records tell it."""

    def __init__(
        self, on_child: Callable[[Span], None], on_end: Callable[[Span], None], on_orphan: Callable[[Span], bool] = lambda _: True
    ) -> None:
        """`on_child`: a followed process made a child, and this is its span. `on_end`: the span's process has ended.

        `on_orphan`: like `on_child`, of a child whose fork was not told; False if its registration cannot have it any more.
        """
        self._on_child = on_child
        self._on_orphan = on_orphan
        self._on_end = on_end
        self.on_group: Callable[[str, Group, tuple[int, ...] | None], None] = lambda _node, _group, _above: None
        """Called when a group became known, with those above it, or is known no more (None)."""
        self._routes: dict[str, Route] = {}

    def route_of(self, node: str) -> Route:
        """The index of a node, which is made if there is none."""
        route = self._routes.get(node)
        if route is None:
            route = self._routes[node] = Route()
        return route

    def groups_of(self, node: str) -> CgroupTree:
        """What is known of a node's control groups."""
        route = self._routes.get(node)
        return NO_GROUPS if route is None else route.cgroup_tree

    def learn_group(self, node: str, epoch: int, cgroup_ids: Iterable[int]) -> None:
        """The id of a group that a node's kernel watches, then of those above it. Before any record that names it."""
        cgroup_id, *above = cgroup_ids
        tree = self.route_of(node).cgroup_tree
        if tree.above.get((epoch, cgroup_id)) != tuple(above):
            tree.above[epoch, cgroup_id] = tuple(above)
            self.on_group(node, (epoch, cgroup_id), tuple(above))

    def sweep(self, node: str, heard: Heard | None, receivers: Iterable[Receiver], oldest: int, end: int) -> None:
        """Forget what is of no use any more: call it now and then.

        A group is of use while it has a span that is open. After that, as long as anybody has spans of a group above it: until no record
        that names it can come, and the log has dropped those that came. `heard`: of a node that is connected, or may come back; None of
        one that will not. `oldest`, `end`: of the log.
        """
        route = self._routes.get(node)
        if route is None:
            return
        for group in list(route.cgroup_tree.above):
            epoch, cgroup_id = group
            if cgroup_id in route.cgroups and heard is not None and epoch == heard.epoch:
                route.idle.pop(group, None)
                continue
            idle = route.idle.setdefault(group, _Idle(0 if heard is None else heard.next_version))
            if idle.offset < 0 and (heard is None or epoch != heard.epoch):
                idle.offset = end
            elif idle.offset < 0 and heard is not None:
                if not idle.until_ns and heard.applied >= idle.version:
                    idle.until_ns = heard.applied_ns + LATE_NS
                if idle.until_ns and heard.complete_ns >= idle.until_ns:
                    idle.offset = end
            above = route.cgroup_tree.above[group]
            if 0 <= idle.offset <= oldest or not any(each.matcher.has_group(node, (epoch, one)) for each in receivers for one in above):
                del route.cgroup_tree.above[group], route.idle[group]
                self.on_group(node, group, None)
        if not route:
            del self._routes[node]

    def __iter__(self) -> Iterator[str]:
        """The nodes of which anything is known."""
        return iter(list(self._routes))

    def add(self, span: Span) -> None:
        """From now on blocks are held against this span too."""
        route = self.route_of(span.node)
        if span.process is not None:
            if span.follow and not route.following:
                route.trees.unchecked.update(each.process for each in route.processes.values() if each.root and each.process is not None)
            route.trees.opened(span, span.process, route.processes.get(span.process))
            route.processes.add(span.process, span)
            route.following += span.follow
        elif span.cgroup_id is not None:
            route.cgroups.add(span.cgroup_id, span)
        else:
            route.everything[span] = None
        receiver: Receiver = span.owner
        receiver.matcher.add(span)

    def living(self, node: str) -> list[Span]:
        """The spans of processes whose end has not come."""
        route = self._routes.get(node)
        return [] if route is None else [span for span in route.processes.values() if not span.lingers]

    def end(self, span: Span, position: int, offset: int) -> None:
        """The span ends before `position`; no block from log offset `offset` on is held against it."""
        route = self.route_of(span.node)
        if span.process is not None:
            route.processes.discard(span.process, span)
            route.following -= span.follow
            route.trees.ended(span, span.process, last=span.process not in route.processes)
        elif span.cgroup_id is not None:
            route.cgroups.discard(span.cgroup_id, span)
        else:
            del route.everything[span]
        route.lingering.pop(span, None)
        span.end = max(position, span.first)
        receiver: Receiver = span.owner
        receiver.matcher.ended(span, offset)

    def linger(self, span: Span, exit_ns: int) -> None:
        """The span's process or group has ended, at this time of the node's boot-time clock or before: `retire` ends the span."""
        span.exit_ns = exit_ns
        receiver: Receiver = span.owner
        receiver.matcher.changed(span)
        self.route_of(span.node).lingering[span] = None

    def retire(self, node: str, boottime_ns: int, position: int, offset: int) -> None:
        """End the spans of what has ended, once nothing more of it can come: what is missing of it was said, too.

        `boottime_ns`: by the node's boot-time clock, up to when all that was made or lost has come. `position`: up to where its
        records have. `offset`: of the next block in the log. An agent that is cut off says neither, and its node's spans wait.
        """
        route = self._routes.get(node)
        while route is not None and route.lingering:
            span = next(iter(route.lingering))
            if span.exit_ns + LATE_NS > boottime_ns:
                return
            self.end(span, position, offset)

    def route(self, block: Block) -> None:
        """Offer the block's rows to the sessions that want them. It is in the log already."""
        route = self._routes.get(block.node)
        if route is None or len(block) == 0:
            return
        receivers: dict[Receiver, None] = {}  # a dict: sessions are offered in a stable order, those with the fewest rows first
        if route.processes:
            if route.following:
                self._follow(route, block)
            known = block.processes.keys() & route.processes.keys()
            if route.following and (len(known) < len(block.processes) or route.trees.unchecked) and self._adopt(route, block, known):
                known = block.processes.keys() & route.processes.keys()
            for key in known:
                receivers.update((span.owner, None) for span in route.processes[key])
        if route.cgroups:
            for nearest in rows_of_cgroups(block):
                for cgroup_id in route.cgroup_tree.self_and_above(block.epoch, nearest):
                    receivers.update((span.owner, None) for span in route.cgroups.get(cgroup_id, ()))
        if route.everything and bool((block.column("flags") & F_MATCH_NODE).any()):
            receivers.update((span.owner, None) for span in route.everything)
        for receiver in receivers:
            if not receiver.takes:
                continue
            rows = receiver.matcher.select(block, route.cgroup_tree)
            if len(rows):
                receiver.offer(block, rows)
        if route.processes:
            self._end_processes(route, block)

    def _follow(self, route: Route, block: Block) -> None:
        """Give the children of followed processes spans, in the records' order: a child may fork within the same block."""
        rows = _watched(block, _FORK)
        if len(rows) == 0:
            return
        parents = zip(block.column("tgid")[rows].tolist(), block.column("start_boottime_ns")[rows].tolist(), strict=True)
        children = zip(block.column("child_tgid")[rows].tolist(), block.column("child_start_boottime_ns")[rows].tolist(), strict=True)
        for position, parent, child in zip(block.positions[rows].tolist(), parents, children, strict=True):
            for span in list(route.processes.get(parent, ())):
                if span.follow and span.first <= position and span.epoch == block.epoch:
                    made = _child(span, child, position)
                    self.add(made)
                    self._on_child(made)

    def _adopt(self, route: Route, block: Block, known: set[ProcessKey]) -> bool:
        """Give spans to followed processes whose forks were not told, from their first record on. Whether there were any.

        `known`: those of the block's processes that have a span. Only of the others, and of those that were registered since
        the last block, can that be so.
        """
        processes = block.processes
        registered = route.trees.unchecked & processes.keys()
        route.trees.unchecked -= registered
        suspects = sorted((processes.keys() - known) | registered, key=lambda key: int(processes[key][0]))
        if not suspects:
            return False
        first = np.fromiter((processes[key][0] for key in suspects), dtype=np.intp, count=len(suspects))
        pids = block.column("root_tgid")[first]
        roots = zip(pids.tolist(), block.column("root_start_boottime_ns")[first].tolist(), strict=True)
        armed = block.column("root_armed")[first].tolist()
        adopted: set[ProcessKey] = set()
        for key, position, root, when in zip(suspects, block.positions[first].tolist(), roots, armed, strict=True):
            if root[0]:
                for span in route.trees.above(root, when, block.epoch):
                    if self._adopt_one(route, span, key, position):
                        adopted.add(key)
        if adopted:
            self._follow_adopted(route, block, adopted)
        return bool(adopted)

    def _adopt_one(self, route: Route, above: Span, process: ProcessKey, position: int) -> bool:
        """Whether a process that belongs to the same registration as the span `above` it had to be given a span."""
        made = _child(above, process, position)
        for span in route.processes.get(process, ()):
            if span.arm == above.arm:
                made.mask &= ~span.mask
        if not made.mask or not self._on_orphan(made):
            return False
        self.add(made)
        return True

    def _follow_adopted(self, route: Route, block: Block, adopted: set[ProcessKey]) -> None:
        """What `_follow` does, for parents that were not known then, and their children."""
        rows = _watched(block, _FORK)
        names = ("tgid", "start_boottime_ns", "child_tgid", "child_start_boottime_ns")
        pids, starts, child_pids, child_starts = (block.column(name)[rows].tolist() for name in names)
        for position, parent, child in zip(
            block.positions[rows].tolist(), zip(pids, starts, strict=True), zip(child_pids, child_starts, strict=True), strict=True
        ):
            if parent in adopted:
                for span in list(route.processes.get(parent, ())):
                    if (
                        span.follow
                        and span.first <= position
                        and span.epoch == block.epoch
                        and self._adopt_one(route, span, child, position)
                    ):
                        adopted.add(child)

    def _end_processes(self, route: Route, block: Block) -> None:
        """The kernel has forgotten the processes that ended in this block; so do we."""
        rows = _watched(block, _EXIT)
        if len(rows) == 0:
            return
        keys = zip(block.column("tgid")[rows].tolist(), block.column("start_boottime_ns")[rows].tolist(), strict=True)
        for key, exit_ns in zip(keys, block.column("boottime_ns")[rows].tolist(), strict=True):
            for span in list(route.processes.get(key, ())):
                if span.epoch == block.epoch and not span.lingers:
                    # Threads that end at the same time may be recorded behind the exit of their process: `retire` ends the span.
                    self.linger(span, exit_ns)
                    self._on_end(span)


def _child(parent: Span, process: ProcessKey, position: int) -> Span:
    return Span(
        parent.owner, parent.arm, parent.node, parent.epoch, parent.mask, position, process,
        follow=True, filter=parent.filter, since=parent.since,
    )  # fmt: skip


def _watched(block: Block, kind: int) -> Indices:
    found: Indices = np.flatnonzero(block.column("type") == kind)
    return found[block.column("flags")[found] & F_MATCH_PROCESS != 0] if len(found) else found
