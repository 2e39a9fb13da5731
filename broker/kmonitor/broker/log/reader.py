# SPDX-License-Identifier: Apache-2.0
"""The log's database as it is read: entries that are no longer in memory. A thread reads, so that nobody else waits for the disk."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import queue
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmonitor.broker.log import Entry, Page
from kmonitor.broker.log.rows import Row, entry_of, ordered, signed, stand_in
from kmonitor.wire.errors import BadRecordError

logger = logging.getLogger(__name__)

KEPT_BYTES = 8 << 20
"""Of entries that were read, kept for the next who reads them: they may be encoded already."""

_OF_EPOCH = "SELECT offset FROM entries WHERE node = ? AND epoch = ? AND offset >= ? AND"

_PAGE_ROWS = 4096
_ROW_BYTES = 1024
"""That an entry takes in memory beside its data, about."""

_PAGE_END = f"""SELECT max(offset) FROM
    (SELECT offset, sum(bytes) OVER (ORDER BY offset) AS reach, bytes FROM
    (SELECT offset, length(data) + {_ROW_BYTES} AS bytes FROM entries WHERE offset >= ? AND offset < ? ORDER BY offset LIMIT {_PAGE_ROWS}))
    WHERE reach <= ? OR reach = bytes"""
_PAGE = """SELECT json_group_array(json_array(offset, kind, node, boot_id, epoch, position, "end", boottime_to_unix_ns, reach, last,
    time_ns, logged_ns, checksum, hex(data))) FROM entries WHERE offset >= ? AND offset <= ?"""
"""All rows in one step. For each step a thread gives the interpreter away, and beside a busy event loop it comes back late."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the database a node's epoch gets past a position."""

    passed: int | None
    """Offset of the last entry that does not."""
    behind: int | None
    """Offset of the first one that does."""


class Reader:
    """Never waits for the writer. `ask` has its thread do something; all other methods may be called from any thread, and wait."""

    def __init__(self, path: Path, connection: sqlite3.Connection, on_end: Callable[[], None]) -> None:
        """`on_end` is called on the running event loop when the thread has closed the connection, after `stop`."""
        self._path = path
        self._connection = connection
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        """Around all that follows."""
        self._kept: OrderedDict[int, Entry] = OrderedDict()
        self._kept_bytes = 0
        self._damaged: set[int] = set()
        self._asked: queue.SimpleQueue[tuple[Callable[[], Any], Callable[[Any], None]] | None] = queue.SimpleQueue()
        # A daemon: a disk that does not answer must not keep the broker from ending.
        self._thread = threading.Thread(target=self._run, name="kmonitor-log-reader", daemon=True)
        self._thread.start()

    def ask(self, call: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Do `call` in the thread, one after the other, and `then` with what it returned on the event loop."""
        self._asked.put((call, then))

    def stop(self) -> None:
        """End, and give the connection back."""
        self._asked.put(None)

    def join(self) -> None:
        """After `on_end`: until the thread is gone, which is at once."""
        self._thread.join()

    def page(self, offset: int, until: int, max_bytes: int) -> tuple[Page, sqlite3.Error | None]:
        """Entries from `offset` on, and below `until`: about `max_bytes`, one at least. And why no more, if the file cannot be read."""
        with self._lock:
            try:
                rows, following = self._rows(offset, until, max_bytes)
            except (sqlite3.Error, ValueError):
                return self._page_by_rows(offset, until, max_bytes)  # what is before the damage can be read
            return Page([entry for row in rows if (entry := self._entry(row)) is not None], following), None

    def entries(self, offset: int, until: int) -> Generator[Entry, None, None]:
        """Those from `offset` on, and below `until`. A damaged one is told as a mark. Raises sqlite3.Error if the file cannot be read."""
        rows = self._connection.execute("SELECT * FROM entries WHERE offset >= ? AND offset < ? ORDER BY offset", (offset, until))
        try:
            for row in rows:
                entry = self._entry(row)
                if entry is not None:
                    yield entry
        finally:
            rows.close()  # who stops reading early must not hold up the copying of the log in front

    def places(self, wanted: Sequence[tuple[str, int, int]], oldest: int) -> tuple[list[Place], sqlite3.Error | None]:
        """Of each (node, epoch, position), among the entries from `oldest` on."""
        found: list[Place] = []
        try:
            with self._lock:
                for node, epoch, position in wanted:
                    passed = self._passed(node, epoch, position, oldest)
                    behind = self._behind(node, epoch, position, oldest) if passed is None else None
                    found.append(Place(passed, behind))
        except sqlite3.Error as error:
            return found, error
        return found, None

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            call, then = asked
            found = call()
            try:
                self._loop.call_soon_threadsafe(then, found)
            except RuntimeError:  # the event loop was closed before the log was
                break
            del asked, call, then, found  # while nobody asks, they would keep what was read
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._on_end)

    def _rows(self, offset: int, until: int, max_bytes: int) -> tuple[list[Row], int]:
        """The rows of a page, and the offset behind it."""
        (last,) = self._connection.execute(_PAGE_END, (offset, until, max_bytes)).fetchone()
        if last is None:
            return [], until
        (text,) = self._connection.execute(_PAGE, (offset, last)).fetchone()
        rows = [(*row[:-1], bytes.fromhex(row[-1])) for row in json.loads(text)]
        return sorted(rows, key=lambda row: int(row[0])), last + 1

    def _page_by_rows(self, offset: int, until: int, max_bytes: int) -> tuple[Page, sqlite3.Error | None]:
        found: list[Entry] = []
        size, following = 0, offset
        try:
            with contextlib.closing(self.entries(offset, until)) as entries:
                for entry in entries:
                    if found and size + entry.size > max_bytes:
                        return Page(found, following), None
                    found.append(entry)
                    size += entry.size
                    following = entry.offset + 1
        except sqlite3.Error as error:
            return Page(found, following), error
        return Page(found, until), None

    def _passed(self, node: str, epoch: int, position: int, oldest: int) -> int | None:
        """Offset of the last entry, from `oldest` on, up to which the epoch reaches no further than `position`; None if there is none."""
        if position < 0:
            return None
        return self._first(
            f"{_OF_EPOCH} reach <= ? ORDER BY reach DESC, offset DESC LIMIT 1", (node, signed(epoch), oldest, ordered(position))
        )

    def _behind(self, node: str, epoch: int, position: int, oldest: int) -> int | None:
        """Offset of the first entry, from `oldest` on, that reaches further than `position`; None if there is none."""
        # Behind -1 there are also marks at position 0.
        than, bound = (">", position) if position >= 0 else (">=", 0)
        query = f"{_OF_EPOCH} reach {than} ? ORDER BY reach, offset LIMIT 1"
        return self._first(query, (node, signed(epoch), oldest, ordered(bound)))

    def _first(self, query: str, values: Row) -> int | None:
        found = self._connection.execute(query, values).fetchone()
        return None if found is None else int(found[0])

    def _entry(self, row: Row) -> Entry | None:
        entry = self._kept.get(row[0])
        if entry is not None:
            self._kept.move_to_end(entry.offset)
            return entry
        try:
            entry = entry_of(row)
        except (BadRecordError, ValueError, TypeError) as error:
            if row[0] not in self._damaged:
                self._damaged.add(row[0])
                logger.warning("the log %s: entry %d is damaged, and told as missing: %s", self._path, row[0], error)
            entry = stand_in(row)
        if entry is not None:
            self._keep(entry)
        return entry

    def _keep(self, entry: Entry) -> None:
        self._kept[entry.offset] = entry
        self._kept_bytes += entry.size
        while self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= self._kept.popitem(last=False)[1].size
