# SPDX-License-Identifier: Apache-2.0
"""Which rows of a block a session wants.

A span says from where to where in a node's ring a registration holds. Spans are kept after their end for as long as the session
has still to read blocks from before it, so that live delivery and reading the log give the same rows; and some longer, for a stream
that comes back and has not received all that was sent.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kmonitor.broker.block import Block, ProcessKey
from kmonitor.broker.filters import NO_FILTER, Filter
from kmonitor.broker.multimap import Multimap
from kmonitor.wire.record import F_MATCH_CGROUP, F_MATCH_NODE, Indices

NO_ROWS: Indices = np.empty(0, dtype=np.intp)
PAST = 1 << 15
"""Ended spans that a session keeps after it has read past them: as many as there can be among what lies in a connection's buffers."""


@dataclass(eq=False, slots=True)
class Span:
    """A stretch of a node's ring in which one target is registered. Exactly one of `process`, `cgroup_id` or neither is set."""

    owner: Any
    """The session; opaque here."""
    arm: Any
    """The registration on this node, and its name in the node's interest; opaque here."""
    node: str
    epoch: int
    mask: int
    first: int
    """The first position that is delivered."""
    process: ProcessKey | None = None
    cgroup_id: int | None = None
    follow: bool = False
    filter: Filter = NO_FILTER
    end: int | None = None
    """The first position that is not delivered; None while it is open."""
    exit_ns: int = -1
    """When its process or group had ended, boot-time nanoseconds; -1 while it lives. What is still to come of it: see Router.retire."""
    root: bool = False
    """Its process was armed by the agent, and not by the kernel when it was forked."""
    since: int = 0
    """The agent's number of the change with which the registration began to follow: the same for a whole tree."""
    end_offset: int = -1
    """Log offset from which on no block can match it; -1 while it is open."""
    id: int = 0
    """Under which it is remembered, where it is."""

    @property
    def lingers(self) -> bool:
        """Whether its process or group has ended."""
        return self.exit_ns >= 0

    def narrow(self, block: Block, rows: Indices) -> Indices:
        """Those of the rows that are within the span, of a wanted type, and pass the filter."""
        if block.epoch != self.epoch or block.end <= self.first or (self.end is not None and self.end <= block.position):
            return NO_ROWS
        if len(rows) == 1 and not self.filter and self.first <= block.position and (self.end is None or block.end <= self.end):
            return rows if block.column("type").item(rows.item()) & self.mask else NO_ROWS
        keep: npt.NDArray[np.bool_] = block.column("type")[rows] & self.mask != 0
        if block.position < self.first or (self.end is not None and self.end < block.end):
            positions = block.positions[rows]
            keep &= positions >= self.first
            if self.end is not None:
                keep &= positions < self.end
        if self.filter:
            keep &= self.filter.keep(block)[rows]
        return rows[keep]

    def of_node(self, block: Block, rows: Indices) -> Indices:
        """`narrow` of all rows that the node-wide mask asked for. Sessions that want the same share one array: hundreds of them may
        keep it for long."""
        key = self.epoch, self.mask, self.filter, max(self.first, block.position), self.end
        found: Indices | None = block.memo(key)
        if found is None:
            found = self.narrow(block, rows)
            block.remember(key, found)
        return found


Group = tuple[int, int]
"""(epoch, id of a control group): ids begin anew with a boot."""


@dataclass(slots=True)
class CgroupTree:
    """What lies above the watched control groups of a node: a record names only the nearest watched one.

    A group is known for as long as a record that names it can come, or be read again: see Router.sweep.
    """

    above: dict[Group, tuple[int, ...]] = field(default_factory=dict)

    def self_and_above(self, epoch: int, cgroup_id: int) -> tuple[int, ...]:
        """The groups that an event in this watched group is in."""
        return (cgroup_id, *self.above.get((epoch, cgroup_id), ()))


NO_GROUPS = CgroupTree()
"""Of a node without any."""


@dataclass(slots=True)
class _Table:
    """The spans of one session on one node."""

    processes: Multimap[ProcessKey, Span] = field(default_factory=Multimap)
    cgroups: Multimap[int, Span] = field(default_factory=Multimap)
    everything: dict[Span, None] = field(default_factory=dict)

    def add(self, span: Span) -> None:
        if span.process is not None:
            self.processes.add(span.process, span)
        elif span.cgroup_id is not None:
            self.cgroups.add(span.cgroup_id, span)
        else:
            self.everything[span] = None

    def discard(self, span: Span) -> None:
        if span.process is not None:
            self.processes.discard(span.process, span)
        elif span.cgroup_id is not None:
            self.cgroups.discard(span.cgroup_id, span)
        else:
            self.everything.pop(span, None)

    def is_open(self) -> bool:
        """Whether any of them is. Mostly the first is, and each session is asked this of each node once a second."""
        for spans in (self.processes.values(), self.cgroups.values(), self.everything):
            for span in spans:
                if span.end is None:
                    return True
        return False

    def __iter__(self) -> Iterator[Span]:
        yield from self.processes.values()
        yield from self.cgroups.values()
        yield from self.everything

    def __len__(self) -> int:
        return len(self.processes) + len(self.cgroups) + len(self.everything)


class Matcher:
    """All spans of one session, open and ended."""

    def __init__(
        self, on_change: Callable[[Span, bool], None] = lambda _span, _there: None, on_forget: Callable[[], None] = lambda: None
    ) -> None:
        """`on_change`: called with a span when it is there or has ended (True), and when it is forgotten (False). `on_forget`: when
        `remembers_from` has changed, before spans are forgotten."""
        self._on_change = on_change
        self._on_forget = on_forget
        self._tables: dict[str, _Table] = {}
        self._ended: deque[tuple[int, Span]] = deque()
        """(log offset from which on the span means nothing, span), ascending."""
        self._past: deque[tuple[int, Span]] = deque()
        """The same, of those that the session has passed."""
        self._groups: Counter[tuple[str, Group]] = Counter()
        """(node, group) -> spans, the past ones too."""
        self.remembers_from = 0
        """Log offset from which on no span was forgotten."""
        self._of_arms: Multimap[Any, Span] = Multimap()
        """Arm -> its open spans."""
        self.version = 0
        """Counts the changes."""
        self.taken: dict[str, tuple[int, int]] = {}
        """Node -> (epoch, position) up to which the client has taken everything from an earlier stream."""

    def add(self, span: Span) -> None:
        """Take a span up."""
        self._tables.setdefault(span.node, _Table()).add(span)
        if span.end is None:
            self._of_arms.add(span.arm, span)
        if span.cgroup_id is not None:
            self._groups[span.node, (span.epoch, span.cgroup_id)] += 1
        self.version += 1
        self._on_change(span, True)

    def ended(self, span: Span, offset: int) -> None:
        """The span has got its `end`: no block at or behind this log offset can match it."""
        span.end_offset = offset
        self._ended.append((offset, span))
        self.version += 1
        self._of_arms.discard(span.arm, span)
        self._on_change(span, True)

    def prune(self, offset: int, *, keep: int = 0) -> None:
        """The session has passed all blocks before this log offset: forget the spans that ended before it, all but the last `keep`."""
        while self._ended and self._ended[0][0] <= offset:
            item = self._ended.popleft()
            table = self._tables[item[1].node]
            table.discard(item[1])
            if not table:
                del self._tables[item[1].node]
            self._past.append(item)
        if len(self._past) > keep + keep // 8:  # not one by one
            count = len(self._past) - keep
            self.has_forgotten(max(ended for ended, _ in itertools.islice(self._past, count)))
            for _ in range(count):
                self._forget(self._past.popleft()[1])

    def has_forgotten(self, offset: int) -> None:
        """Of what ended before this log offset spans are missing: here, or where these were copied from."""
        if offset > self.remembers_from:
            self.remembers_from = offset
            self._on_forget()

    def _forget(self, span: Span) -> None:
        if span.cgroup_id is not None:
            place = span.node, (span.epoch, span.cgroup_id)
            self._groups[place] -= 1
            if not self._groups[place]:
                del self._groups[place]
        self._on_change(span, False)

    def has_group(self, node: str, group: Group) -> bool:
        """Whether there is a span of this very group, be it a past one."""
        return (node, group) in self._groups

    def recall(self) -> None:
        """Blocks are to be read again that were passed: spans that were kept hold for them again."""
        for _, span in self._past:
            self._tables.setdefault(span.node, _Table()).add(span)
        self._ended.extendleft(reversed(self._past))
        self._past.clear()

    def changed(self, span: Span) -> None:
        """Something else of it than its end has."""
        self._on_change(span, True)

    @property
    def ended_spans(self) -> int:
        """How many ended spans there are that were not passed."""
        return len(self._ended)

    def spans_of(self, arm: Any) -> list[Span]:
        """The open spans of an arm."""
        return list(self._of_arms.get(arm))

    def spans(self, node: str) -> list[Span]:
        """The open spans on a node."""
        return [span for span in self._tables.get(node, ()) if span.end is None]

    def all_spans(self) -> list[Span]:
        """Open ones, ended ones, and those that are kept for a stream that comes back: those that ended come in that order."""
        open_spans = [span for table in self._tables.values() for span in table if span.end is None]
        return [span for _, span in itertools.chain(self._past, self._ended)] + open_spans

    def spans_between(self, node: str, epoch: int, position: int, end: int) -> list[Span]:
        """The spans that hold anywhere between two positions of a node's ring, both included."""
        return [
            span
            for span in self._tables.get(node, ())
            if span.epoch == epoch and span.first <= end and (span.end is None or span.end > position)
        ]

    def knows(self, node: str) -> bool:
        """Whether there are spans on a node, open or ended where the session has still to read."""
        return bool(self._tables.get(node))

    def nodes_known(self) -> set[str]:
        """The nodes with spans, open or ended where the session has still to read."""
        return {node for node in self._tables if self.knows(node)}

    def spans_on(self, node: str) -> list[Span]:
        """The spans on a node that are open, or ended where the session has still to read."""
        return list(self._tables.get(node, ()))

    def watches(self, node: str) -> bool:
        """Whether there are open spans on a node."""
        table = self._tables.get(node)
        return table is not None and table.is_open()

    def nodes(self) -> list[str]:
        """The nodes with open spans."""
        return [node for node in self._tables if self.watches(node)]

    def select(self, block: Block, cgroups: CgroupTree) -> Indices:
        """Rows of the block that the session gets: ascending, each once however many registrations it matches."""
        table = self._tables.get(block.node)
        if table is None or len(block) == 0:
            return NO_ROWS
        found: list[Indices] = []
        if table.everything:
            rows = rows_of_node(block)
            found += [span.of_node(block, rows) for span in table.everything]
        if table.cgroups:
            for cgroup_id, rows in rows_of_cgroups(block).items():
                for matched in cgroups.self_and_above(block.epoch, cgroup_id):
                    found += [span.narrow(block, rows) for span in table.cgroups.get(matched, ())]
        if table.processes:
            processes = block.processes
            for key in processes.keys() & table.processes.keys():
                found += [span.narrow(block, processes[key]) for span in table.processes[key]]
        found = [rows for rows in found if len(rows)]
        if not found:
            return NO_ROWS
        rows = found[0] if len(found) == 1 else np.unique(np.concatenate(found))
        return self._not_taken(block, rows) if self.taken else rows

    def _not_taken(self, block: Block, rows: Indices) -> Indices:
        """It may come again, from the log, or from an agent that nobody has acknowledged it to."""
        taken = self.taken.get(block.node)
        if taken is None or taken[0] != block.epoch or block.position > taken[1]:
            return rows
        kept: Indices = rows[block.positions[rows] > np.uint64(taken[1])]
        return kept


def rows_of_node(block: Block) -> Indices:
    """The rows that the node-wide mask asked for."""
    found: Indices | None = block.memo("rows of node")
    if found is None:
        found = np.flatnonzero(block.column("flags") & F_MATCH_NODE)
        block.remember("rows of node", found)
    return found


def rows_of_cgroups(block: Block) -> dict[int, Indices]:
    """The rows that a control group's mask asked for, by the nearest watched group."""
    found: dict[int, Indices] | None = block.memo("rows of cgroups")
    if found is None:
        rows = np.flatnonzero(block.column("flags") & F_MATCH_CGROUP)
        ids = block.column("match_cgroup_id")[rows]
        found = {int(cgroup_id): rows[ids == cgroup_id] for cgroup_id in np.unique(ids)}
        block.remember("rows of cgroups", found)
    return found
