# SPDX-License-Identifier: Apache-2.0
"""The ring's records as numpy columns. The layout is that of bpf/kmonitor.h; a test compares both through BTF.

A stretch of the ring is an array of slots of SLOT_SIZE bytes. A record takes one slot, an exec's some more. All functions
work on whole stretches; none does anything once per event in Python.
"""

from __future__ import annotations

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

    Follows the lengths by pointer doubling: log2(n) numpy steps, whatever the records. A record that claims to reach beyond
    the end is taken to end there; `check_records` and `committed` tell.
    """
    count = len(slots)
    if count <= _FEW:
        return np.array(_few_starts(slots["ring_length"].tolist()), dtype=np.intp)
    spans = _spans(slots)
    if bool((spans == 1).all()):
        return np.arange(count, dtype=np.intp)
    jump = np.minimum(np.arange(count, dtype=np.intp) + spans, count)
    jump = np.append(jump, count)
    reached = np.zeros(count + 1, dtype=bool)
    reached[0] = True
    steps = 1
    while steps <= count:
        reached[jump[reached]] = True
        jump = jump[jump]
        steps *= 2
    return np.flatnonzero(reached[:count])


def committed(slots: Slots) -> int:
    """How many of the slots, from the first, hold committed records: up to the first one that is still being written."""
    if len(slots) <= _FEW:
        lengths = slots["ring_length"].tolist()
        return next((start for start in _few_starts(lengths) if lengths[start] & RING_BUSY), len(lengths))
    starts = record_starts(slots)
    busy = np.flatnonzero(slots["ring_length"][starts] & RING_BUSY)
    return int(starts[busy[0]]) if len(busy) else len(slots)


def whole_records(slots: Slots, limit: int) -> int:
    """The largest number of slots, at most `limit`, after which a record ends. At least one record if there is any."""
    if len(slots) <= limit:
        return len(slots)
    starts = record_starts(slots)
    at = int(np.searchsorted(starts, limit, side="right")) - 1
    if at == 0:
        return int(starts[1]) if len(starts) > 1 else len(slots)
    return int(starts[at])


def check_records(slots: Slots) -> Indices:
    """Indices of the records in a block; those that the kernel discarded are left out.

    Raises BadRecordError unless the slots are exactly committed records of this version.
    """
    if len(slots) <= _FEW:
        return np.array(_check_few(slots), dtype=np.intp)
    starts = record_starts(slots)
    lengths = slots["ring_length"][starts]
    if bool((lengths & RING_BUSY).any()):
        raise BadRecordError(_NOT_COMMITTED)
    spans = _spans(slots)[starts]
    ends = starts + spans
    if int(ends[-1]) != len(slots):
        raise BadRecordError(_CUT_OFF)
    sizes = (lengths & ~np.uint32(RING_DISCARD)).astype(np.int64) + RING_HEADER_SIZE
    if bool((sizes % SLOT_SIZE).any()):
        raise BadRecordError(_NOT_FILLED)
    kept: Indices = starts[(lengths & RING_DISCARD) == 0]
    records = slots[kept]
    wrong = records["version"] != RECORD_VERSION
    if bool(wrong.any()):
        found = int(records["version"][wrong][0])
        raise BadRecordError(_WRONG_VERSION.format(found))
    kinds = records["type"].astype(np.int64)
    if bool(((kinds == 0) | (kinds & (kinds - 1) != 0) | (kinds > 0x40)).any()):
        raise BadRecordError(_WRONG_TYPE)
    room = (spans[(lengths & RING_DISCARD) == 0] - 1) * SLOT_SIZE
    if bool((records["filename_len"].astype(np.int64) + records["args_len"] > room).any()):
        raise BadRecordError(_WRONG_TAIL)
    return kept


_NOT_COMMITTED = "the block holds a record that was not committed: the agent is faulty"
_CUT_OFF = "the block's last record is cut off: agent and broker differ in version, or the block is damaged"
_NOT_FILLED = f"a record does not fill its slots of {SLOT_SIZE} bytes: agent and broker differ in version"
_WRONG_VERSION = f"record version {{}}, expected {RECORD_VERSION}: upgrade the older of agent and broker"
_WRONG_TYPE = "a record's type is not one event bit: the block is damaged"
_WRONG_TAIL = "an exec record's arguments reach beyond its end: the block is damaged"
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


def _spans(slots: Slots) -> Indices:
    """Slots that the record beginning in each slot would take; at least 1. Garbage, but safe, where none begins."""
    lengths = (slots["ring_length"] & 0x3FFFFFFF).astype(np.intp) + RING_HEADER_SIZE
    return np.maximum((lengths + SLOT_SIZE - 1) // SLOT_SIZE, 1)
