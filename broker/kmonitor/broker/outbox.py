# SPDX-License-Identifier: Apache-2.0
"""What a session has still to send, in order and bounded: messages, rows of blocks, and, once rows are too many, stretches of the log.

A session that does not keep up holds no rows but a stretch of log offsets, and finds its rows again when it reads on. What
happens meanwhile is put behind the stretch, so the order is the same for all. When it has read to the end it is live again.
A session that takes up where an earlier stream ended begins with such a stretch.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kmonitor.broker.block import Block
from kmonitor.broker.encode import Encoder
from kmonitor.broker.log import Entry, EventLog, Page
from kmonitor.broker.losses import number_of, told
from kmonitor.broker.mark import Mark, MarkKind
from kmonitor.broker.matching import PAST, Matcher
from kmonitor.broker.notices import gap, progress
from kmonitor.broker.router import Router
from kmonitor.v1 import monitor_pb2
from kmonitor.wire.record import Indices

ROWS_LIMIT = 8 << 20
"""Bytes of blocks that a session holds on to before it falls back to the log."""
MESSAGES_LIMIT = 4 << 20
"""Bytes of other messages that may wait for a monitor that takes none; one that reads may be given more at once."""
MESSAGES_MOST = 32 << 20
"""Whether it reads or not, and beside what its registrations can be answered with."""
STALLED_S = 10.0
"""A monitor that has taken nothing for so long, while something waited for it, does not read."""
MARK_WAIT = 1.0
"""Seconds, at most, that a mark waits to be safe: behind it waits all that came since."""
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


Notice = tuple[str, int, bytes]
"""(node, epoch, what is to be told of that)."""


@dataclass(slots=True)
class _Stretch:
    """Log offsets [start, end) that the session has still to read."""

    start: int
    end: int
    before: list[Notice] = field(default_factory=list)
    """Of what the log had evicted when it began."""
    missed: dict[tuple[str, int], Missed] = field(default_factory=dict)
    notices: list[Notice] = field(default_factory=list)
    """Of marks that the log evicted, and of the rows before them."""
    floors: Mapping[str, int] = field(default_factory=dict)
    """Node -> log offset before which its client has taken everything."""
    number: int = 0
    """The client was told of the marks up to this number."""
    absences: list[Notice] = field(default_factory=list)
    """Each is told before anything of its node's epoch, or of a later one. The same list for all that begin to read together."""
    resumed: bool = False
    """It is what an earlier stream has not brought: what was told beside the log meanwhile was told to nobody."""


_Item = bytes | tuple[Block, Indices] | _Stretch


class OverflowedError(Exception):
    """More messages wait than a session may let gather."""


class Outbox:
    """Ordered and bounded; written by the broker, emptied by one task of the session."""

    def __init__(
        self,
        log: EventLog,
        encoder: Encoder,
        router: Router,
        matcher: Matcher,
        lagging: set[Outbox],
        on_rebooted: Callable[[Mark], bytes | None] = lambda _: None,
        stream_id: int = 0,
    ) -> None:
        """`lagging`: shared by all outboxes; those that have to read the log are in it. `on_rebooted`: what to tell of a reboot that
        nobody was told of."""
        self.stream_id = stream_id
        self._log = log
        self._encoder = encoder
        self._router = router
        self._matcher = matcher
        self._lagging = lagging
        self._on_rebooted = on_rebooted
        self.waits_for_log = True
        """Marks are told once they are safe: a broker that dies before would count the same again. Not while nothing gets safe."""
        self.keeps = PAST
        """How many ended spans are kept for a stream that comes back."""
        self._items: deque[_Item] = deque()
        self._stretches: deque[_Stretch] = deque()
        self._gathering: _Stretch | None = None
        """What is to be read first, while it is not known yet whose rows it is to be searched for."""
        self._gathering_last: _Stretch | None = None
        """The same, or its last part: see `_divide`."""
        self.evicted_while_gathering = False
        self._read_at = 0.0
        """When the monitor took something last, or had nothing to take; by the monotonic clock, seconds."""
        self._rows_bytes = 0
        self.messages_bytes = 0
        self._delivered: dict[str, tuple[int, int, int]] = {}
        """Node -> (epoch, position, Unix ns) up to which a stretch of the log was read."""
        self._absent: dict[int, str] = {}
        """Of messages among the items that say that nobody kept the monitor's place: `id` -> node."""
        self._progress: bytes | None = None
        """The progress message that waits among the items."""
        self._progress_due = False
        self._complete: dict[str, tuple[int, int, int]] = {}
        """Node -> (epoch, position, Unix ns) up to which all of it has come."""
        self._page: Page | None = None
        """What the log's disk has answered, and is still to be looked at."""
        self._asked: asyncio.Future[Page] | None = None
        """What it is to answer."""
        self._blocked_since: float | None = None
        self._blocked = False
        """It has come upon a mark that is not safe yet: see `committed`."""
        self._taken = asyncio.Event()
        self.filled = asyncio.Event()
        """Set when there is something to take."""

    @property
    def behind(self) -> bool:
        """Whether it has to read the log."""
        return bool(self._stretches)

    @property
    def reads_from(self) -> int | None:
        """Log offset of the next entry that it reads; None if it has not to read the log."""
        return self._stretches[0].start if self._stretches else None

    def __len__(self) -> int:
        return len(self._items)

    def gather(self, start: int, floors: Mapping[str, int], number: int) -> None:
        """Begin with the log from an offset on, once `gathered` was called: till then all that comes waits.

        `floors`: node -> log offset before which the client has taken everything. `number`: the marks that it was told of.
        """
        end = self._log.end
        stretch = _Stretch(min(max(start, self._log.oldest), end), end, floors=floors, number=number, resumed=True)
        self._gathering = self._gathering_last = stretch
        self._items.append(stretch)
        self._stretches.append(stretch)
        self._lagging.add(self)

    def gathered(self, start: int, before: Iterable[Notice] = (), absences: Iterable[Notice] = ()) -> None:
        """What is to be delivered from the log is known now: from `start` on, and what is to be said `before` that.

        `absences`: each is said before anything of its node's epoch.
        """
        if self._gathering is not None and self._gathering_last is not None:
            self._gathering.start = max(min(start, self._gathering.start), self._log.oldest)
            self._gathering.before += before
            self._gathering.absences += absences
            self._gathering_last.end = self._log.end
            self._gathering = self._gathering_last = None
            self.has_read()
            self.filled.set()

    def put(self, message: bytes, most: int = MESSAGES_MOST, *, absent: str = "") -> None:
        """A message, behind all that is there. Raises OverflowedError if that is more than `most` bytes, or the monitor does not read.

        `absent`: it says that nobody kept the monitor's place on a node. Until it is taken, progress says nothing of that one.
        """
        waiting = self.messages_bytes + len(message)
        if waiting > MESSAGES_LIMIT and (waiting > most or self._is_stalled()):
            raise OverflowedError
        if not self._items:
            self.has_read()
        self._items.append(message)
        self.messages_bytes += len(message)
        if absent:
            self._absent[id(message)] = absent
            self._divide(self._log.end)
        self._fill()

    def has_read(self) -> None:
        """The monitor has taken something."""
        self._read_at = time.monotonic()

    def _is_stalled(self) -> bool:
        # While it says what it had before, nothing is given to it.
        return self._gathering is None and time.monotonic() - self._read_at > STALLED_S

    def put_progress(self, nodes: list[tuple[str, int, int, int]]) -> None:
        """How far all nodes are now: (node, epoch, position, Unix nanoseconds). Left out while one waits to be sent; a session that is
        behind says how far it is itself. Raises OverflowedError."""
        self._complete = {node: (epoch, position, time_ns) for node, epoch, position, time_ns in nodes}
        if self._stretches:
            self._progress_due = True
            if self._gathering is None:
                self.filled.set()  # also one that waits for a mark to be safe, or for the log's disk, says so
        elif self._progress is None:
            message = progress(nodes, self._log.end, self._log.log_id, self.stream_id)
            self.put(message)
            self._progress = message

    def close(self) -> None:
        """Drop everything."""
        self._items.clear()
        self._absent.clear()
        self._stretches.clear()
        self._gathering = self._gathering_last = None
        self._page = self._asked = None
        self._lagging.discard(self)
        self.filled.set()
        self._taken.set()

    def offer(self, block: Block, rows: Indices) -> None:
        """Rows of a block that was just put into the log."""
        last = self._gathering_last or (self._items[-1] if self._items else None)
        if isinstance(last, _Stretch):
            last.end = block.offset + 1
        elif self._rows_bytes + block.size > ROWS_LIMIT and self._rows_bytes:
            self._fall_back(block.offset)
        else:
            self._items.append((block, rows))
            self._rows_bytes += block.size
        self._fill()

    def offer_mark(self, mark: Mark) -> None:
        """A mark that was just put into the log. Raises OverflowedError."""
        if mark.kind is MarkKind.EPOCH:
            self._divide(mark.offset)
        last = self._gathering_last or (self._items[-1] if self._items else None)
        if isinstance(last, _Stretch):
            last.end = mark.offset + 1
        elif mark.kind is not MarkKind.UNLOGGED:  # what could not be logged is told to those who look for it in the log
            message = told(mark, self._matcher, self._log.log_id)
            if message is not None and self._must_wait(mark):
                self._fall_back(mark.offset)
            elif message is not None:
                self.put(message)
        self._fill()

    async def emptied(self) -> None:
        """Until everything was taken, or it was closed."""
        while self._items:
            self._taken.clear()
            await self._taken.wait()

    def evicting(self, entry: Entry) -> None:
        """The log is about to drop this entry, its oldest. If it has not been read yet, count what is missed of it."""
        for stretch in self._stretches:
            if stretch.start > entry.offset:
                break
            if stretch.end <= entry.offset:
                continue
            stretch.start = entry.offset + 1
            if self._gathering is not None and stretch.resumed:
                self.evicted_while_gathering = True  # whose rows they were is not known yet
                continue
            if isinstance(entry, Mark):
                messages = self._read_mark(stretch, entry)
                if messages:
                    stretch.notices += self._missed_so_far(stretch, entry.node)
                    stretch.notices += ((entry.node, entry.epoch, message) for message in messages)
            elif entry.offset >= stretch.floors.get(entry.node, 0):
                rows = self.select(entry)
                if len(rows):
                    missed = missed_rows(entry, rows)
                    before = stretch.missed.setdefault((entry.node, entry.epoch), missed)
                    if before is not missed:
                        before.add(missed)
        self.prune(entry.offset + 1)

    def prune(self, end: int) -> None:
        """Forget ended spans that no block still to be read can match. `end`: the log offset before which all is past."""
        self._matcher.prune(self._stretches[0].start if self._stretches else end, keep=self.keeps)

    def take(self) -> list[bytes]:
        """The next messages to send, about READ_SIZE bytes. May be empty though more is to come: look at `len`."""
        self.has_read()
        out: list[bytes] = []
        size = 0
        while self._items and size < READ_SIZE and self._gathering is None:
            item = self._items[0]
            if isinstance(item, bytes):
                self._items.popleft()
                self.messages_bytes -= len(item)
                self._absent.pop(id(item), None)
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
        if not self._items or self._gathering is not None or self._blocked or self._asked is not None:
            self.filled.clear()
        self._taken.set()
        return out

    def select(self, block: Block) -> Indices:
        """The session's rows of a block."""
        return self._matcher.select(block, self._router.groups_of(block.node))

    def committed(self) -> None:
        """More of the log is safe, or nothing is waited for any more."""
        if self._items:
            self._fill()

    def _fill(self) -> None:
        if self._gathering is None and self._asked is None:
            self.filled.set()

    def _fall_back(self, offset: int) -> None:
        """From this entry on it reads the log."""
        stretch = _Stretch(offset, offset + 1)
        self._items.append(stretch)
        self._stretches.append(stretch)
        self._lagging.add(self)

    def _divide(self, offset: int) -> None:
        """While it is gathered what is read first: what was told so far comes before what comes into the log now. If a ring begins, or the
        cursor is led on by what was told."""
        before = self._gathering_last
        if before is not None and self._items[-1] is not before:
            before.end = offset
            after = _Stretch(offset, offset, floors=before.floors, number=before.number, absences=before.absences, resumed=True)
            self._gathering_last = after
            self._items.append(after)
            self._stretches.append(after)

    def _must_wait(self, mark: Mark) -> bool:
        if not self.waits_for_log or mark.offset < self._log.committed:
            self._blocked_since = None
            return False
        now = time.monotonic()
        if self._blocked_since is None:
            self._blocked_since = now
        return now - self._blocked_since < MARK_WAIT

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
        self._blocked = False
        out: list[bytes] = []
        for node, epoch, message in self._in_order(stretch.before + stretch.notices + self._missed_so_far(stretch)):
            out += self._due(stretch, node, epoch)
            out.append(message)
        stretch.before.clear()
        stretch.notices.clear()
        page = self._next_page(stretch) if stretch.start < stretch.end else None
        entries, start = ([], 0) if page is None else (page.entries, stretch.start)
        parts: list[tuple[Block, Indices]] = []
        for entry in entries:
            if entry.offset < start:
                continue  # retention took it while it was read: it is among what was missed
            if entry.offset >= stretch.end:
                stretch.start = stretch.end
                break
            if isinstance(entry, Mark) and self._must_wait(entry):
                stretch.start = entry.offset
                self._blocked = True
                break
            due = self._due(stretch, entry.node, entry.epoch)
            if due:
                out += self._messages(parts)
                parts = []
                out += due
            if isinstance(entry, Mark):
                out += self._messages(parts)
                parts = []
                out += self._read_mark(stretch, entry)
            elif len(entry) and entry.offset >= stretch.floors.get(entry.node, 0):
                rows = self.select(entry)
                if len(rows):
                    parts.append((entry, rows))
                self._delivered[entry.node] = (entry.epoch, entry.end, entry.unix_ns(len(entry) - 1))
            stretch.start = entry.offset + 1
        else:
            stretch.start = max(stretch.start, 0 if page is None else page.following)
        out += self._messages(parts)
        for entry in entries:
            if isinstance(entry, Block):
                entry.trim()
        if self._progress_due:
            self._progress_due = False
            number = max(min(stretch.start, stretch.end), stretch.number)
            out.append(progress(self._read_so_far(stretch), number, self._log.log_id, self.stream_id))
        if stretch.start >= stretch.end:
            self._items.popleft()
            self._stretches.popleft()
            self._delivered.clear()  # behind it may stand messages that tell of later epochs
            if not self._stretches or self._stretches[0].absences is not stretch.absences:
                out += (message for _, _, message in self._in_order(stretch.absences))
            if not self._stretches:
                self._lagging.discard(self)
        self.prune(self._log.end)
        return out

    def _due(self, stretch: _Stretch, node: str, epoch: int) -> list[bytes]:
        """The absences that are to be told before anything of an epoch: its own, and those of the epochs before."""
        self._forget_delivered(node, epoch)
        if not stretch.absences:
            return []
        epochs = list(self._log.ends(node))
        later = epochs[epochs.index(epoch) + 1 :] if epoch in epochs else []
        due = [each for each in stretch.absences if each[0] == node and each[1] not in later]
        stretch.absences[:] = [each for each in stretch.absences if each not in due]
        return [message for _, _, message in self._in_order(due)]

    def _forget_delivered(self, node: str, epoch: int) -> None:
        """Something is told of an epoch: progress says nothing of another one any more, as a cursor does not go back."""
        delivered = self._delivered.get(node)
        if delivered is not None and delivered[0] != epoch:
            del self._delivered[node]

    @staticmethod
    def _missed_so_far(stretch: _Stretch, node: str = "") -> list[Notice]:
        """Gaps for the rows of a node, or of all, that the log evicted, and that are not among the notices yet."""
        reason = monitor_pb2.GAP_REASON_LOG if stretch.resumed else monitor_pb2.GAP_REASON_SUBSCRIBER
        places = [place for place in stretch.missed if node in {"", place[0]}]
        return [(*place, gap_of(stretch.missed.pop(place), *place, reason)) for place in places]

    def _in_order(self, notices: list[Notice]) -> list[Notice]:
        """Of each node by its epochs: a cursor does not go back."""
        epochs = {node: list(self._log.ends(node)) for node, _, _ in notices}
        return sorted(notices, key=lambda each: epochs[each[0]].index(each[1]) if each[1] in epochs[each[0]] else -1)

    def _next_page(self, stretch: _Stretch) -> Page | None:
        """What comes next of a stretch; None while the log's disk is asked for it."""
        if self._asked is not None:
            return None
        page, self._page = self._page, None
        if page is None or page.following <= stretch.start:  # or retention took all of it meanwhile
            found = self._log.fetch(stretch.start, READ_SIZE)
            if isinstance(found, Page):
                return found
            self._asked = found
            found.add_done_callback(self._answered)
            return None
        return page

    def _answered(self, answer: asyncio.Future[Page]) -> None:
        if self._asked is answer and not answer.cancelled():
            self._asked = None
            self._page = answer.result()
            self._fill()

    def _read_so_far(self, stretch: _Stretch) -> Iterator[tuple[str, int, int, int]]:
        """Of the nodes that it watches now, no further than they are complete themselves: losses may stand behind the records around. Not
        of those where something is still to be told that belongs before that."""
        nodes = set(self._matcher.nodes()) - {node for node, _, _ in stretch.absences} - set(self._absent.values())
        for node, (epoch, position, time_ns) in self._delivered.items():
            if node in nodes:
                whole = self._complete.get(node)
                if whole is None or whole[0] != epoch:
                    whole = epoch, position, time_ns
                yield node, epoch, min(position, whole[1]), min(time_ns, whole[2])

    def _messages(self, parts: list[tuple[Block, Indices]]) -> list[bytes]:
        out: list[bytes] = []
        for _, run in itertools.groupby(parts, key=lambda part: part[0].source):
            out += self._encoder.notifications(list(run))
        return out

    def _read_mark(self, stretch: _Stretch, mark: Mark) -> list[bytes]:
        if number_of(mark) <= stretch.number or mark.offset < stretch.floors.get(mark.node, 0):
            return []
        message = told(mark, self._matcher, self._log.log_id)
        out = [] if message is None else [message]
        if stretch.resumed and mark.rebooted:
            message = self._on_rebooted(mark)
            out += [] if message is None else [message]
        return out


def missed_rows(block: Block, rows: Indices) -> Missed:
    """What is missed if these rows of a block are."""
    return Missed(
        int(block.positions[rows[0]]),
        block.end,
        block.unix_ns(int(rows[0])),
        block.unix_ns(int(rows[-1])),
        count_types(block.column("type")[rows]),
    )


def count_types(types: npt.NDArray[np.uint8]) -> dict[int, int]:
    """Event type -> how many."""
    kinds, counts = np.unique(types, return_counts=True)
    return dict(zip(kinds.tolist(), counts.tolist(), strict=True))


def gap_of(missed: Missed, node: str, epoch: int, reason: monitor_pb2.GapReason.ValueType) -> bytes:
    """The notice of what the log has dropped."""
    return gap(
        node,
        reason,
        epoch,
        positions=(missed.first, missed.end),
        times=(missed.first_time, missed.end_time),
        counts=missed.counts,
    )
