# SPDX-License-Identifier: Apache-2.0
"""Stretches of a ring as a busy node makes them, thousands a second: records in the layout of kmonitor.wire.record."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kmonitor.wire.masks import EventType
from kmonitor.wire.record import F_MATCH_NODE, F_MATCH_PROCESS, RECORD_VERSION, RING_HEADER_SIZE, SLOT_DTYPE, SLOT_SIZE, Indices, Slots
from kmonitor.wire.varint import varint

FIRST_PID = 100_000
"""Of the watched processes: the others' pids are below."""
LAST = b"bench-last"
"""Name of the process of a stream's last record for each monitor: by it monitors find the end, and its bytes are nowhere else."""
BOOT_ID = "0f7a2f55-3d5e-4c0e-9d3a-0e1a9bb7a001"
START_STEP_NS = 1000
"""A process has started at its pid times this, boot-time clock."""
_TEMPLATES = 8
_BOOTTIME_NS = 3_600_000_000_000
OFFSET_NS = 1_700_000_000_000_000_000
_EXEC_TAIL = b"/usr/bin/python3\0python3\0-m\0http.server\0--bind\0127.0.0.1\x008080\0"
_FILENAME_LEN = len(b"/usr/bin/python3\0")


@dataclass(frozen=True, slots=True)
class Shape:
    """What one node's stream looks like."""

    slots: int = 1000
    """A block. A record takes one, an exec's two."""
    watched: int = 0
    """Processes that are registered one by one: pids from FIRST_PID on."""
    every: int = 0
    """One of so many records is of one of those, in turn; 0: none is. All others are asked for node-wide."""
    execs: float = 0.0
    """Share of execs among the records."""
    owners: int = 1
    """Monitors, of which each has registered the same number of neighbours among the watched processes."""


class Stream:
    """One node's blocks as serialised AgentMessages. Each has another position, and its watched records are of other processes."""

    def __init__(self, shape: Shape, position: int) -> None:
        """`position` of the first block's first byte."""
        self.position = position
        self.records = 0
        """Records made so far."""
        self.watched = 0
        """... of watched processes."""
        self._shape = shape
        self._templates, self._pids = _prepared(shape)
        self._turn = 0
        self._made = 0

    def message(self, *, last: bool = False) -> bytes:
        """The next block. `last`: with the records that tell each monitor that nothing comes any more."""
        template = self._templates[self._made % _TEMPLATES]
        self._made += 1
        struct.pack_into("<Q", template.message, template.position_at, self.position)
        slots, rows = template.slots, template.watched
        if len(rows):
            at = (self._turn + np.arange(len(rows))) % len(self._pids)
            self._turn = int(at[-1]) + 1
            slots["tgid"][rows] = slots["tid"][rows] = self._pids[at]
            slots["start_boottime_ns"][rows] = self._pids[at] * np.uint64(START_STEP_NS)
        self.position += template.size
        self.records += template.records
        self.watched += len(rows)
        return self._with_end(template) if last else bytes(template.message)

    def _with_end(self, template: _Template) -> bytes:
        """The block's last records say so: one that is of everybody, or of the first process of each owner."""
        slots, rows = template.slots, template.starts
        saved = slots.copy()
        kept = int((slots["flags"][rows] & F_MATCH_PROCESS != 0).sum())
        ends = rows[-(self._shape.owners if self._shape.every else 1) :]
        slots["type"][ends[slots["type"][ends] != EventType.PROCESS_EXEC]] = EventType.PROCESS_FORK
        slots["comm"][ends] = LAST
        if self._shape.every:
            each = self._shape.watched // self._shape.owners
            pids = (FIRST_PID + np.arange(self._shape.owners) * each).astype(np.uint32)
            slots["flags"][ends] = F_MATCH_PROCESS
            slots["tgid"][ends] = slots["tid"][ends] = pids
            slots["start_boottime_ns"][ends] = pids * np.uint64(START_STEP_NS)
            self.watched += int((slots["flags"][rows] & F_MATCH_PROCESS != 0).sum()) - kept
        message = bytes(template.message)
        slots[:] = saved
        return message


@functools.cache
def _prepared(shape: Shape) -> tuple[list[_Template], npt.NDArray[np.uint32]]:
    """Used by all streams of a shape, one after the other; and the watched pids in the order in which something happens to them."""
    rng = np.random.default_rng(0)
    templates = [_Template(shape, rng) for _ in range(_TEMPLATES)]
    # Neighbours in time are not neighbours by pid, as on a node.
    return templates, FIRST_PID + rng.permutation(shape.watched).astype(np.uint32)


class _Template:
    """A message to be used again and again: only positions and watched processes change."""

    def __init__(self, shape: Shape, rng: np.random.Generator) -> None:
        slots, self.starts = _slots(shape, rng)
        self.size = shape.slots * SLOT_SIZE
        # AgentMessage.block (2), a Block: position (1), data (2), boottime_to_unix_ns (3).
        head = b"\x09" + bytes(8) + b"\x12" + varint(self.size)
        tail = b"\x19" + struct.pack("<q", OFFSET_NS)
        front = b"\x12" + varint(len(head) + self.size + len(tail))
        self.position_at = len(front) + 1
        self.message = bytearray(front + head + slots.tobytes() + tail)
        data = memoryview(self.message)[len(front) + len(head) : len(front) + len(head) + self.size]
        self.slots: Slots = np.frombuffer(data, dtype=SLOT_DTYPE)
        self.records = len(self.starts)
        self.watched: Indices = self.starts[self.slots["flags"][self.starts] & F_MATCH_PROCESS != 0]


def block_data(shape: Shape, count: int) -> list[bytes]:
    """The first `count` different blocks as bytes of the ring, without anything around them."""
    rng = np.random.default_rng(0)
    return [_slots(shape, rng)[0].tobytes() for _ in range(count)]


def _slots(shape: Shape, rng: np.random.Generator) -> tuple[Slots, Indices]:
    """A block's slots, and in which of them a record begins."""
    count = shape.slots
    spans = np.where(rng.random(count) < shape.execs, 2, 1)
    starts = np.concatenate(([0], np.cumsum(spans)))
    starts = starts[starts < count].astype(np.intp)
    spans = np.diff(np.append(starts, count))  # an exec that does not fit any more is no exec
    slots = np.zeros(count, dtype=SLOT_DTYPE)
    records = slots[starts]
    number = np.arange(len(starts))
    watched = (number % shape.every == shape.every - 1) if shape.every else np.zeros(len(starts), dtype=bool)
    kinds = np.array([EventType.PROCESS_FORK, EventType.PROCESS_EXIT, EventType.THREAD_CREATE, EventType.THREAD_EXIT], dtype=np.uint8)
    records["type"] = rng.choice(kinds, len(starts), p=(0.35, 0.35, 0.15, 0.15))
    # The end of a watched process ends its registration, and each has but one: it does other things here.
    records["type"][watched & (records["type"] == EventType.PROCESS_EXIT)] = EventType.PROCESS_FORK
    records["type"][spans == 2] = EventType.PROCESS_EXEC
    records["version"] = RECORD_VERSION
    records["ring_length"] = spans * SLOT_SIZE - RING_HEADER_SIZE
    records["flags"] = np.where(watched, F_MATCH_PROCESS, F_MATCH_NODE)
    records["boottime_ns"] = _BOOTTIME_NS + number * 1000
    pids = rng.integers(300, FIRST_PID, len(starts))
    records["tgid"] = records["tid"] = pids
    records["start_boottime_ns"] = pids * START_STEP_NS
    records["ppid"], records["uid"], records["gid"] = rng.integers(1, 300, len(starts)), 1000, 1000
    records["cgroup_id"] = rng.integers(1000, 1100, len(starts))
    records["comm"] = rng.choice(np.array([b"sh", b"python3", b"postgres", b"nginx", b"kworker-helper"], dtype="S16"), len(starts))
    ends = (records["type"] == EventType.PROCESS_EXIT) | (records["type"] == EventType.THREAD_EXIT)
    records["status"] = np.where(ends & (rng.random(len(starts)) < 0.1), 1 << 8, 0)
    forks = (records["type"] == EventType.PROCESS_FORK) | (records["type"] == EventType.THREAD_CREATE)
    records["child_tgid"] = records["child_tid"] = np.where(forks, pids + 1, 0)
    records["child_start_boottime_ns"] = np.where(forks, _BOOTTIME_NS, 0)
    execs = spans == 2
    records["filename_len"], records["args_len"] = execs * _FILENAME_LEN, execs * (len(_EXEC_TAIL) - _FILENAME_LEN)
    slots[starts] = records
    raw = slots.view(np.uint8).reshape(count, SLOT_SIZE)
    raw[starts[execs] + 1, : len(_EXEC_TAIL)] = np.frombuffer(_EXEC_TAIL, dtype=np.uint8)
    return slots, starts
