# SPDX-License-Identifier: Apache-2.0
"""Records of all kinds to protobuf, field by field: what encode_usual.py leaves to it. 1 us a record.

All fields of an Event but comm, killed_by.comm and an exec's strings have a fixed width when they are present, so the records
are one byte array of shape (n, width), with a mask of what is present; the mask squeezes it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kmonitor.broker.block import Block
from kmonitor.broker.elements import Encoded, exec_tails, spliced
from kmonitor.wire.masks import EventType
from kmonitor.wire.record import F_ARGS_TRUNCATED, F_INFERRED, F_KILLED_BY, F_OOM_KILLED, Indices
from kmonitor.wire.varint import varint

Bytes = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

_LEN, _I32, _I64, _VARINT = 2, 5, 1, 0
_CHILD = int(EventType.PROCESS_FORK | EventType.THREAD_CREATE)
_ENDS = int(EventType.THREAD_ABORT | EventType.THREAD_EXIT | EventType.PROCESS_ABORT | EventType.PROCESS_EXIT)
_EXITS = int(EventType.THREAD_EXIT | EventType.PROCESS_EXIT)
_EXEC = int(EventType.PROCESS_EXEC)
_EVENT_ELEMENT = 3  # EventBatch.events


def encode_columns(block: Block, rows: Indices | None) -> Encoded:
    """Encode the given rows of a block (None: all)."""
    table = _Table(block, rows)
    kinds = table.column("type")
    flags = table.column("flags")
    status = table.column("status")
    inferred = flags & F_INFERRED != 0
    ends = (kinds & _ENDS != 0) & ~inferred
    signals = status & 0x7F
    by_signal = ends & (signals != 0)
    with_child = kinds & _CHILD != 0

    table.fixed(1, _I64, table.positions())
    table.bytes_(2, kinds, None)
    for number, name in ((3, "tgid"), (4, "tid"), (5, "ppid"), (6, "uid"), (7, "gid")):
        values = table.column(name)
        table.fixed(number, _I32, values, values != 0)
    table.string(8, *table.text("comm"), None)
    # Unsigned sum of a signed distance: wraps around as it should.
    table.fixed(9, _I64, table.column("boottime_ns") + np.uint64(block.boottime_to_unix_ns & 0xFFFFFFFFFFFFFFFF))
    for number, name in ((10, "start_boottime_ns"), (11, "cgroup_id")):
        values = table.column(name)
        table.fixed(number, _I64, values, values != 0)
    table.flag(12, inferred)
    if bool(with_child.any()):
        table.fixed(13, _I32, table.column("child_tgid"), with_child)
        table.fixed(14, _I32, table.column("child_tid"), with_child)
        table.fixed(15, _I64, table.column("child_start_boottime_ns"), with_child)
    table.flag(18, (kinds == _EXEC) & (flags & F_ARGS_TRUNCATED != 0))
    table.fixed(19, _I32, (status >> 8) & 0xFF, (kinds & _EXITS != 0) & ends & ~by_signal)
    table.fixed(20, _I32, signals, by_signal)
    table.flag(21, by_signal & (status & 0x80 != 0))
    table.flag(22, (kinds & _ENDS != 0) & (flags & F_OOM_KILLED != 0))
    killed = by_signal & (flags & F_KILLED_BY != 0)
    if bool(killed.any()):
        table.killed_by(killed)
    tails = exec_tails(block, rows, kinds)
    return table.squeeze(tails)


class _Table:
    """The bytes of all rows, field behind field, and which of them are present."""

    def __init__(self, block: Block, rows: Indices | None) -> None:
        self.block = block
        self.rows = rows
        self.count = len(block) if rows is None else len(rows)
        self.fields: list[tuple[Bytes, Bools | None]] = []
        """Columns of bytes, shape (n, w) or (w,) for the same in all rows; presence, shape (n,) or (n, w), None for always."""

    def column(self, name: str) -> npt.NDArray[Any]:
        values = self.block.column(name)
        return values if self.rows is None else values[self.rows]

    def positions(self) -> npt.NDArray[np.uint64]:
        values = self.block.positions
        return values if self.rows is None else values[self.rows]

    def fixed(self, number: int, wire: int, values: npt.NDArray[Any], present: Bools | None = None) -> None:
        """A fixed32 or fixed64 field. Left out where not present."""
        if present is None or bool(present.any()):
            kind = "<u4" if wire == _I32 else "<u8"
            raw = np.ascontiguousarray(values, dtype=kind).view(np.uint8).reshape(self.count, 4 if wire == _I32 else 8)
            self._add(number, wire, raw, present)

    def bytes_(self, number: int, values: npt.NDArray[Any], present: Bools | None) -> None:
        """A varint field whose values are below 128."""
        self._add(number, _VARINT, values.astype(np.uint8).reshape(self.count, 1), present)

    def flag(self, number: int, values: Bools) -> None:
        """A bool field."""
        if bool(values.any()):
            self.bytes_(number, np.ones(self.count, dtype=np.uint64), values)

    def text(self, name: str) -> tuple[Bytes, npt.NDArray[np.int64]]:
        """A comm as UTF-8: bytes, shape (n, w), and how many of them count, shape (n,)."""
        values = self.column(name)
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(self.count, 16)
        nul = raw == 0
        lengths = np.where(nul.any(axis=1), nul.argmax(axis=1), 16)
        if not bool((raw >= 0x80).any()):
            return raw, lengths
        unique, which = np.unique(values, return_inverse=True)
        texts = [bytes(item).split(b"\0", 1)[0].decode("utf-8", "replace").encode() for item in unique.tolist()]
        width = max(map(len, texts))
        padded = np.frombuffer(b"".join(text.ljust(width, b"\0") for text in texts), dtype=np.uint8).reshape(len(texts), width)
        which = which.reshape(-1)
        return padded[which], np.array([len(text) for text in texts], dtype=np.int64)[which]

    def string(self, number: int, raw: Bytes, lengths: npt.NDArray[np.int64], present: Bools | None) -> None:
        """A string field of less than 128 bytes; left out where it is empty."""
        there = lengths > 0 if present is None else present & (lengths > 0)
        if not bool(there.any()):
            return
        width = int(lengths[there].max())
        self._add(number, _LEN, lengths.astype(np.uint8).reshape(self.count, 1), there)
        self.fields.append((raw[:, :width], (np.arange(width) < lengths[:, None]) & there[:, None]))

    def killed_by(self, killed: Bools) -> None:
        """Event.killed_by: a message within."""
        raw, lengths = self.text("killer_comm")
        pids, uids = self.column("killer_tgid"), self.column("killer_uid")
        size = (pids != 0) * 5 + (uids != 0) * 5 + (lengths > 0) * (2 + lengths)
        self._add(23, _LEN, size.astype(np.uint8).reshape(self.count, 1), killed)
        self.fixed(1, _I32, pids, killed & (pids != 0))
        self.string(2, raw, lengths, killed)
        self.fixed(3, _I32, uids, killed & (uids != 0))

    def _add(self, number: int, wire: int, raw: Bytes, present: Bools | None) -> None:
        self.fields.append((np.frombuffer(varint(number << 3 | wire), dtype=np.uint8), present))
        self.fields.append((raw, present))

    def squeeze(self, tails: dict[int, bytes]) -> Encoded:
        """Put tag and length before each row, and the tails behind theirs."""
        count = self.count
        head = 1 + 3  # the element's tag, and a length of up to 2 MiB
        width = head + sum(raw.shape[-1] for raw, _ in self.fields)
        table = np.empty((count, width), dtype=np.uint8)
        mask = np.ones((count, width), dtype=bool)
        at = head
        for raw, present in self.fields:
            to = at + raw.shape[-1]
            table[:, at:to] = raw
            if present is not None:
                mask[:, at:to] = present if present.ndim == 2 else present[:, None]
            at = to
        sizes = mask[:, head:].sum(axis=1)
        fixed = sizes
        if tails:
            sizes = sizes.copy()
            for row, tail in tails.items():
                sizes[row] += len(tail)
        table[:, 0] = _EVENT_ELEMENT << 3 | _LEN
        table[:, 1] = (sizes & 0x7F) | (sizes > 0x7F) * 0x80
        table[:, 2] = (sizes >> 7 & 0x7F) | (sizes > 0x3FFF) * 0x80
        table[:, 3] = sizes >> 14
        mask[:, 2] = sizes > 0x7F
        mask[:, 3] = sizes > 0x3FFF
        heads = 2 + mask[:, 2] + mask[:, 3].astype(np.int64)
        offsets = np.zeros(count + 1, dtype=np.int64)
        np.cumsum(heads + sizes, out=offsets[1:])
        flat = table[mask].tobytes()
        return Encoded(spliced(flat, np.cumsum(heads + fixed), tails), offsets)
