# SPDX-License-Identifier: Apache-2.0
"""Encoded records, and the parts of them that have no fixed width."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from kmonitor.broker.block import Block
from kmonitor.wire.masks import EventType
from kmonitor.wire.record import SLOT_SIZE, TAIL_OFFSET, Indices
from kmonitor.wire.varint import varint

_EXEC = int(EventType.PROCESS_EXEC)


class Encoded:
    """Elements of `EventBatch.events`: `data[offsets[i]:offsets[i + 1]]` is that of row i."""

    __slots__ = ("data", "offsets")

    def __init__(self, data: bytes, offsets: npt.NDArray[np.int64]) -> None:
        self.data = data
        self.offsets = offsets

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return len(self.data) + self.offsets.nbytes


def utf8(raw: bytes) -> bytes:
    """The bytes as valid UTF-8: proto3 strings must be."""
    return raw if raw.isascii() else raw.decode("utf-8", "replace").encode()


def spliced(flat: bytes, ends: npt.NDArray[np.int64], pieces: dict[int, bytes]) -> bytes:
    """`flat` with a piece behind each of some rows: row, ascending -> piece. `ends`: where the rows end in `flat`, shape (n,)."""
    if not pieces:
        return flat
    parts: list[bytes] = []
    done = 0
    for row, piece in pieces.items():
        end = int(ends[row])
        parts += (flat[done:end], piece)
        done = end
    parts.append(flat[done:])
    return b"".join(parts)


def exec_tails(block: Block, rows: Indices | None, kinds: npt.NDArray[Any]) -> dict[int, bytes]:
    """The fields `filename` and `args` of the exec records among the rows: index in `rows`, ascending -> bytes."""
    execs = np.flatnonzero(kinds == _EXEC)
    if len(execs) == 0:
        return {}
    picked = execs if rows is None else rows[execs]
    begins = (picked if block.starts is None else block.starts[picked]) * SLOT_SIZE + TAIL_OFFSET
    names = block.column("filename_len")[picked]
    args = block.column("args_len")[picked]
    data = block.data
    return {
        row: _exec_tail(data[begin : begin + name + more], name)
        for row, begin, name, more in zip(execs.tolist(), begins.tolist(), names.tolist(), args.tolist(), strict=True)
    }


@functools.lru_cache(maxsize=1024)
def _exec_tail(raw: bytes, name: int) -> bytes:
    """File name, of `name` bytes, and arguments. Cached: what execs a lot execs the same again and again."""
    parts: list[bytes] = []
    filename = utf8(raw[:name].split(b"\0", 1)[0])
    if filename:
        parts += (b"\x82\x01", varint(len(filename)), filename)  # field 16, LEN
    if len(raw) > name:
        for arg in map(utf8, raw[name:].removesuffix(b"\0").split(b"\0")):
            parts += (b"\x8a\x01", varint(len(arg)), arg)  # field 17, LEN
    return b"".join(parts)
