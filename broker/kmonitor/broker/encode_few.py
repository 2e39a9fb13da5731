# SPDX-License-Identifier: Apache-2.0
"""A handful of records to protobuf, one by one: a single exit must not wait for some hundred array operations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kmonitor.broker.block import Block
from kmonitor.broker.elements import Encoded
from kmonitor.v1 import events_pb2
from kmonitor.wire.masks import EventType
from kmonitor.wire.record import F_ARGS_TRUNCATED, F_INFERRED, F_KILLED_BY, F_OOM_KILLED, SLOT_DTYPE, SLOT_SIZE, TAIL_OFFSET
from kmonitor.wire.varint import varint

_CHILD = int(EventType.PROCESS_FORK | EventType.THREAD_CREATE)
_ENDS = int(EventType.THREAD_ABORT | EventType.THREAD_EXIT | EventType.PROCESS_ABORT | EventType.PROCESS_EXIT)
_EXITS = int(EventType.THREAD_EXIT | EventType.PROCESS_EXIT)
_EXEC = int(EventType.PROCESS_EXEC)
_NAMES = SLOT_DTYPE.names or ()


def encode_few(block: Block, rows: Sequence[int]) -> Encoded:
    """The same as `encode.encode`, for few rows."""
    elements: list[bytes] = []
    offsets = [0]
    for row in rows:
        slot = row if block.starts is None else int(block.starts[row])
        raw = event(block, slot).SerializeToString()
        element = b"\x1a" + varint(len(raw)) + raw  # EventBatch.events
        elements.append(element)
        offsets.append(offsets[-1] + len(element))
    return Encoded(b"".join(elements), np.array(offsets, dtype=np.int64))


def event(block: Block, slot: int) -> events_pb2.Event:
    """The record that begins in a slot."""
    fields = dict(zip(_NAMES, block.slots[slot].item(), strict=True))
    kind, flags, status = fields["type"], fields["flags"], fields["status"]
    made = events_pb2.Event(
        position=block.position + slot * SLOT_SIZE,
        type=kind,
        pid=fields["tgid"],
        tid=fields["tid"],
        ppid=fields["ppid"],
        uid=fields["uid"],
        gid=fields["gid"],
        comm=_text(fields["comm"]),
        time=fields["boottime_ns"] + block.boottime_to_unix_ns & 0xFFFFFFFFFFFFFFFF,
        start_time=fields["start_boottime_ns"],
        cgroup_id=fields["cgroup_id"],
    )
    if kind & _CHILD:
        made.child_pid = fields["child_tgid"]
        made.child_tid = fields["child_tid"]
        made.child_start_time = fields["child_start_boottime_ns"]
    elif kind & _ENDS:
        made.oom_killed = bool(flags & F_OOM_KILLED)
        if flags & F_INFERRED:
            pass  # no status is known
        elif signal := status & 0x7F:
            made.exit_signal = signal
            made.core_dumped = bool(status & 0x80)
            if flags & F_KILLED_BY:
                killer = events_pb2.KilledBy(pid=fields["killer_tgid"], comm=_text(fields["killer_comm"]), uid=fields["killer_uid"])
                made.killed_by.CopyFrom(killer)
        elif kind & _EXITS:
            made.exit_code = status >> 8 & 0xFF
    elif kind == _EXEC:
        begin = slot * SLOT_SIZE + TAIL_OFFSET
        middle = begin + fields["filename_len"]
        made.filename = _text(block.data[begin:middle])
        if fields["args_len"]:
            args = block.data[middle : middle + fields["args_len"]].removesuffix(b"\0").split(b"\0")
            made.args.extend(arg.decode("utf-8", "replace") for arg in args)
        made.args_truncated = bool(flags & F_ARGS_TRUNCATED)
    made.inferred = bool(flags & F_INFERRED)
    return made


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")
