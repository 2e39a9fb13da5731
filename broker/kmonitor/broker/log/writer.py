# SPDX-License-Identifier: Apache-2.0
"""The thread that writes the log's database: one transaction a batch, and what retention is to take next."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kmonitor.broker.log import Dropped, Entry
from kmonitor.broker.log.database import is_damaged, is_full
from kmonitor.broker.log.rows import Row, dropped_from, row_of, signed, unsigned

logger = logging.getLogger(__name__)

ROW_BYTES = 192
"""That a row takes in the file beside its data, about, its place in the index included."""
EVICT_ROWS = 8192
EVICT_BYTES = 16 << 20
"""Retention takes at most so much at once, to keep transactions short; it is more than a batch can bring."""

FRONT_MOST = 96 << 20
"""Bytes of the log in front of the database, which are copied into it at 8 MiB: a large transaction may make it several times that."""

_CHUNKS = (256, 32, 4, 1)
_CHUNK_BYTES = 1 << 20


class Add(NamedTuple):
    """Write an entry."""

    entry: Entry
    reach: int
    """The largest `end` of its node and epoch so far."""


class Put(NamedTuple):
    """Remember a value, or forget it."""

    space: str
    key: str
    value: bytes | None


class Forget(NamedTuple):
    """Forget an epoch's end."""

    node: str
    epoch: int


class Delete(NamedTuple):
    """Delete the entries below an offset; `ends` says then what was dropped."""

    until: int


class Next(NamedTuple):
    """Where offsets go on when the log is opened again."""

    offset: int


class Flush(NamedTuple):
    """Nothing to write: somebody waits until all before it is written, or cannot be."""

    done: asyncio.Future[None]


Order = Add | Put | Forget | Delete | Next | Flush


@dataclass(frozen=True, slots=True)
class Eviction:
    """What retention is to take: the entries below `until`, which is the first one that stays."""

    until: int
    dropped: dict[tuple[str, int], Dropped]
    """By node and epoch."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one batch."""

    error: str = ""
    """Why nothing of it was written, as part of a line; empty if all was."""
    eviction: Eviction | None = None


class Writer:
    """Writes one batch after the other, and says of each how it went. It keeps nothing: what failed has to be submitted again."""

    def __init__(
        self,
        path: Path,
        connection: sqlite3.Connection,
        *,
        max_bytes: int,
        max_age_s: float | None,
        on_outcome: Callable[[Outcome], None],
        on_end: Callable[[], None],
    ) -> None:
        """The callbacks are called on the running event loop. `connection` is closed at the end."""
        self._path = path
        self._connection = connection
        self._max_bytes = max_bytes
        self._max_age_ns = None if max_age_s is None else int(max_age_s * 1e9)
        self._on_outcome = on_outcome
        self._on_end = on_end
        (self._page,) = connection.execute("PRAGMA page_size").fetchone()
        self._loop = asyncio.get_running_loop()
        self._batches: queue.SimpleQueue[Sequence[Order] | None] = queue.SimpleQueue()
        self._evicting = False
        """An eviction was proposed, and its Delete is not committed yet."""
        self._grows = False
        """It was said that the log in front does."""
        # A daemon: a disk that does not answer must not keep the broker from ending.
        self._thread = threading.Thread(target=self._run, name="kmonitor-log", daemon=True)
        self._thread.start()

    def submit(self, batch: Sequence[Order]) -> None:
        """Write it, and look whether retention has something to do. One at a time; not to be changed before its outcome is there."""
        self._batches.put(batch)

    def stop(self) -> None:
        """End behind what was submitted."""
        self._batches.put(None)

    def join(self) -> None:
        """After `on_end`: until the thread is gone, which is at once."""
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop was closed before the log was
            while (batch := self._batches.get()) is not None:
                outcome = self._write(batch)
                self._loop.call_soon_threadsafe(self._on_outcome, outcome)
                del batch, outcome  # while nothing comes, it would keep the blocks
        with contextlib.suppress(sqlite3.Error):  # what is not copied from the log in front now is so when it is opened again
            self._connection.close()
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._on_end)

    def _write(self, batch: Sequence[Order]) -> Outcome:
        try:
            if batch:
                self._connection.execute("BEGIN IMMEDIATE")
                self._apply(batch)
                self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            return Outcome(self._explain(error))
        except Exception as error:  # a thread that ended in silence would stop all acknowledgements
            logger.exception("writing the log failed")
            self._roll_back()
            return Outcome(f"unforeseen {type(error).__name__}: {error}: please report it")
        if any(isinstance(order, Delete) for order in batch):
            self._evicting = False
        self._look_in_front()
        try:
            return Outcome(eviction=None if self._evicting else self._overdue())
        except sqlite3.Error as error:
            logger.warning("the log %s: retention failed: %s", self._path, error)
            return Outcome()

    def _look_in_front(self) -> None:
        """Say once that the log in front of the database cannot be copied into it: somebody else reads the file, and does not end."""
        try:
            size = self._path.with_name(self._path.name + "-wal").stat().st_size
        except OSError:
            return
        if size > FRONT_MOST and not self._grows:
            self._grows = True
            logger.warning(
                "%s-wal has %d MB, and grows: another program reads %s, and has not ended its transaction; end it",
                self._path, size >> 20, self._path,
            )  # fmt: skip
        elif size <= FRONT_MOST // 2 and self._grows:
            self._grows = False
            logger.warning("%s-wal is small again", self._path)

    def _roll_back(self) -> None:
        # SQLite has done it by itself after some errors.
        with contextlib.suppress(sqlite3.Error):
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def _explain(self, error: sqlite3.Error) -> str:
        if is_full(error, self._path):
            return f"disk full: make room for {self._path}"
        if is_damaged(error):
            return f"{self._path} is damaged ({error}): stop the broker and move it away"
        return f"{error} ({self._path})"

    def _apply(self, batch: Sequence[Order]) -> None:
        now_ns = time.time_ns()
        rows: list[Row] = []
        ends: dict[tuple[str, int], Row] = {}
        for order in batch:
            if isinstance(order, Add):
                entry = order.entry
                rows.append(row_of(entry, order.reach, now_ns))
                ends[entry.node, entry.epoch] = (entry.node, signed(entry.epoch), signed(order.reach), entry.offset)
            elif isinstance(order, Put):
                self._put(order)
            elif isinstance(order, Forget):
                self._insert_ends(ends)
                self._connection.execute("DELETE FROM ends WHERE node = ? AND epoch = ?", (order.node, signed(order.epoch)))
            elif isinstance(order, Delete):
                self._delete(order.until)
            elif isinstance(order, Next):
                self._connection.execute("INSERT OR REPLACE INTO meta VALUES ('next', ?)", (order.offset,))
        self._insert("INSERT INTO entries VALUES", rows)
        self._insert_ends(ends)

    def _put(self, order: Put) -> None:
        if order.value is None:
            self._connection.execute("DELETE FROM remembered WHERE space = ? AND key = ?", (order.space, order.key))
        else:
            self._connection.execute("INSERT OR REPLACE INTO remembered VALUES (?, ?, ?)", order)

    def _insert_ends(self, ends: dict[tuple[str, int], Row]) -> None:
        self._insert(
            "INSERT INTO ends (node, epoch, position, offset) VALUES",
            list(ends.values()),
            "ON CONFLICT (node, epoch) DO UPDATE SET position = excluded.position, offset = excluded.offset",
        )
        ends.clear()

    def _insert(self, head: str, rows: list[Row], tail: str = "") -> None:
        """Many rows a statement. Each statement gives the interpreter's lock away, and beside a busy event loop it comes back late."""
        at = 0
        for count in _CHUNKS:
            while len(rows) - at >= count:
                chunk = rows[at : at + count]
                if count > 1 and sum(len(row[-1]) for row in chunk if isinstance(row[-1], bytes)) > _CHUNK_BYTES:
                    break
                row = f"({', '.join('?' * len(chunk[0]))})"
                self._connection.execute(f"{head} {', '.join([row] * count)} {tail}", [value for row in chunk for value in row])
                at += count

    def _delete(self, until: int) -> None:
        # Of the columns beside a max() SQLite gives those of the row that has it.
        self._connection.execute(
            """UPDATE ends SET dropped_last = gone.last, dropped_end = gone."end", dropped_ns = gone.time_ns FROM
            (SELECT node, epoch, max(last) AS last, "end", time_ns FROM entries WHERE offset < ? GROUP BY node, epoch) AS gone
            WHERE ends.node = gone.node AND ends.epoch = gone.epoch AND gone.last IS NOT NULL""",
            (until,),
        )
        self._connection.execute("DELETE FROM entries WHERE offset < ?", (until,))

    def _overdue(self) -> Eviction | None:
        """What is too much or too old, oldest first; a bounded part of it if it is a lot. The newest entry stays."""
        (pages,) = self._connection.execute("SELECT (SELECT * FROM pragma_page_count) - (SELECT * FROM pragma_freelist_count)").fetchone()
        excess = pages * self._page - self._max_bytes
        horizon = 0 if self._max_age_ns is None else time.time_ns() - self._max_age_ns
        if excess <= 0:
            if self._max_age_ns is None:
                return None
            first = self._connection.execute("SELECT logged_ns FROM entries ORDER BY offset LIMIT 1").fetchone()
            if first is None or first[0] >= horizon:
                return None
        # Somewhat more than must be: not an eviction with each batch.
        target = min(excess + self._max_bytes // 64, EVICT_BYTES) if excess > 0 else 0
        # `before`: what is taken if this is the first that stays.
        oldest, until = self._connection.execute(
            """SELECT min(offset), coalesce(min(offset) FILTER (WHERE before >= :target AND logged_ns >= :horizon OR before >= :limit),
            max(offset)) FROM (SELECT offset, logged_ns, sum(bytes) OVER (ORDER BY offset) - bytes AS before FROM
            (SELECT offset, logged_ns, length(data) + :row AS bytes FROM entries ORDER BY offset LIMIT :rows))""",
            {"target": target, "horizon": horizon, "limit": EVICT_BYTES, "row": ROW_BYTES, "rows": EVICT_ROWS},
        ).fetchone()
        if oldest is None or oldest == until:
            return None
        found = self._connection.execute(
            'SELECT node, epoch, max(last), "end", time_ns FROM entries WHERE offset < ? GROUP BY node, epoch', (until,)
        )
        dropped = {
            (node, unsigned(epoch)): dropped_from(last, end, time_ns) for node, epoch, last, end, time_ns in found if last is not None
        }
        self._evicting = True
        return Eviction(until, dropped)
