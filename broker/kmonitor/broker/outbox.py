# SPDX-License-Identifier: Apache-2.0
"""What a session has still to send, in order and bounded: messages, rows of blocks, and, once rows are too many, stretches of the log.

A session that does not keep up holds no rows but a stretch of log offsets, and finds its rows again when it reads on. What
happens meanwhile is put behind the stretch, so the order is the same for all. When it has read to the end it is live again.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from kmonitor.broker.block import Block
from kmonitor.broker.encode import Encoder
from kmonitor.broker.log import EventLog
from kmonitor.broker.matching import Matcher
from kmonitor.broker.notices import gap, progress
from kmonitor.broker.router import Router
from kmonitor.v1 import monitor_pb2
from kmonitor.wire.record import Indices

ROWS_LIMIT = 8 << 20
"""Bytes of blocks that a session holds on to before it falls back to the log."""
MESSAGES_LIMIT = 4 << 20
"""Bytes of other messages that wait; a session that lets more gather is ended."""
READ_SIZE = 1 << 20
"""Bytes of the log that a session reads at once, and of messages that it gives out at once."""


@dataclass(slots=True)
class Missed:
    """What the log evicted before this session had read it, of one node and epoch. Positions in bytes, times in Unix ns."""

    first: int
    end: int
    first_time: int
    end_time: int
    counts: dict[int, int]

    def add(self, later: Missed) -> None:
        """Append what was missed after it."""
        self.end, self.end_time = later.end, later.end_time
        for kind, count in later.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count


@dataclass(slots=True)
class _Stretch:
    """Log offsets [start, end) that the session has still to read."""

    start: int
    end: int
    missed: dict[tuple[str, int], Missed] = field(default_factory=dict)


_Item = bytes | tuple[Block, Indices] | _Stretch


class OverflowedError(Exception):
    """More messages wait than a session may let gather."""


class Outbox:
    """Ordered and bounded; written by the broker, emptied by one task of the session."""

    def __init__(self, log: EventLog, encoder: Encoder, router: Router, matcher: Matcher, lagging: set[Outbox]) -> None:
        """`lagging`: shared by all outboxes; those that have to read the log are in it."""
        self._log = log
        self._encoder = encoder
        self._router = router
        self._matcher = matcher
        self._lagging = lagging
        self._items: deque[_Item] = deque()
        self._stretches: deque[_Stretch] = deque()
        self._rows_bytes = 0
        self.messages_bytes = 0
        self._delivered: dict[str, tuple[int, int, int]] = {}
        """Node -> (epoch, position, Unix ns) up to which a stretch of the log was read."""
        self._progress: bytes | None = None
        """The progress message that waits among the items."""
        self._progress_due = False
        self.filled = asyncio.Event()
        """Set when there is something to take."""

    @property
    def behind(self) -> bool:
        """Whether it has to read the log."""
        return bool(self._stretches)

    def __len__(self) -> int:
        return len(self._items)

    def put(self, message: bytes) -> None:
        """A message, behind all that is there. Raises OverflowedError."""
        if self.messages_bytes + len(message) > MESSAGES_LIMIT:
            raise OverflowedError
        self._items.append(message)
        self.messages_bytes += len(message)
        self.filled.set()

    def put_progress(self, message: bytes) -> None:
        """How far all nodes are now. Left out while one waits to be sent; a session that is behind says how far it is itself."""
        if self._stretches:
            self._progress_due = True
        elif self._progress is None:
            self.put(message)
            self._progress = message

    def close(self) -> None:
        """Drop everything."""
        self._items.clear()
        self._stretches.clear()
        self._lagging.discard(self)
        self.filled.set()

    def offer(self, block: Block, rows: Indices) -> None:
        """Rows of a block that was just put into the log."""
        last = self._items[-1] if self._items else None
        if isinstance(last, _Stretch):
            last.end = block.offset + 1
        elif self._rows_bytes + block.size > ROWS_LIMIT and self._rows_bytes:
            stretch = _Stretch(block.offset, block.offset + 1)
            self._items.append(stretch)
            self._stretches.append(stretch)
            self._lagging.add(self)
        else:
            self._items.append((block, rows))
            self._rows_bytes += block.size
        self.filled.set()

    def evicting(self, block: Block) -> None:
        """The log is about to drop this block, its oldest. If it has not been read yet, count what is missed of it."""
        for stretch in self._stretches:
            if stretch.start > block.offset:
                break
            if stretch.end <= block.offset:
                continue
            stretch.start = block.offset + 1
            rows = self._select(block)
            if len(rows):
                kinds, counts = np.unique(block.column("type")[rows], return_counts=True)
                missed = Missed(
                    int(block.positions[rows[0]]),
                    block.end,
                    block.unix_ns(int(rows[0])),
                    block.unix_ns(int(rows[-1])),
                    dict(zip(kinds.tolist(), counts.tolist(), strict=True)),
                )
                before = stretch.missed.setdefault((block.node, block.epoch), missed)
                if before is not missed:
                    before.add(missed)
            block.trim()
        self.prune(block.offset + 1)

    def prune(self, end: int) -> None:
        """Forget ended spans that no block still to be read can match. `end`: the log offset before which all is past."""
        self._matcher.prune(self._stretches[0].start if self._stretches else end)

    def take(self) -> list[bytes]:
        """The next messages to send, about READ_SIZE bytes. May be empty though more is to come: look at `len`."""
        out: list[bytes] = []
        size = 0
        while self._items and size < READ_SIZE:
            item = self._items[0]
            if isinstance(item, bytes):
                self._items.popleft()
                self.messages_bytes -= len(item)
                if item is self._progress:
                    self._progress = None
                made = [item]
            elif isinstance(item, tuple):
                made = self._encoder.notifications(self._take_rows())
            else:
                made = self._read(item)
                out += made
                break  # one reading a turn: others have their turn too
            out += made
            size += sum(map(len, made))
        if not self._items:
            self.filled.clear()
        return out

    def _take_rows(self) -> list[tuple[Block, Indices]]:
        """The rows at the head, as far as they are of one node and boot and make about one message."""
        first: Block | None = None
        size = 0
        parts: list[tuple[Block, Indices]] = []
        while self._items and isinstance(item := self._items[0], tuple):
            block, rows = item
            if first is None:
                first = block
            elif block.source != first.source or size > READ_SIZE:
                break
            self._items.popleft()
            self._rows_bytes -= block.size
            size += 128 * len(rows)
            parts.append(item)
        return parts

    def _read(self, stretch: _Stretch) -> list[bytes]:
        """Read on in the log. First tell what it dropped."""
        out = [
            gap(
                node,
                monitor_pb2.GAP_REASON_SUBSCRIBER,
                epoch,
                positions=(missed.first, missed.end),
                times=(missed.first_time, missed.end_time),
                counts=missed.counts,
            )
            for (node, epoch), missed in stretch.missed.items()
        ]
        stretch.missed.clear()
        blocks = self._log.read(stretch.start, READ_SIZE) if stretch.start < stretch.end else []
        parts: list[tuple[Block, Indices]] = []
        for block in blocks:
            if block.offset >= stretch.end:
                break
            rows = self._select(block)
            if len(rows):
                parts.append((block, rows))
            stretch.start = block.offset + 1
            if len(block):
                self._delivered[block.node] = (block.epoch, block.end, block.unix_ns(len(block) - 1))
        for _, run in itertools.groupby(parts, key=lambda part: part[0].source):
            out += self._encoder.notifications(list(run))
        for block in blocks:
            block.trim()
        if self._progress_due:
            self._progress_due = False
            nodes = set(self._matcher.nodes())
            out.append(progress((node, *at) for node, at in self._delivered.items() if node in nodes))
        if stretch.start >= stretch.end:
            self._items.popleft()
            self._stretches.popleft()
            if not self._stretches:
                self._lagging.discard(self)
                self._delivered.clear()
        self.prune(self._log.end)
        return out

    def _select(self, block: Block) -> Indices:
        return self._matcher.select(block, self._router.route_of(block.node).cgroup_tree)
