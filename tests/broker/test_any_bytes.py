# SPDX-License-Identifier: Apache-2.0
"""Whatever bytes a block has: it is refused as a bad record, or all that the broker makes of it can be read, and both encoders agree."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kmonitor.broker.block import Block
from kmonitor.broker.elements import Encoded
from kmonitor.broker.encode import Encoder
from kmonitor.broker.encode_few import encode_few
from kmonitor.broker.encode_usual import encode
from kmonitor.broker.filters import Filter
from kmonitor.clients import Batch
from kmonitor.clients.cli.jsonlines import event_line
from kmonitor.v1 import events_pb2, monitor_pb2
from kmonitor.wire.errors import BadRecordError
from kmonitor.wire.record import RECORD_VERSION, RING_DISCARD, RING_HEADER_SIZE, SLOT_SIZE

FILTER = Filter(comms=("a*", "?"), uids=(0, 2**32 - 1), failures_only=True)


@st.composite
def accepted(draw: st.DrawFn) -> bytes:
    """A record that is in order as far as it is checked; all else is anything."""
    spare = draw(st.integers(0, 3))
    size = SLOT_SIZE * (1 + spare)
    body = draw(st.binary(min_size=SLOT_SIZE, max_size=SLOT_SIZE)) + draw(st.binary(min_size=size - SLOT_SIZE, max_size=size - SLOT_SIZE))
    discard = draw(st.sampled_from([0, 0, 0, RING_DISCARD]))
    filename = draw(st.integers(0, size - SLOT_SIZE))
    args = draw(st.integers(0, size - SLOT_SIZE - filename))
    kind, flags = 1 << draw(st.integers(0, 6)), draw(st.integers(0, 0xFFFF))
    head = struct.pack("<IIBBHHH", size - RING_HEADER_SIZE | discard, 0, RECORD_VERSION, kind, flags, filename, args)
    return head + body[len(head) :]


accepted_blocks = st.lists(accepted(), max_size=24).map(b"".join)
# One byte of them is another: often a length, a type, or a version that is no more in order.
damaged_blocks = st.builds(
    lambda data, at, byte: data[: at % len(data)] + bytes([byte]) + data[at % len(data) + 1 :] if data else data,
    accepted_blocks,
    st.integers(0, 1 << 16),
    st.integers(0, 255),
)
anything = st.one_of(accepted_blocks, damaged_blocks, st.binary(max_size=4 * SLOT_SIZE))
positions = st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 100).map(lambda slots: 2**64 - 1 - SLOT_SIZE * slots))
offsets = st.integers(-(2**63), 2**63 - 1)


def events_of(encoded: Encoded) -> list[events_pb2.Event]:
    pieces = zip(encoded.offsets[:-1].tolist(), encoded.offsets[1:].tolist(), strict=True)
    batches = [events_pb2.EventBatch.FromString(encoded.data[begin:end]).events for begin, end in pieces]
    assert all(len(batch) == 1 for batch in batches)
    return [batch[0] for batch in batches]


@given(anything, positions, offsets)
def test_a_block_is_refused_or_both_encoders_agree(data: bytes, position: int, offset: int) -> None:
    try:
        block = Block("node", 2**64 - 1, position, data, offset)
    except BadRecordError:
        return
    rows = np.arange(len(block))
    expected = events_of(encode_few(block, rows.tolist()))
    assert len(expected) == len(block)
    assert events_of(encode(block, None)) == expected
    assert events_of(encode(block, rows[::2])) == expected[::2]
    told = [monitor_pb2.Notification.FromString(message).events for message in Encoder().notifications([(block, rows)])]
    assert [event for batch in told for event in batch.events] == expected
    for event in expected:
        line = json.loads(event_line(Batch("node", 2**64 - 1, [event]), event))
        assert (line["pid"], line["position"], line["comm"]) == (event.pid, event.position, event.comm)
    # What the router and the matcher look at.
    assert len(FILTER.keep(block)) == len(block)
    assert sum(map(len, block.processes.values())) <= len(block)


@given(st.lists(accepted(), min_size=1, max_size=24))
@example([])
def test_what_is_in_order_is_never_refused(records: list[bytes]) -> None:
    block = Block("node", 1, 0, b"".join(records), 0)
    assert len(block) == sum(1 for record in records if not struct.unpack_from("<I", record)[0] & RING_DISCARD)


@pytest.mark.parametrize("cut", [1, SLOT_SIZE - 1, SLOT_SIZE + 1])
def test_half_a_slot_is_refused(cut: int) -> None:
    with pytest.raises(BadRecordError):
        Block("node", 1, 0, bytes(cut), 0)
