# SPDX-License-Identifier: Apache-2.0
"""The one piece of protobuf's encoding that both ends need where messages are put together from parts that lie in memory already."""

from __future__ import annotations


def varint(value: int) -> bytes:
    """A number of at least 0, seven bits a byte (protobuf.dev/programming-guides/encoding)."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
