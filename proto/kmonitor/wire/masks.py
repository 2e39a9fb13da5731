# SPDX-License-Identifier: Apache-2.0
"""Event types and masks: the bits of the 2004 driver (DESIGN section 4)."""

from __future__ import annotations

import enum
from collections.abc import Iterable

from kmonitor.wire.errors import BadMaskError


class EventType(enum.IntFlag):
    """An event's type (one bit) or a mask of them. The values are those of `kmonitor.v1.EventType`."""

    THREAD_CREATE = 0x01
    THREAD_ABORT = 0x02
    THREAD_EXIT = 0x04
    PROCESS_FORK = 0x08
    PROCESS_ABORT = 0x10
    PROCESS_EXEC = 0x20
    PROCESS_EXIT = 0x40


ALL_EVENTS = 0x7F
THREAD_EVENTS = 0x07
PROCESS_EVENTS = 0x78
DEFAULT_EVENTS = PROCESS_EVENTS

_SHORT = {
    "thread-create": 0x01,
    "thread-abort": 0x02,
    "thread-exit": 0x04,
    "fork": 0x08,
    "abort": 0x10,
    "exec": 0x20,
    "exit": 0x40,
    "process": PROCESS_EVENTS,
    "thread": THREAD_EVENTS,
    "all": ALL_EVENTS,
}
for _member in EventType:
    _SHORT[str(_member.name).lower().replace("_", "-")] = int(_member)

TYPE_NAMES: dict[int, str] = {int(member): str(member.name) for member in EventType}
"""Bit -> name as in DESIGN section 4 and in JSON lines: 0x40 -> "PROCESS_EXIT"."""


def check_mask(mask: int) -> int:
    """Return `mask`, or raise BadMaskError if it is zero or has bits that mean nothing."""
    if mask == 0:
        raise BadMaskError("the event mask is empty: name at least one event (0x40 is PROCESS_EXIT, 0x7f is all)")
    if mask < 0:
        raise BadMaskError(f"event mask {mask} is negative: the bits are {ALL_EVENTS:#x}")
    if mask & ~ALL_EVENTS:
        raise BadMaskError(f"unknown bits {mask & ~ALL_EVENTS:#x} in event mask {mask:#x}: the known ones are {ALL_EVENTS:#x}")
    return mask


def parse_mask(text: str) -> int:
    """A mask from "exit,abort", "0x60", "96" or "all". Raises BadMaskError."""
    mask = 0
    for word in text.split(","):
        name = word.strip().lower().replace("_", "-")
        if name in _SHORT:
            mask |= _SHORT[name]
            continue
        try:
            mask |= check_mask(int(name, 0))
        except ValueError:
            known = ",".join(short for short in _SHORT if not short.startswith("process-"))
            raise BadMaskError(f"unknown event {word.strip()!r}: use some of {known}, or a number such as 0x60") from None
    return check_mask(mask)


def mask_names(mask: int) -> list[str]:
    """The names of the bits of `mask`, lowest bit first."""
    return [name for bit, name in TYPE_NAMES.items() if mask & bit]


def bits(mask: int) -> Iterable[int]:
    """The single bits of `mask`, lowest first."""
    return (bit for bit in TYPE_NAMES if mask & bit)
