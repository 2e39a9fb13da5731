# SPDX-License-Identifier: Apache-2.0
"""A long message in several short ones: gRPC bounds the size of each, and nobody else is served while one is made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from google.protobuf.message import Message

PART_BYTES = 1 << 18
"""Of one part, about."""
_FRAME = 4
"""Bytes around an item of a message, at most: its tag and its length."""

M = TypeVar("M", bound=Message)


def parts_of(whole: M, *lists: str) -> Iterator[M]:
    """Yield a message in parts of about PART_BYTES, each but the last marked as followed by `more`.

    `lists` are its repeated fields of messages: each item goes into one part. All other fields are in every part. Receivers put the
    parts together with `MergeFrom`.
    """
    head: Any = type(whole)()
    for field, value in whole.ListFields():
        if field.name not in lists:
            setattr(head, field.name, value)
    head.more = True

    def begin() -> Any:
        part = type(whole)()
        part.CopyFrom(head)
        return part

    part, size = begin(), 0
    for name in lists:
        for item in getattr(whole, name):
            if size >= PART_BYTES:
                yield part
                part, size = begin(), 0
            getattr(part, name).append(item)
            size += item.ByteSize() + _FRAME
    part.more = False
    yield part
