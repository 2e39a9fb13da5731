# SPDX-License-Identifier: Apache-2.0
"""The usual records to protobuf, all at once: forks, new threads, exits without a signal, execs. 0.2 us a record.

What such a record's element looks like depends on its kind and on the length of comm alone: which bytes are there, and all of them
that are no numbers. So there is one row of bytes, and one mask, for each such case; a block's rows are looked up, the numbers are
put in column by column, and the mask squeezes out what is not there. Records of other kinds are encoded one by one and put between
them, if they are few; a block that has many of those is left to encode_columns.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kmonitor.broker.block import Block
from kmonitor.broker.elements import Encoded, exec_tails, spliced
from kmonitor.broker.encode_columns import encode_columns
from kmonitor.broker.encode_few import encode_few
from kmonitor.wire.masks import EventType
from kmonitor.wire.record import F_ARGS_TRUNCATED, F_INFERRED, F_KILLED_BY, F_OOM_KILLED, SLOT_DTYPE, SLOT_SIZE, Indices
from kmonitor.wire.varint import varint

_FEW_OTHERS = 16
"""One in so many may be of another kind: encoding those one by one costs some 5 us each."""
_TOGETHER = 1024
"""So many at most: their rows and masks are to stay in the CPU's cache."""
_COMM = 16
_LENGTHS = _COMM + 1

_OPAQUE = np.dtype((np.void, SLOT_SIZE))

# Where each part of an element lies in its row: the protobuf field, if it has a tag, and its type.
_PARTS: list[tuple[str, int, str]] = [
    ("element", 0, "u1"),
    ("size", 0, "(3,)u1"),
    ("position", 1 << 3 | 1, "<u8"),
    ("type", 2 << 3, "u1"),
    ("tgid", 3 << 3 | 5, "<u4"),
    ("tid", 4 << 3 | 5, "<u4"),
    ("ppid", 5 << 3 | 5, "<u4"),
    ("uid", 6 << 3 | 5, "<u4"),
    ("gid", 7 << 3 | 5, "<u4"),
    ("comm_size", 8 << 3 | 2, "u1"),
    ("comm", 0, "S16"),
    ("time", 9 << 3 | 1, "<u8"),
    ("start_boottime_ns", 10 << 3 | 1, "<u8"),
    ("cgroup_id", 11 << 3 | 1, "<u8"),
    ("child_tgid", 13 << 3 | 5, "<u4"),
    ("child_tid", 14 << 3 | 5, "<u4"),
    ("child_start_boottime_ns", 15 << 3 | 1, "<u8"),
    ("exit_code", 19 << 3 | 5, "<u4"),
]
_ALWAYS = frozenset(("element", "position", "type", "tgid", "tid", "ppid", "time", "start_boottime_ns", "cgroup_id"))
_COPIED = ("tgid", "tid", "ppid", "uid", "gid", "comm", "start_boottime_ns", "cgroup_id")
_CHILD = ("child_tgid", "child_tid", "child_start_boottime_ns")
_EVENT_ELEMENT = 3 << 3 | 2  # EventBatch.events

# Kinds of rows; + 1 if its user is root, and user and group, being 0, are left out.
_WITH_CHILD, _WITH_CODE, _BARE = 0, 2, 4
_KINDS = 6
_OTHER = 255

_KIND_OF_TYPE = np.full(256, _OTHER, dtype=np.uint8)
_KIND_OF_TYPE[[EventType.PROCESS_FORK, EventType.THREAD_CREATE]] = _WITH_CHILD
_KIND_OF_TYPE[[EventType.PROCESS_EXIT, EventType.THREAD_EXIT]] = _WITH_CODE
_KIND_OF_TYPE[EventType.PROCESS_EXEC] = _BARE
_UNUSUAL_FLAGS = F_ARGS_TRUNCATED | F_OOM_KILLED | F_KILLED_BY | F_INFERRED


def _layout() -> tuple[np.dtype[Any], dict[str, tuple[int, int, int]]]:
    """The row's dtype, and for each part where its tag begins, its value, and its end."""
    names, formats, offsets = [], [], []
    places = {}
    at = 0
    for name, tag, kind in _PARTS:
        value = at + (len(varint(tag)) if tag else 0)
        names.append(name)
        formats.append(kind)
        offsets.append(value)
        end = value + np.dtype(kind).itemsize
        places[name] = at, value, end
        at = end
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": at}), places


_ROW, _PLACES = _layout()
_WIDTH = _ROW.itemsize
_HEAD = _PLACES["position"][0]
"""Where an element's own bytes begin, behind tag and size."""


def _cases() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """(bytes, mask) by case: shape (_KINDS * _LENGTHS, _WIDTH)."""
    rows = np.zeros((_KINDS * _LENGTHS, _WIDTH), dtype=np.uint8)
    masks = np.zeros((_KINDS * _LENGTHS, _WIDTH), dtype=bool)
    for name, tag, _ in _PARTS:
        if tag:
            raw = varint(tag)
            at = _PLACES[name][0]
            rows[:, at : at + len(raw)] = list(raw)
    rows[:, 0] = _EVENT_ELEMENT
    for kind in range(_KINDS):
        there = set(_ALWAYS)
        there |= {"uid", "gid"} if not kind & 1 else set()
        there |= set(_CHILD) if kind & ~1 == _WITH_CHILD else {"exit_code"} if kind & ~1 == _WITH_CODE else set()
        for length in range(_LENGTHS):
            case = kind * _LENGTHS + length
            for name in there:
                masks[case, _PLACES[name][0] : _PLACES[name][2]] = True
            if length:
                at, value, end = _PLACES["comm_size"]
                masks[case, at : end + length] = True
                rows[case, value] = length
            _put_sizes(rows, masks, np.array([case]), masks[case : case + 1, _HEAD:].sum(axis=1))
    return rows, masks


def _put_sizes(rows: npt.NDArray[np.uint8], masks: npt.NDArray[np.bool_], at: Indices, sizes: npt.NDArray[np.int64]) -> None:
    """Write the varint of each row's size, up to 2 MiB."""
    first = _PLACES["size"][0]
    rows[at, first] = (sizes & 0x7F) | (sizes > 0x7F) * 0x80
    rows[at, first + 1] = (sizes >> 7 & 0x7F) | (sizes > 0x3FFF) * 0x80
    rows[at, first + 2] = sizes >> 14
    masks[at, first] = True
    masks[at, first + 1] = sizes > 0x7F
    masks[at, first + 2] = sizes > 0x3FFF


_ROWS, _MASKS = _cases()
_SIZES: npt.NDArray[np.int64] = _MASKS.sum(axis=1)


def encode(block: Block, rows: Indices | None) -> Encoded:
    """Encode the given rows of a block (None: all)."""
    count = len(block) if rows is None else len(rows)
    if count <= _TOGETHER:
        return _encode(block, rows)
    if rows is None:
        rows = np.arange(count)
    parts = [_encode(block, rows[first : first + _TOGETHER]) for first in range(0, count, _TOGETHER)]
    begins = np.cumsum([0, *(len(part.data) for part in parts)])
    offsets = [part.offsets[:-1] + begin for part, begin in zip(parts, begins.tolist(), strict=False)]
    return Encoded(b"".join(part.data for part in parts), np.concatenate([*offsets, begins[-1:]]))


def _encode(block: Block, rows: Indices | None) -> Encoded:
    slots = block.slots
    picked = rows if block.starts is None else block.starts if rows is None else block.starts[rows]
    if picked is not None:
        slots = slots.view(_OPAQUE)[picked].view(SLOT_DTYPE)  # of what has fields numpy would copy field by field
    count = len(slots)
    types = slots["type"]
    kinds = _KIND_OF_TYPE[types]
    status = slots["status"]
    unusual = slots["flags"] & _UNUSUAL_FLAGS != 0
    unusual |= (kinds == _WITH_CODE) & (status & 0x7F != 0)
    unusual |= kinds == _OTHER
    others = np.flatnonzero(unusual)
    comm = slots["comm"]
    raw = np.ascontiguousarray(comm).view(np.uint8).reshape(count, _COMM)
    if len(others) * _FEW_OTHERS > count or bool((raw > 0x7F).any()):  # comm is UTF-8, perhaps
        return encode_columns(block, rows)
    lengths = (raw == 0).argmax(axis=1)
    lengths[(lengths == 0) & (raw[:, 0] != 0)] = _COMM
    kinds += (slots["uid"] | slots["gid"]) == 0
    kinds[others] = 0
    cases = kinds.astype(np.intp) * _LENGTHS + lengths
    table, mask = _ROWS.take(cases, axis=0), _MASKS.take(cases, axis=0)
    fields = table.view(_ROW)[:, 0]
    for name in _COPIED:
        fields[name] = slots[name]
    # They lie where a killer's fields lie, and are masked out where there is none.
    for name in _CHILD:
        fields[name] = slots[name]
    positions = block.positions
    fields["position"] = positions if rows is None else positions[rows]
    fields["type"] = types
    # Unsigned sum of a signed distance: wraps around as it should.
    fields["time"] = slots["boottime_ns"] + np.uint64(block.boottime_to_unix_ns & 0xFFFFFFFFFFFFFFFF)
    fields["exit_code"] = status >> 8 & 0xFF
    sizes = _SIZES[cases]
    pieces = exec_tails(block, rows, np.where(unusual, 0, types))
    if pieces:
        with_tail = np.fromiter(pieces, dtype=np.intp, count=len(pieces))
        bodies = mask[with_tail, _HEAD:].sum(axis=1)
        bodies += np.fromiter(map(len, pieces.values()), dtype=np.int64, count=len(pieces))
        _put_sizes(table, mask, with_tail, bodies)
        sizes[with_tail] = mask[with_tail].sum(axis=1)
    if len(others):
        encoded = encode_few(block, others.tolist() if rows is None else rows[others].tolist())
        mask[others] = False
        sizes[others] = 0
        for number, row in enumerate(others.tolist()):
            pieces[row] = encoded.data[encoded.offsets[number] : encoded.offsets[number + 1]]
        pieces = dict(sorted(pieces.items()))
    flat = table[mask].tobytes()
    ends = np.cumsum(sizes)
    offsets = np.zeros(count + 1, dtype=np.int64)
    if pieces:
        more = np.zeros(count, dtype=np.int64)
        more[list(pieces)] = [len(piece) for piece in pieces.values()]
        np.cumsum(sizes + more, out=offsets[1:])
    else:
        offsets[1:] = ends
    return Encoded(spliced(flat, ends, pieces), offsets)
