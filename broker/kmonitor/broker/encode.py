# SPDX-License-Identifier: Apache-2.0
"""Blocks to protobuf: each record is encoded about once, whatever the number of monitors.

The bytes mean `Notification{events: EventBatch{node, epoch, events, boot_id}}` (protobuf.dev/programming-guides/encoding).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from kmonitor.broker.block import Block
from kmonitor.broker.elements import Encoded
from kmonitor.broker.encode_few import encode_few
from kmonitor.broker.encode_usual import encode
from kmonitor.wire.record import Indices
from kmonitor.wire.varint import varint

MAX_MESSAGE = 1 << 20
"""Bytes of events in one Notification; one event that is longer still goes, alone."""
DEFAULT_CACHE_BYTES = 64 << 20

# What encoding takes, microseconds: a record by itself, a call for several together, and each of those.
_ALONE_US, _CALL_US, _TOGETHER_US = 7.0, 90.0, 0.2
_CUT_ONE_BY_ONE = 32  # so few rows are cut out one by one


class Encoder:
    """Encodes blocks, and keeps what it encoded while there is room: `cache_bytes`, least recently used goes first."""

    def __init__(self, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.cache_bytes = cache_bytes
        self.cached_bytes = 0
        self._cached: OrderedDict[int, Block] = OrderedDict()

    def notifications(self, parts: Sequence[tuple[Block, Indices]]) -> list[bytes]:
        """Serialised Notifications with the given rows (ascending), in order. All blocks are of one node, boot and epoch."""
        pieces: list[bytes] = []
        size = 0
        out: list[bytes] = []
        first = parts[0][0]
        for block, rows in parts:
            for piece in self._elements(block, rows):
                if pieces and size + len(piece) > MAX_MESSAGE:
                    out.append(_notification(first, pieces))
                    pieces, size = [], 0
                pieces.append(piece)
                size += len(piece)
        if pieces:
            out.append(_notification(first, pieces))
        return out

    def _elements(self, block: Block, rows: Indices) -> Iterable[bytes]:
        """The rows' elements, in pieces of at most MAX_MESSAGE bytes or one element."""
        count = len(rows)
        if count == 0:
            return
        encoded = self._encoded(block, rows)
        if len(encoded.offsets) - 1 == count:  # all that was encoded is wanted
            if len(encoded.data) <= MAX_MESSAGE:
                yield encoded.data
                return
            offsets = encoded.offsets
            first = 0
            while first < count:
                last = max(int(np.searchsorted(offsets, offsets[first] + MAX_MESSAGE, side="right")) - 1, first + 1)
                yield encoded.data[int(offsets[first]) : int(offsets[last])]
                first = last
            return
        begins = encoded.offsets[rows]
        lengths = encoded.offsets[rows + 1] - begins
        ends = np.cumsum(lengths)
        first, done = 0, 0
        while first < count:
            last = max(int(np.searchsorted(ends, done + MAX_MESSAGE, side="right")), first + 1)
            yield _gather(encoded.data, begins[first:last], lengths[first:last])
            first, done = last, int(ends[last - 1])

    def _encoded(self, block: Block, rows: Indices) -> Encoded:
        """Of the whole block, from the cache if it is there; or of just these rows, when they are few of many."""
        found = block.encoded
        if isinstance(found, Encoded):
            self._cached.move_to_end(id(block))
            return found
        whole = min(len(block) * _ALONE_US, _CALL_US + len(block) * _TOGETHER_US)
        alone, together = len(rows) * _ALONE_US, _CALL_US + len(rows) * _TOGETHER_US
        # Others may want others of its rows: those are encoded by themselves until that has taken as long as all of them would have.
        if len(rows) < len(block) and block.partly_encoded_us + min(alone, together) <= whole:
            block.partly_encoded_us += min(alone, together)
            return encode_few(block, rows.tolist()) if alone <= together else encode(block, rows)
        encoded = encode_few(block, range(len(block))) if len(block) * _ALONE_US <= whole else encode(block, None)
        self._keep(block, encoded)
        return encoded

    def _keep(self, block: Block, encoded: Encoded) -> None:
        block.encoded = encoded
        self._cached[id(block)] = block
        self.cached_bytes += encoded.size
        while self.cached_bytes > self.cache_bytes and len(self._cached) > 1:
            self.drop(next(iter(self._cached.values())))

    def drop(self, block: Block) -> None:
        """Forget what was encoded of a block."""
        if isinstance(block.encoded, Encoded):
            self.cached_bytes -= block.encoded.size
            block.encoded = None
            del self._cached[id(block)]


def _gather(data: bytes, begins: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> bytes:
    if len(begins) <= _CUT_ONE_BY_ONE:
        return b"".join([data[at : at + size] for at, size in zip(begins.tolist(), lengths.tolist(), strict=True)])
    ends = np.cumsum(lengths)
    index = np.repeat(begins - (ends - lengths), lengths) + np.arange(int(ends[-1]))
    return np.frombuffer(data, dtype=np.uint8)[index].tobytes()


def _notification(block: Block, pieces: list[bytes]) -> bytes:
    """Elements of this block, and of others of its node, boot and epoch."""
    name, boot_id = block.node.encode(), block.boot_id.encode()
    head = b"\x0a" + varint(len(name)) + name + b"\x11" + block.epoch.to_bytes(8, "little")  # EventBatch.node, .epoch
    tail = b"\x22" + varint(len(boot_id)) + boot_id if boot_id else b""  # EventBatch.boot_id: behind .events, as protobuf has it
    size = len(head) + sum(map(len, pieces)) + len(tail)
    return b"".join((b"\x0a", varint(size), head, *pieces, tail))  # Notification.events
