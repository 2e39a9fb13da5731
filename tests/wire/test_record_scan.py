# SPDX-License-Identifier: Apache-2.0
"""The column-wise scan of a stretch of the ring, against one that walks record by record."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmonitor.wire import record
from kmonitor.wire.errors import BadRecordError

pytestmark = pytest.mark.wheel_ok

LENGTH_MASK = 0x3FFFFFFF


def naive_starts(slots: record.Slots) -> list[int]:
    """Slot by slot: where each record begins if one begins in the first."""
    starts = []
    at = 0
    while at < len(slots):
        starts.append(at)
        size = (int(slots["ring_length"][at]) & LENGTH_MASK) + record.RING_HEADER_SIZE
        at += max(-(-size // record.SLOT_SIZE), 1)
    return starts


def naive_check(slots: record.Slots) -> list[int]:
    """`check_records`, one record at a time."""
    kept = []
    for at in naive_starts(slots):
        row = slots[at]
        length = int(row["ring_length"])
        size = (length & LENGTH_MASK) + record.RING_HEADER_SIZE
        if length & record.RING_BUSY or size % record.SLOT_SIZE or at + size // record.SLOT_SIZE > len(slots):
            raise BadRecordError("walker")
        if length & record.RING_DISCARD:
            continue
        if row["version"] != record.RECORD_VERSION or int(row["type"]) not in {1 << bit for bit in range(7)}:
            raise BadRecordError("walker")
        if record.TAIL_OFFSET + int(row["filename_len"]) + int(row["args_len"]) > size:
            raise BadRecordError("walker")
        kept.append(at)
    return kept


def one_record(
    kind: int, extra_slots: int = 0, *, flags: int = 0, version: int = record.RECORD_VERSION, tail: tuple[int, int] = (0, 0)
) -> bytes:
    """A record of 1 + extra_slots slots, as the kernel leaves it in the ring."""
    size = record.SLOT_SIZE * (1 + extra_slots)
    head = struct.pack("<IIBBHHH", (size - record.RING_HEADER_SIZE) | flags, 0, version, kind, 0, *tail)
    return head.ljust(size, b"\xa5")


@st.composite
def records(draw: st.DrawFn) -> bytes:
    """Mostly a good record; now and then one that is busy, discarded, of another version, or lies about its tail."""
    extra = draw(st.integers(0, 4))
    room = extra * record.SLOT_SIZE
    filename = draw(st.integers(0, room))
    odd = draw(st.integers(0, 19))
    return one_record(
        draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64])) if odd != 0 else draw(st.integers(0, 255)),
        extra,
        flags={1: record.RING_BUSY, 2: record.RING_DISCARD, 3: record.RING_DISCARD}.get(odd, 0),
        version=record.RECORD_VERSION if odd != 4 else draw(st.integers(0, 255)),
        tail=(filename, draw(st.integers(0, room - filename if odd != 5 else 65535))),
    )


stretches = st.lists(records(), max_size=40).map(b"".join)
# Cut at any slot, so that a record may reach beyond the end; or nothing but garbage.
cut_stretches = st.builds(lambda data, slots: data[: slots * record.SLOT_SIZE], stretches, st.integers(0, 60))
slot_lengths = st.lists(st.one_of(st.integers(0, 1024), st.integers(0, 2**32 - 1)), max_size=60)
garbage = slot_lengths.map(lambda lengths: b"".join(struct.pack("<I", length).ljust(record.SLOT_SIZE, b"\x81") for length in lengths))
anything = st.one_of(
    stretches,
    cut_stretches,
    garbage,
    st.binary(max_size=20 * record.SLOT_SIZE).map(lambda b: b[: len(b) // record.SLOT_SIZE * record.SLOT_SIZE]),
)


@given(anything)
def test_record_starts_are_those_of_a_walk(data: bytes) -> None:
    slots = record.slots_of(data)
    assert record.record_starts(slots).tolist() == naive_starts(slots)


@given(anything, st.integers(0, 80))
def test_readable_is_what_is_whole_and_committed(data: bytes, limit: int) -> None:
    slots = record.slots_of(data)
    starts = naive_starts(slots)
    busy = [at for at in starts if int(slots["ring_length"][at]) & record.RING_BUSY]
    ends = [end for end in [*starts[1:], len(slots)] if end <= (busy[0] if busy else len(slots))]
    fitting = [end for end in ends if end <= limit]
    assert record.readable(slots, limit) == (fitting[-1] if fitting else ends[0] if starts and starts[0] not in busy else 0)


@given(anything)
def test_any_bytes_are_records_or_a_bad_record_error(data: bytes) -> None:
    slots = record.slots_of(data)
    try:
        expected = naive_check(slots)
    except BadRecordError:
        with pytest.raises(BadRecordError):
            record.check_records(slots)
    else:
        assert record.check_records(slots).tolist() == expected


@given(st.binary(max_size=1024))
def test_a_length_that_is_no_whole_number_of_slots_is_an_error(data: bytes) -> None:
    if len(data) % record.SLOT_SIZE:
        with pytest.raises(BadRecordError, match="no whole number"):
            record.slots_of(data)
    else:
        assert len(record.slots_of(data)) == len(data) // record.SLOT_SIZE


def test_a_discarded_record_is_left_out() -> None:
    slots = record.slots_of(one_record(0x40) + one_record(0x20, 2, flags=record.RING_DISCARD) + one_record(0x08))
    assert record.check_records(slots).tolist() == [0, 4]


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (one_record(0x40, flags=record.RING_BUSY), "not committed"),
        (one_record(0x20, 2)[: 2 * record.SLOT_SIZE], "cut off"),
        (struct.pack("<IIBB", 100, 0, 1, 0x40).ljust(128, b"\0"), "does not fill"),
        (one_record(0x40, version=2), "record version 2, expected 1"),
        (one_record(0x60), "not one event bit"),
        (one_record(0), "not one event bit"),
        (one_record(0x80), "not one event bit"),
        (one_record(0x20, 1, tail=(100, 29)), "reach beyond its end"),
    ],
)
def test_the_error_says_what_is_wrong(data: bytes, word: str) -> None:
    with pytest.raises(BadRecordError, match=word):
        record.check_records(record.slots_of(data))


def test_nothing_is_no_records() -> None:
    slots = record.slots_of(b"")
    assert record.record_starts(slots).tolist() == []
    assert record.check_records(slots).tolist() == []
    assert record.readable(slots, 10) == 0


def test_the_fields_lie_within_the_slot_and_do_not_overlap() -> None:
    for fields in (record.COMMON_FIELDS + record.CHILD_FIELDS, record.COMMON_FIELDS + record.KILLER_FIELDS + record.ROOT_FIELDS):
        end = 0
        for name, kind, offset in fields:
            assert offset == end, name
            end = offset + np.dtype(kind).itemsize
        assert end <= record.SLOT_SIZE
