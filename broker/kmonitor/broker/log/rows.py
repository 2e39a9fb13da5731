# SPDX-License-Identifier: Apache-2.0
"""Blocks and marks as rows of the log's database. The columns are those of `entries` in `database`.

SQLite's integers are signed: epochs, positions and ends lie there as two's complement. `reach` and `last` are compared in SQL, and lie
there less 2^63, which keeps their order.
"""

from __future__ import annotations

import zlib
from typing import Any

from kmonitor.broker.block import Block
from kmonitor.broker.log import Dropped, Entry
from kmonitor.broker.log.ends import dropped_of
from kmonitor.broker.mark import Mark, MarkKind
from kmonitor.wire.errors import BadRecordError

Row = tuple[Any, ...]

BLOCK = 0
"""`kind` of a block; a mark's is its MarkKind."""

_HALF = 1 << 63
_WHOLE = 1 << 64
_MASK = _WHOLE - 1


def signed(value: int) -> int:
    """An unsigned 64-bit number as two's complement."""
    return value - _WHOLE if value >= _HALF else value


def unsigned(value: int) -> int:
    """Back from `signed`."""
    return value & _MASK


def ordered(value: int) -> int:
    """An unsigned 64-bit number such that SQL compares it rightly."""
    return value - _HALF


def disordered(value: int) -> int:
    """Back from `ordered`."""
    return value + _HALF


def row_of(entry: Entry, reach: int, logged_ns: int) -> Row:
    """`reach`: the largest `end` of the node and epoch so far. `logged_ns`: now, Unix nanoseconds."""
    dropped = dropped_of(entry)
    if isinstance(entry, Block):
        kind, shift, data = BLOCK, entry.boottime_to_unix_ns, entry.data
    else:
        kind, shift, data = int(entry.kind), 0, entry.pack()
    last, time_ns = (None, 0) if dropped is None else (ordered(dropped.last), min(max(dropped.time_ns, -_HALF), _HALF - 1))
    # What its checksum covers begins with the offset and ends with the shift.
    head = (entry.offset, kind, entry.node, entry.boot_id, signed(entry.epoch), signed(entry.position), signed(entry.end), shift)
    return *head, ordered(reach), last, time_ns, logged_ns, _checksum(head, data), data


def entry_of(row: Row) -> Entry:
    """Back from `row_of`, with its offset. Raises BadRecordError or ValueError if the row is damaged."""
    head, data = row[:8], row[13]
    if not isinstance(data, bytes) or row[12] != _checksum(head, data):
        raise BadRecordError("its checksum is wrong")
    offset, kind, node, boot_id, epoch, position, end, shift = head
    entry: Entry
    if kind == BLOCK:
        entry = Block(node, unsigned(epoch), unsigned(position), data, shift, boot_id)
    else:
        entry = Mark.unpack(kind, node, boot_id, unsigned(epoch), unsigned(position), unsigned(end), data)
    entry.offset = offset
    return entry


def stand_in(row: Row) -> Mark | None:
    """What readers are told instead of a row that is damaged; None if not even its node can be made out."""
    offset, _, node, boot_id, epoch, position, end = row[:7]
    if not isinstance(node, str) or not all(isinstance(value, int) for value in (epoch, position, end)):
        return None
    time_ns = row[10] if isinstance(row[10], int) else 0
    mark = Mark(MarkKind.UNLOGGED, node, str(boot_id), unsigned(epoch), unsigned(position), unsigned(end), time_ns, time_ns)
    mark.offset = offset
    return mark


def dropped_from(last: int, end: int, time_ns: int) -> Dropped:
    """From the columns."""
    return Dropped(disordered(last), unsigned(end), time_ns)


def _checksum(head: Row, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(repr(head).encode(errors="replace")))
