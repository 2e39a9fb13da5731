# SPDX-License-Identifier: Apache-2.0
"""The log's database as the event loop's thread reads it: entries that are no longer in memory."""

from __future__ import annotations

import logging
import sqlite3
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from kmonitor.broker.log import Entry
from kmonitor.broker.log.rows import Row, entry_of, ordered, signed, stand_in
from kmonitor.wire.errors import BadRecordError

logger = logging.getLogger(__name__)

KEPT_BYTES = 8 << 20
"""Of entries that were read, kept for the next who reads them: they may be encoded already."""

_OF_EPOCH = "SELECT offset FROM entries WHERE node = ? AND epoch = ? AND offset >= ? AND"


class Reader:
    """Never waits for the writer. All methods raise sqlite3.Error if the file cannot be read."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection
        self._kept: OrderedDict[int, Entry] = OrderedDict()
        self._kept_bytes = 0
        self._damaged: set[int] = set()

    def close(self) -> None:
        """Give the connection back."""
        self._connection.close()

    def entries(self, offset: int, until: int) -> Iterator[Entry]:
        """Those from `offset` on, and below `until`. A damaged one is told as a mark."""
        rows = self._connection.execute("SELECT * FROM entries WHERE offset >= ? AND offset < ? ORDER BY offset", (offset, until))
        try:
            for row in rows:
                entry = self._kept.get(row[0])
                if entry is None:
                    entry = self._made(row)
                    if entry is None:
                        continue
                    self._keep(entry)
                else:
                    self._kept.move_to_end(entry.offset)
                yield entry
        finally:
            rows.close()  # who stops reading early must not hold up the copying of the log in front

    def passed(self, node: str, epoch: int, position: int, oldest: int) -> int | None:
        """Offset of the last entry, from `oldest` on, up to which the epoch reaches no further than `position`; None if there is none."""
        if position < 0:
            return None
        return self._first(
            f"{_OF_EPOCH} reach <= ? ORDER BY reach DESC, offset DESC LIMIT 1", (node, signed(epoch), oldest, ordered(position))
        )

    def behind(self, node: str, epoch: int, position: int, oldest: int) -> int | None:
        """Offset of the first entry, from `oldest` on, that reaches further than `position`; None if there is none."""
        # Behind -1 there are also marks at position 0.
        than, bound = (">", position) if position >= 0 else (">=", 0)
        query = f"{_OF_EPOCH} reach {than} ? ORDER BY reach, offset LIMIT 1"
        return self._first(query, (node, signed(epoch), oldest, ordered(bound)))

    def _first(self, query: str, values: Row) -> int | None:
        found = self._connection.execute(query, values).fetchone()
        return None if found is None else int(found[0])

    def _made(self, row: Row) -> Entry | None:
        try:
            return entry_of(row)
        except (BadRecordError, ValueError, TypeError) as error:
            if row[0] not in self._damaged:
                self._damaged.add(row[0])
                logger.warning("the log %s: entry %d is damaged, and told as missing: %s", self._path, row[0], error)
            return stand_in(row)

    def _keep(self, entry: Entry) -> None:
        self._kept[entry.offset] = entry
        self._kept_bytes += entry.size
        while self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= self._kept.popitem(last=False)[1].size
