# SPDX-License-Identifier: Apache-2.0
"""The log in an SQLite file: what is committed outlives the broker, and a loss of power."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from pathlib import Path

from kmonitor.broker.log import End, Entry, Page
from kmonitor.broker.log.database import open_database
from kmonitor.broker.log.ends import Ends, dropped_of
from kmonitor.broker.log.reader import Place, Reader
from kmonitor.broker.log.waiting import BATCH_ORDERS, Waiting
from kmonitor.broker.log.writer import Add, Delete, Eviction, Flush, Forget, Next, Order, Outcome, Put, Writer
from kmonitor.broker.mark import Mark, MarkKind

logger = logging.getLogger(__name__)

DEFAULT_FILE_BYTES = 1 << 30
TAIL_BYTES = 16 << 20
"""Of the newest entries, kept in memory too."""
GROUP_S = 0.005
"""So long what comes waits for more, before it is written: whoever it is for is served first, and the disk is not asked for each block."""
RETRY_S = 1.0
SLOW_S = 10.0
"""A transaction that takes longer is trouble, too."""
CLOSE_S = 5.0
"""For the disk to answer while the log is closed."""
EVICTED_BYTES = 1 << 20
"""So much of what retention takes is in memory at a time, to be told of."""
LOCATED = 1 << 16
"""Places that are known without asking the disk; the oldest are forgotten when there are more."""


class SqliteLog:
    """See EventLog. The event loop's thread decides all; a thread of its own writes one batch after the other, and answers; another one
    reads what is no longer in memory.

    While a batch is written the next one gathers: the more comes, the larger the transactions. What is appended is handed over at the end
    of the event loop's turn, so that it is routed before the writer takes the interpreter for it.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int = DEFAULT_FILE_BYTES, max_age_s: float | None = None) -> None:
        """Open the file, or make it; on a running event loop. Raises LogFileError.

        `max_bytes`: of the file, about, which does not shrink. There are some 30 MB more of the log in front of it. `max_age_s` counts
        from when an entry was written, by the broker's clock.
        """
        self.on_evict: Callable[[int], int | None] | None = None
        self.is_missed: Callable[[int], bool] | None = None
        self.on_commit: Callable[[int], None] | None = None
        self.on_trouble: Callable[[str], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._ends = Ends(self._forget)
        opened = open_database(Path(path), self._ends)
        self._path = opened.path
        self._lock = opened.lock
        self._ended: set[str] = set()
        """Of the threads: who has given all back."""
        self._both_ended = asyncio.Event()
        self._reader = Reader(opened.path, opened.reading, partial(self._thread_ended, "reader"))
        self._id = opened.log_id
        self._values: dict[str, dict[str, bytes]] | None = opened.values
        self._oldest = opened.oldest
        self._end = self._committed = self._tail_start = opened.end
        self._tail: dict[int, Entry] = {}
        """The entries from `_tail_start` on. Those below are in the database."""
        self._tail_bytes = 0
        self._waiting = Waiting((space, key) for space, values in opened.values.items() for key in values)
        self._located: dict[tuple[str, int, int], tuple[Place, int]] = {}
        """(node, epoch, position) -> its place, and below which offset that was looked for."""
        self._eviction: Eviction | None = None
        """What is being told of."""
        self._evicted: dict[int, Entry] = {}
        """Of it: what is told of next, without holes but for offsets that were left out."""
        self._batch: list[Order] = []
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
        self._closing = self._closed = False
        self._writer = Writer(
            opened.path,
            opened.writing,
            max_bytes=max_bytes,
            max_age_s=max_age_s,
            on_outcome=self._outcome,
            on_end=partial(self._thread_ended, "writer"),
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

    @property
    def values_waiting(self) -> int:
        """How many values, or that there is none any more, are still to be written."""
        return sum(isinstance(order, Put) for order in self._waiting)

    def append(self, entry: Entry) -> int:
        offset = entry.offset = self._end
        self._end = offset + 1
        self._tail[offset] = entry
        self._tail_bytes += entry.size
        self._order(Add(entry, self._ends.advance(entry)))
        return offset

    def fetch(self, offset: int, max_bytes: int) -> Page | asyncio.Future[Page]:
        offset, until = max(offset, self._oldest), self._tail_start
        if offset >= until:
            found = self.read(offset, max_bytes)
            return Page(found, found[-1].offset + 1 if found else self._end)
        answer: asyncio.Future[Page] = self._loop.create_future()
        self._reader.ask(partial(self._reader.page, offset, until, max_bytes), partial(self._came, answer, until))
        return answer

    def _came(self, answer: asyncio.Future[Page], until: int, found: tuple[Page, sqlite3.Error | None]) -> None:
        page, error = found
        if error is not None:
            self._cannot_read(error)
            page = Page([*page.entries, *self._unreadable(page.following, until)], until)
        if not answer.done():
            answer.set_result(page)

    def locate(self, places: Iterable[tuple[str, int, int]]) -> asyncio.Future[None] | None:
        wanted = [place for place in places if place not in self._located and self._lies_within(*place)]
        if not wanted:
            return None
        answer: asyncio.Future[None] = self._loop.create_future()
        committed = self._committed

        def came(found: tuple[list[Place], sqlite3.Error | None]) -> None:
            known, error = found
            if error is not None:
                self._cannot_read(error)
                known = [*known, *[Place(-2, None)] * (len(wanted) - len(known))]
            for place, at in zip(wanted, known, strict=True):
                self._located[place] = at, committed
            while len(self._located) > LOCATED:
                del self._located[next(iter(self._located))]
            if not answer.done():
                answer.set_result(None)

        self._reader.ask(partial(self._reader.places, wanted, self._oldest), came)
        return answer

    def _lies_within(self, node: str, epoch: int, position: int) -> bool:
        """Whether it takes the database to know where a position lies."""
        end = self._ends.get(node, epoch)
        return end is not None and position < end.position and (end.dropped is None or position >= end.dropped.last)

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
        for order in self._waiting:
            if isinstance(order, Add) and order.entry.epoch == epoch and order.entry.node == node:
                if order.reach > position:
                    behind = order.entry.offset
                    break
                passed = order.entry.offset
        if passed is not None:
            return passed + 1
        located = self._located.get((node, epoch, position))
        if located is None:
            found, error = self._reader.places([(node, epoch, position)], self._oldest)
            if error is not None:
                self._cannot_read(error)
                return -1
            located = found[0], self._committed
        place, searched = located
        if place.passed is not None:
            return place.passed + 1
        if end.dropped is not None:
            # All of the node that is still there lies behind what was dropped; if there is nothing of this epoch, more may have been.
            return min(self._oldest, end.offset + 1)
        if place.behind is None and searched < self._committed:
            return searched  # what has been written since was not looked at
        return next(offset for offset in (place.behind, behind, end.offset + 1) if offset is not None)

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
        if self._closing or not (self._waiting or self._at_work):
            return
        done: asyncio.Future[None] = self._loop.create_future()
        self._order(Flush(done))
        await done

    async def close(self) -> None:
        if self._closing:
            return
        if self._eviction is not None:
            self._waiting.put_first(Delete(self._oldest))  # so far it was told of
            self._eviction = None
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
        self._release(self._waiting)
        self._reader.stop()
        self._writer.stop()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._both_ended.wait(), 0 if self._at_work else CLOSE_S)

    def _thread_ended(self, name: str) -> None:
        (self._reader if name == "reader" else self._writer).join()
        self._ended.add(name)
        if name == "writer":
            os.close(self._lock)
        if len(self._ended) == 2:
            self._both_ended.set()

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
        self._batch = self._waiting.take()
        self._delivering = bool(self._waiting)
        self._at_work = True
        self._set_timer(SLOW_S, self._slow)
        self._writer.submit(self._batch)

    def _outcome(self, outcome: Outcome) -> None:
        """The writer's answer."""
        if self._closed:
            return
        self._at_work = False
        batch, self._batch = self._batch, []
        self._trouble = outcome.error
        if outcome.error:
            self._release(self._waiting)
            self._waiting.failed()
            self._set_timer(RETRY_S, self._hand_over)
        else:
            self._waiting.done()
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
                if len(batch) >= BATCH_ORDERS // 2 or not self._delivering or self._waiting.is_urgent:
                    self._hand_over()
                else:
                    self._group = self._loop.call_later(GROUP_S, self._hand_over)
        self._answered.set()

    def _commit(self) -> None:
        """See how far it is committed."""
        unwritten = self._waiting.first_unwritten()
        committed = self._end if unwritten is None else unwritten
        while self._tail_bytes > TAIL_BYTES and self._tail_start < committed:
            self._leave_tail(self._tail_start + 1)
        if committed > self._committed:
            self._committed = committed
            if self.on_commit is not None:
                self.on_commit(committed)

    def _evict(self, eviction: Eviction) -> None:
        """Tell of what is to go, a part at a time: it is read by the reader's thread, and others have their turn in between."""
        self._eviction = eviction
        if self.on_evict is None or not (self.is_missed is None or self.is_missed(eviction.until)):
            self._delete()
        elif self._oldest < eviction.until:
            page = self.fetch(self._oldest, EVICTED_BYTES)
            if isinstance(page, Page):
                self._tell_of_evicted(page.following, page.entries)
            else:
                page.add_done_callback(lambda done: self._tell_of_evicted(done.result().following, done.result().entries))
        else:
            self._delete()

    def _tell_of_evicted(self, until: int, entries: Iterable[Entry]) -> None:
        """All entries below `until` that are there."""
        eviction = self._eviction
        if eviction is None or self.on_evict is None:
            return
        until = min(until, eviction.until)
        self._evicted = {entry.offset: entry for entry in entries if self._oldest <= entry.offset < until}
        told = min(self.on_evict(until) or until, until) if self._evicted else until
        left, self._evicted = self._evicted, {}
        for entry in left.values():
            dropped = dropped_of(entry) if entry.offset < told else None
            if dropped is not None:
                self._ends.drop(entry.node, entry.epoch, dropped)
        self._oldest = max(self._oldest, told)
        self._leave_tail(self._oldest)
        if told < until:
            self._loop.call_soon(self._tell_of_evicted, until, [entry for entry in left.values() if entry.offset >= told])
        else:
            self._loop.call_soon(self._evict_on)

    def _evict_on(self) -> None:
        if self._eviction is not None:
            self._evict(self._eviction)

    def _delete(self) -> None:
        """All of it was told."""
        eviction, self._eviction = self._eviction, None
        assert eviction is not None
        self._oldest = max(self._oldest, eviction.until)
        for (node, epoch), dropped in eviction.dropped.items():
            self._ends.drop(node, epoch, dropped)
        self._leave_tail(self._oldest)
        # Ahead of all that waits, or the file would grow by that first.
        self._waiting.put_first(Delete(eviction.until))
        self._look_soon()

    def _give_up(self) -> None:
        """Make one mark of what waits in vain, for each node and epoch."""
        for (node, epoch), position in self._given_up.items():
            made = self._waiting.give_up(node, epoch, position)
            if made is not None:
                mark, entries = made
                self._tail_bytes += mark.size - sum(self._tail.pop(entry.offset).size for entry in entries)
                self._tail[mark.offset] = mark
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

    def _look_soon(self) -> None:
        if not self._busy:
            self._busy = True
            self._group = self._loop.call_later(0, self._hand_over)

    @staticmethod
    def _release(orders: Iterable[Order]) -> None:
        for order in orders:
            if isinstance(order, Flush) and not order.done.done():
                order.done.set_result(None)

    # -- reading

    def _from(self, offset: int) -> Generator[Entry, None, None]:
        if self._evicted:  # in `on_evict`: so far it is in memory
            yield from (entry for entry in self._evicted.values() if entry.offset >= offset)
            return
        while offset < self._tail_start:
            page, error = self._reader.page(offset, self._tail_start, EVICTED_BYTES)
            yield from page.entries
            offset = page.following
            if error is not None:
                self._cannot_read(error)
                yield from self._unreadable(offset, self._tail_start)
                break
        for at in range(max(offset, self._tail_start), self._end):
            entry_at = self._tail.get(at)  # some offsets are left out
            if entry_at is not None:
                yield entry_at

    def _unreadable(self, offset: int, until: int) -> Iterator[Mark]:
        """What is told instead of all between two offsets, up to the tail: anything of any node may be missing there."""
        first_behind: dict[tuple[str, int], int] = {}
        for entry in self._tail.values():
            first_behind.setdefault((entry.node, entry.epoch), entry.position)
        for node, epoch, end in self._ends.all():
            if end.offset >= offset:
                begin = 0 if end.dropped is None else end.dropped.end
                to = first_behind.get((node, epoch), end.position)
                mark = Mark(MarkKind.UNLOGGED, node, "", epoch, min(begin, to), to, 0, 0)
                mark.offset = offset
                offset = min(offset + 1, until - 1)
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
        orders = list(self._waiting)
        entries = [order.entry for order in orders if isinstance(order, Add)]
        values = self.values_waiting
        if entries or values:
            nodes = sorted({entry.node for entry in entries})
            what = f"{len(entries)} blocks and marks of {len(nodes)} nodes ({', '.join(nodes[:5])}), {values} values"
            why = self._trouble or f"the disk has not answered for {CLOSE_S:g} s"
            logger.error("the log %s was closed with something not written: %s: %s", self._path, what, why)
