# SPDX-License-Identifier: Apache-2.0
"""A block as the bytes of its AgentMessage: copied once, from the ring."""

from __future__ import annotations

from kmonitor.v1 import agent_pb2
from kmonitor.wire.varint import varint

_LEN = 2  # wire type: protobuf.dev/programming-guides/encoding
_DATA = bytes([agent_pb2.Block.DATA_FIELD_NUMBER << 3 | _LEN])
_BLOCK = bytes([agent_pb2.AgentMessage.BLOCK_FIELD_NUMBER << 3 | _LEN])


def block_frame(position: int, data: bytes | memoryview, boottime_to_unix_ns: int) -> bytes:
    """What `AgentMessage(block=Block(...)).SerializeToString()` means: the fields stand in another order. Setting `data` in a message,
    that in another, and serialising it, would copy it three times."""
    rest = agent_pb2.Block(position=position, boottime_to_unix_ns=boottime_to_unix_ns).SerializeToString()
    head = rest + _DATA + varint(len(data))
    return b"".join((_BLOCK, varint(len(head) + len(data)), head, data))
