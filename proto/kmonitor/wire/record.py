# SPDX-License-Identifier: Apache-2.0
"""The ring's records as numpy columns. The layout is that of bpf/kmonitor.h; a test compares both through BTF.

A stretch of the ring is an array of slots of SLOT_SIZE bytes. A record takes one slot, an exec's some more. All functions
work on whole stretches; none does anything once per event in Python.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from kmonitor.wire.errors import BadRecordError

RECORD_VERSION = 1
SLOT_SIZE = 128
RING_HEADER_SIZE = 8
RECORD_SIZE = 120
TAIL_OFFSET = RING_HEADER_SIZE + RECORD_SIZE
"""Where an exec's file name begins, counted from its slot's first byte."""

RING_BUSY = 1 << 31  # BPF_RINGBUF_BUSY_BIT: reserved and not yet committed
RING_DISCARD = 1 << 30  # BPF_RINGBUF_DISCARD_BIT

F_ARGS_TRUNCATED = 0x0001
F_OOM_KILLED = 0x0002
F_KILLED_BY = 0x0004
F_MATCH_PROCESS = 0x0010
F_MATCH_NODE = 0x0020
F_MATCH_CGROUP = 0x0040
F_INFERRED = 0x0080

COMMON_FIELDS: list[tuple[str, str, int]] = [
    # name, numpy type, offset in the slot
    ("ring_length", "<u4", 0),
    ("ring_page", "<u4", 4),
    ("version", "u1", 8),
    ("type", "u1", 9),
    ("flags", "<u2", 10),
    ("filename_len", "<u2", 12),
    ("args_len", "<u2", 14),
    ("boottime_ns", "<u8", 16),
    ("start_boottime_ns", "<u8", 24),
    ("cgroup_id", "<u8", 32),
    ("match_cgroup_id", "<u8", 40),
    ("tgid", "<u4", 48),
    ("tid", "<u4", 52),
    ("ppid", "<u4", 56),
    ("uid", "<u4", 60),
    ("gid", "<u4", 64),
    ("status", "<u4", 68),
    ("comm", "S16", 72),
]
# The same 24 bytes: a child (fork, thread create), or a killer (exit, abort).
CHILD_FIELDS: list[tuple[str, str, int]] = [
    ("child_start_boottime_ns", "<u8", 88),
    ("child_tgid", "<u4", 96),
    ("child_tid", "<u4", 100),
]
KILLER_FIELDS: list[tuple[str, str, int]] = [
    ("killer_tgid", "<u4", 88),
    ("killer_uid", "<u4", 92),
    ("killer_comm", "S16", 96),
]
# Where a process that is followed has that from; zero: not known, or it was registered itself, or nothing above it was.
ROOT_FIELDS: list[tuple[str, str, int]] = [
    ("root_start_boottime_ns", "<u8", 112),
    ("root_tgid", "<u4", 120),
    ("root_armed", "<u4", 124),
]
_FIELDS = COMMON_FIELDS + CHILD_FIELDS + KILLER_FIELDS + ROOT_FIELDS

SLOT_DTYPE: np.dtype[Any] = np.dtype(
    {
        "names": [name for name, _, _ in _FIELDS],
        "formats": [kind for _, kind, _ in _FIELDS],
        "offsets": [offset for _, _, offset in _FIELDS],
        "itemsize": SLOT_SIZE,
    }
)

_FEW = 16
"""So few slots are looked at one by one: an isolated event must not wait for dozens of array operations."""

Slots = npt.NDArray[np.void]
"""Shape (n,), dtype SLOT_DTYPE."""
Indices = npt.NDArray[np.intp]


def slots_of(data: bytes | bytearray | memoryview) -> Slots:
    """View a stretch of the ring as slots. Raises BadRecordError if it is not a whole number of them."""
    if len(data) % SLOT_SIZE:
        raise BadRecordError(
            f"a block of {len(data)} bytes is no whole number of {SLOT_SIZE}-byte slots: agent and broker differ in version"
        )
    return np.frombuffer(data, dtype=SLOT_DTYPE)


def record_starts(slots: Slots) -> Indices:
    """Indices of the slots in which a record begins, given that one begins in the first.

    A record that claims to reach beyond the end is taken to end there; `check_records` and `readable` tell.
    """
    return _starts(len(slots), _others(slots["ring_length"]))


def readable(slots: Slots, limit: int) -> int:
    """How many of the slots, from the first, hold whole and committed records: up to the first that is still being written, and at most
    `limit`, but at least one record if the first is committed."""
    count = len(slots)
    for at, length, end in _others(slots["ring_length"]):
        if at >= limit and at:
            break
        if length & RING_BUSY:
            return at
        if min(end, count) > limit:
            return at or min(end, count)
    return min(max(limit, 1), count)


def check_records(slots: Slots) -> Indices:
    """Indices of the records in a block; those that the kernel discarded are left out.

    Raises BadRecordError unless the slots are exactly committed records of this version.
    """
    if len(slots) <= _FEW:
        if len(slots) == 1:
            length, version, kind, tails = _HEAD.unpack(slots.tobytes()[: _HEAD.size])
            if length == _ONE_SLOT and version == RECORD_VERSION and kind in _TYPES and not tails:
                return _ONLY.copy()
        return np.array(_check_few(slots), dtype=np.intp)
    # Reading the slots' memory is what takes the time here: so each is read just once, 16 bytes of it.
    words: npt.NDArray[np.uint64] = slots.view(_WORDS)
    others = _others(words[:, 0].astype(np.uint32))
    _check_others(others, len(slots))
    starts = _starts(len(slots), others)
    heads = words[:, 1] if len(starts) == len(slots) else words[:, 1][starts]
    if discarded := [at for at, length, _ in others if length & RING_DISCARD]:
        kept = ~np.isin(starts, discarded)
        starts, heads = starts[kept], heads[kept]
    wrong = heads & 0xFF != RECORD_VERSION
    if bool(wrong.any()):
        raise BadRecordError(_WRONG_VERSION.format(int(heads[wrong][0]) & 0xFF))
    if not bool(_IS_TYPE[(heads >> np.uint64(8)).astype(np.uint8)].all()):
        raise BadRecordError(_WRONG_TYPE)
    with_tail = np.flatnonzero(heads >> np.uint64(32))
    if len(with_tail):
        tails = heads[with_tail] >> np.uint64(32)
        ends = np.append(starts[1:], len(slots)) if not discarded else starts + _spans(slots["ring_length"][starts])
        room = (ends[with_tail] - starts[with_tail] - 1) * SLOT_SIZE
        if bool(((tails & 0xFFFF).astype(np.int64) + (tails >> np.uint64(16)).astype(np.int64) > room).any()):
            raise BadRecordError(_WRONG_TAIL)
    return starts


_NOT_COMMITTED = "the block holds a record that was not committed: the agent is faulty"
_CUT_OFF = "the block's last record is cut off: agent and broker differ in version, or the block is damaged"
_NOT_FILLED = f"a record does not fill its slots of {SLOT_SIZE} bytes: agent and broker differ in version"
_WRONG_VERSION = f"record version {{}}, expected {RECORD_VERSION}: upgrade the older of agent and broker"
_WRONG_TYPE = "a record's type is not one event bit: the block is damaged"
_WRONG_TAIL = "an exec record's arguments reach beyond its end: the block is damaged"
_ONE_SLOT = SLOT_SIZE - RING_HEADER_SIZE
_HEAD = struct.Struct("<I4xBB2xI")  # ring_length, version, type, and both lengths of an exec's tail
_ONLY: Indices = np.zeros(1, dtype=np.intp)
_WORDS = np.dtype(("<u8", SLOT_SIZE // 8))
_IS_TYPE = np.isin(np.arange(256), [1 << bit for bit in range(7)])
_TYPES = frozenset((0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40))


def _span(length: int) -> int:
    """Slots that a record of this ring length takes."""
    return max(((length & 0x3FFFFFFF) + RING_HEADER_SIZE + SLOT_SIZE - 1) // SLOT_SIZE, 1)


def _few_starts(lengths: list[int]) -> list[int]:
    starts = []
    at = 0
    while at < len(lengths):
        starts.append(at)
        at += _span(lengths[at])
    return starts


def _check_few(slots: Slots) -> list[int]:
    """`check_records`, record by record, with its errors in its order."""
    lengths: list[int] = slots["ring_length"].tolist()
    starts = _few_starts(lengths)
    if any(lengths[start] & RING_BUSY for start in starts):
        raise BadRecordError(_NOT_COMMITTED)
    if starts and starts[-1] + _span(lengths[starts[-1]]) != len(lengths):
        raise BadRecordError(_CUT_OFF)
    if any(((lengths[start] & ~RING_DISCARD) + RING_HEADER_SIZE) % SLOT_SIZE for start in starts):
        raise BadRecordError(_NOT_FILLED)
    kept = [start for start in starts if not lengths[start] & RING_DISCARD]
    versions = slots["version"].tolist()
    if wrong := [versions[start] for start in kept if versions[start] != RECORD_VERSION]:
        raise BadRecordError(_WRONG_VERSION.format(wrong[0]))
    kinds = slots["type"].tolist()
    if any(kinds[start] not in _TYPES for start in kept):
        raise BadRecordError(_WRONG_TYPE)
    filenames, arguments = slots["filename_len"].tolist(), slots["args_len"].tolist()
    if any(filenames[start] + arguments[start] > (_span(lengths[start]) - 1) * SLOT_SIZE for start in kept):
        raise BadRecordError(_WRONG_TAIL)
    return kept


def _others(lengths: npt.NDArray[np.uint32]) -> list[tuple[int, int, int]]:
    """Of the records that are not just one slot, committed and kept: (slot in which it begins, its ring length, slot behind it).

    Nearly all records are: those are found in one go, and the others, which come with some 50 us of their own, one by one.
    """
    found = np.flatnonzero(lengths != _ONE_SLOT)
    others = []
    behind = 0
    for at, length in zip(found.tolist(), lengths[found].tolist(), strict=True):
        if at >= behind:  # else it lies within the record before
            behind = at + _span(length)
            others.append((at, length, behind))
    return others


def _starts(count: int, others: list[tuple[int, int, int]]) -> Indices:
    starts = np.arange(count, dtype=np.intp)
    if all(end - at == 1 for at, _, end in others):
        return starts
    begins = np.ones(count, dtype=bool)
    for at, _, end in others:
        begins[at + 1 : end] = False
    return starts[begins]


def _check_others(others: list[tuple[int, int, int]], count: int) -> None:
    if any(length & RING_BUSY for _, length, _ in others):
        raise BadRecordError(_NOT_COMMITTED)
    if others and others[-1][2] > count:
        raise BadRecordError(_CUT_OFF)
    if any(((length & ~RING_DISCARD) + RING_HEADER_SIZE) % SLOT_SIZE for _, length, _ in others):
        raise BadRecordError(_NOT_FILLED)


def _spans(lengths: npt.NDArray[np.uint32]) -> Indices:
    """Slots that records of these ring lengths take."""
    return np.maximum(((lengths & 0x3FFFFFFF).astype(np.intp) + RING_HEADER_SIZE + SLOT_SIZE - 1) // SLOT_SIZE, 1)
