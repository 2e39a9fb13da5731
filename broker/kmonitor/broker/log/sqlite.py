# SPDX-License-Identifier: Apache-2.0
"""The log in an SQLite file: what is committed outlives the broker, and a loss of power."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import sqlite3
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from kmonitor.broker.block import Block
from kmonitor.broker.log import End, Entry
from kmonitor.broker.log.database import open_database
from kmonitor.broker.log.ends import Ends, times_of
from kmonitor.broker.log.reader import Reader
from kmonitor.broker.log.writer import Add, Delete, Eviction, Flush, Forget, Next, Order, Outcome, Put, Writer
from kmonitor.broker.mark import Mark, MarkKind

logger = logging.getLogger(__name__)

DEFAULT_FILE_BYTES = 1 << 30
TAIL_BYTES = 16 << 20
"""Of the newest entries, kept in memory too."""
BATCH_BYTES = 8 << 20
BATCH_ORDERS = 4096
"""One transaction has at most so much: a lot is written in several."""
GROUP_S = 0.005
"""So long what comes waits for more, before it is written: whoever it is for is served first, and the disk is not asked for each block."""
RETRY_S = 1.0
SLOW_S = 10.0
"""A transaction that takes longer is trouble, too."""
CLOSE_S = 5.0
"""For the disk to answer while the log is closed."""


class SqliteLog:
    """See EventLog. The event loop's thread decides all; a thread of its own writes one batch after the other, and answers.

    While a batch is written the next one gathers: the more comes, the larger the transactions. What is appended is handed over at the end
    of the event loop's turn, so that it is routed before the writer takes the interpreter for it.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int = DEFAULT_FILE_BYTES, max_age_s: float | None = None) -> None:
        """Open the file, or make it; on a running event loop. Raises LogFileError.

        `max_bytes`: of the file, about, which does not shrink. There are some 30 MB more of the log in front of it. `max_age_s` counts
        from when an entry was written, by the broker's clock.
        """
        self.on_evict: Callable[[int], None] | None = None
        self.on_commit: Callable[[int], None] | None = None
        self.on_trouble: Callable[[str], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._ends = Ends(self._forget)
        opened = open_database(Path(path), self._ends)
        self._path = opened.path
        self._lock = opened.lock
        self._reader = Reader(opened.path, opened.reading)
        self._id = opened.log_id
        self._values: dict[str, dict[str, bytes]] | None = opened.values
        self._oldest = opened.oldest
        self._end = self._committed = self._tail_start = opened.end
        self._tail: dict[int, Entry] = {}
        """The entries from `_tail_start` on. Those below are in the database."""
        self._tail_bytes = 0
        self._waiting: list[Order] = []
        """In order, behind those of `_flying`."""
        self._flying: list[Order] = []
        """What the writer has."""
        self._at_work = False
        """The writer has something: it may be an empty batch."""
        self._busy = False
        """Something will call `_hand_over`: the event loop, the writer's answer, or the timer."""
        self._delivering = False
        """An entry is among what waits: those whom it is for are being served."""
        self._group: asyncio.TimerHandle | None = None
        """When what waits is handed over."""
        self._timer: asyncio.TimerHandle | None = None
        """For the next try; or while the writer is at work, for when that takes too long."""
        self._given_up: dict[tuple[str, int], int] = {}
        """(node, epoch) -> position, until the writer has said whether it has written what it had of that."""
        self._trouble = ""
        """Why nothing can be written."""
        self._damage = ""
        """Why something cannot be read."""
        self._told = ""
        self._answered = asyncio.Event()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._closing = self._closed = False
        self._writer = Writer(
            opened.path,
            opened.writing,
            max_bytes=max_bytes,
            max_age_s=max_age_s,
            on_outcome=self._outcome,
            on_end=self._writer_ended,
        )
        self._tick_s = None if max_age_s is None else min(max(max_age_s / 16, 0.05), 60.0)
        self._ticker: asyncio.TimerHandle | None = None
        self._tick()

    @property
    def log_id(self) -> int:
        return self._id

    @property
    def durable(self) -> bool:
        return True

    @property
    def oldest(self) -> int:
        return self._oldest

    @property
    def end(self) -> int:
        return self._end

    @property
    def committed(self) -> int:
        return self._committed

    def append(self, entry: Entry) -> int:
        offset = entry.offset = self._end
        self._end = offset + 1
        self._tail[offset] = entry
        self._tail_bytes += entry.size
        self._order(Add(entry, self._ends.advance(entry)))
        return offset

    def read(self, offset: int, max_bytes: int) -> list[Entry]:
        found: list[Entry] = []
        size = 0
        with contextlib.closing(self._from(max(offset, self._oldest))) as entries:
            for entry in entries:
                if found and size + entry.size > max_bytes:
                    break
                found.append(entry)
                size += entry.size
        return found

    def offset_behind(self, node: str, epoch: int, position: int) -> int | None:
        end = self._ends.get(node, epoch)
        if end is None:
            return None
        if position >= end.position:
            return end.offset + 1
        if end.dropped is not None and position < end.dropped.last:
            return -1
        passed = behind = None  # among what may not be in the database yet; all of that lies behind what is
        for order in itertools.chain(self._flying, self._waiting):
            if isinstance(order, Add) and order.entry.epoch == epoch and order.entry.node == node:
                if order.reach > position:
                    behind = order.entry.offset
                    break
                passed = order.entry.offset
        try:
            if passed is None:
                passed = self._reader.passed(node, epoch, position, self._oldest)
            if passed is not None:
                return passed + 1
            if end.dropped is not None:
                return self._oldest  # all of the node that is still there lies behind what was dropped
            found = self._reader.behind(node, epoch, position, self._oldest)
        except sqlite3.Error as error:
            self._cannot_read(error)
            return -1
        return next(offset for offset in (found, behind, end.offset + 1) if offset is not None)

    def ends(self, node: str) -> dict[int, End]:
        return self._ends.of(node)

    def nodes(self) -> list[str]:
        return self._ends.nodes()

    def forget(self, node: str) -> None:
        self._ends.forget(node)

    def put(self, space: str, key: str, value: bytes | None) -> None:
        if self._values is not None and value is None:
            self._values.get(space, {}).pop(key, None)
        elif self._values is not None and value is not None:
            self._values.setdefault(space, {})[key] = value
        self._order(Put(space, key, value))

    def values(self, space: str) -> dict[str, bytes]:
        assert self._values is not None, "forget_values was called"
        return dict(self._values.get(space, {}))

    def forget_values(self) -> None:
        self._values = None

    def give_up(self, node: str, epoch: int, position: int) -> None:
        if not self._given_up:
            self._loop.call_soon(self._give_up)  # one pass over what waits, for all nodes
        self._given_up[node, epoch] = max(position, self._given_up.get((node, epoch), 0))

    async def flush(self) -> None:
        if self._closing or not (self._waiting or self._flying):
            return
        done: asyncio.Future[None] = self._loop.create_future()
        self._order(Flush(done))
        await done

    async def close(self) -> None:
        if self._closing:
            return
        self._order(Next(self._end))
        self._closing = True
        if self._trouble:
            self._hand_over()  # one more try, at once
        with contextlib.suppress(TimeoutError):
            while self._waiting or self._at_work:
                self._answered.clear()
                await asyncio.wait_for(self._answered.wait(), CLOSE_S)
                if self._trouble:
                    break
        self._closed = True
        self._say_unwritten()
        for timer in (self._group, self._timer, self._ticker):
            if timer is not None:
                timer.cancel()
        self._release(self._flying + self._waiting)
        self._reader.close()
        self._writer.stop()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._ended), 0 if self._at_work else CLOSE_S)

    def _writer_ended(self) -> None:
        self._writer.join()
        os.close(self._lock)
        self._ended.set_result(None)

    # -- writing

    def _order(self, order: Order) -> None:
        self._waiting.append(order)
        self._delivering |= isinstance(order, Add)
        # What was registered is answered soon, and then it has to be known: it does not wait for blocks to gather.
        soon = not self._delivering or isinstance(order, Flush | Next)
        if not self._busy:
            self._busy = True
            self._group = self._loop.call_later(0 if soon else GROUP_S, self._hand_over)
        elif soon and self._group is not None:
            self._group.cancel()
            self._group = self._loop.call_later(0, self._hand_over)

    def _forget(self, node: str, epoch: int) -> None:
        self._order(Forget(node, epoch))  # ahead of the entry whose epoch takes its place

    def _hand_over(self) -> None:
        """Give the writer what waits, or the first part of a lot. Nothing is good too: it looks after retention."""
        if self._group is not None:
            self._group.cancel()
            self._group = None
        if self._at_work or self._closed:
            return
        count = size = 0
        for order in self._waiting:
            size += order.entry.size if isinstance(order, Add) else 0
            # Not between a block and what it has caused: both are committed, or none.
            if count and isinstance(order, Add) and (size > BATCH_BYTES or count >= BATCH_ORDERS):
                break
            count += 1
        self._flying, self._waiting = self._waiting[:count], self._waiting[count:]
        self._delivering = bool(self._waiting)
        self._at_work = True
        self._set_timer(SLOW_S, self._slow)
        self._writer.submit(self._flying)

    def _outcome(self, outcome: Outcome) -> None:
        """The writer's answer."""
        if self._closed:
            return
        self._at_work = False
        batch, self._flying = self._flying, []
        self._trouble = outcome.error
        if outcome.error:
            waiting = batch + self._waiting
            self._waiting = [order for order in waiting if not isinstance(order, Flush)]
            self._set_timer(RETRY_S, self._hand_over)
            self._release(waiting)
        else:
            self._set_timer(None)
            self._release(batch)
        self._tell()
        self._give_up()
        self._commit()
        if outcome.eviction is not None and not self._closing:
            self._evict(outcome.eviction)
        if not outcome.error:
            self._busy = bool(self._waiting)
            if self._waiting:
                urged = len(batch) >= BATCH_ORDERS // 2 or any(isinstance(order, Flush | Next) for order in self._waiting)
                if urged or not self._delivering:
                    self._hand_over()
                else:
                    self._group = self._loop.call_later(GROUP_S, self._hand_over)
        self._answered.set()

    def _commit(self) -> None:
        """See how far it is committed."""
        unwritten = (order.entry.offset for order in itertools.chain(self._flying, self._waiting) if isinstance(order, Add))
        committed = next(unwritten, self._end)
        while self._tail_bytes > TAIL_BYTES and self._tail_start < committed:
            self._leave_tail(self._tail_start + 1)
        if committed > self._committed:
            self._committed = committed
            if self.on_commit is not None:
                self.on_commit(committed)

    def _evict(self, eviction: Eviction) -> None:
        if self.on_evict is not None:
            self.on_evict(eviction.until)
        self._oldest = eviction.until
        for (node, epoch), dropped in eviction.dropped.items():
            self._ends.drop(node, epoch, dropped)
        self._leave_tail(eviction.until)
        # Ahead of all that waits, or the file would grow by that first.
        self._order(Delete(eviction.until))
        self._waiting.insert(0, self._waiting.pop())

    def _give_up(self) -> None:
        """Make one mark of what waits in vain, for each node and epoch."""
        found: dict[tuple[str, int], list[int]] = {}
        for at, order in enumerate(self._waiting if self._given_up else ()):
            if isinstance(order, Add):
                entry = order.entry
                may_go = isinstance(entry, Block) or entry.kind == MarkKind.UNLOGGED
                if may_go and entry.end <= self._given_up.get((entry.node, entry.epoch), -1):
                    found.setdefault((entry.node, entry.epoch), []).append(at)
        gone: set[int] = set()
        for places in found.values():
            adds = [order for at in places if isinstance(order := self._waiting[at], Add)]
            if len(adds) == 1 and isinstance(adds[0].entry, Mark):
                continue
            # In the place of the last: who has read up to the middle of them must come upon it.
            mark = _unlogged([add.entry for add in adds])
            self._waiting[places[-1]] = Add(mark, adds[-1].reach)
            gone.update(places[:-1])
            self._tail_bytes += mark.size - sum(self._tail.pop(add.entry.offset).size for add in adds)
            self._tail[mark.offset] = mark
        if gone:
            self._waiting = [order for at, order in enumerate(self._waiting) if at not in gone]
        if not self._at_work:
            self._given_up.clear()
        self._commit()

    def _set_timer(self, seconds: float | None, call: Callable[[], None] = lambda: None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self._loop.call_later(seconds, call)

    def _leave_tail(self, until: int) -> None:
        for offset in range(self._tail_start, until):
            entry = self._tail.pop(offset, None)
            self._tail_bytes -= 0 if entry is None else entry.size
        self._tail_start = max(self._tail_start, until)

    def _tick(self) -> None:
        """Nothing may come for long, and what is there grows old."""
        if self._tick_s is not None:
            if not self._busy:
                self._busy = True
                self._hand_over()
            self._ticker = self._loop.call_later(self._tick_s, self._tick)

    @staticmethod
    def _release(orders: list[Order]) -> None:
        for order in orders:
            if isinstance(order, Flush) and not order.done.done():
                order.done.set_result(None)

    # -- reading

    def _from(self, offset: int) -> Generator[Entry, None, None]:
        if offset < self._tail_start:
            following = offset
            try:
                for entry in self._reader.entries(offset, self._tail_start):
                    following = entry.offset + 1
                    yield entry
            except sqlite3.Error as error:
                self._cannot_read(error)
                yield from self._unreadable(following)
        for at in range(max(offset, self._tail_start), self._end):
            entry_at = self._tail.get(at)  # some offsets are left out
            if entry_at is not None:
                yield entry_at

    def _unreadable(self, offset: int) -> Iterator[Mark]:
        """What is told instead of all from an offset up to the tail: anything of any node may be missing there."""
        first_behind: dict[tuple[str, int], int] = {}
        for entry in self._tail.values():
            first_behind.setdefault((entry.node, entry.epoch), entry.position)
        for node, epoch, end in self._ends.all():
            if end.offset >= offset:
                begin = 0 if end.dropped is None else end.dropped.end
                until = first_behind.get((node, epoch), end.position)
                mark = Mark(MarkKind.UNLOGGED, node, "", epoch, min(begin, until), until, 0, 0)
                mark.offset = offset
                offset = min(offset + 1, self._tail_start - 1)
                yield mark

    # -- trouble

    def _slow(self) -> None:
        self._trouble = f"the disk of {self._path} has not answered for {SLOW_S:g} s"
        self._tell()

    def _cannot_read(self, error: sqlite3.Error) -> None:
        self._damage = (
            f"{self._path} cannot be read: {error}: stop the broker and move it away; until then what cannot be read is told as missing"
        )
        self._tell()

    def _tell(self) -> None:
        """Once when it begins, not when only its reason changes, and once when it ends."""
        kind, line = "", ""
        if self._trouble:
            kind, line = "write", f"the log cannot be written: {self._trouble}; acknowledgements wait; events go on live"
        elif self._damage:
            kind, line = "read", f"the log is damaged: {self._damage}"
        if kind != self._told:
            self._told = kind
            if self.on_trouble is not None:
                self.on_trouble(line)

    def _say_unwritten(self) -> None:
        orders = self._flying + self._waiting
        entries = [order.entry for order in orders if isinstance(order, Add)]
        values = sum(isinstance(order, Put) for order in orders)
        if entries or values:
            nodes = sorted({entry.node for entry in entries})
            what = f"{len(entries)} blocks and marks of {len(nodes)} nodes ({', '.join(nodes[:5])}), {values} values"
            why = self._trouble or f"the disk has not answered for {CLOSE_S:g} s"
            logger.error("the log %s was closed with something not written: %s: %s", self._path, what, why)


def _unlogged(entries: list[Entry]) -> Mark:
    """One mark for all of these, of one node and epoch, with the offset of the last."""
    times = [time_ns for entry in entries for time_ns in times_of(entry)]
    last = entries[-1]
    position, end = min(entry.position for entry in entries), max(entry.end for entry in entries)
    mark = Mark(MarkKind.UNLOGGED, last.node, last.boot_id, last.epoch, position, end, min(times, default=0), max(times, default=0))
    mark.offset = last.offset
    return mark
