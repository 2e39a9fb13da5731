# SPDX-License-Identifier: Apache-2.0
"""Blocks made by hand, and a decoder that goes record by record: what the vectorised code is held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kmonitor.v1 import events_pb2
from kmonitor.wire.record import (
    F_ARGS_TRUNCATED,
    F_INFERRED,
    F_KILLED_BY,
    F_MATCH_NODE,
    F_OOM_KILLED,
    RECORD_VERSION,
    RING_HEADER_SIZE,
    SLOT_DTYPE,
    SLOT_SIZE,
)

THREAD_CREATE, THREAD_ABORT, THREAD_EXIT, FORK, ABORT, EXEC, EXIT = (1 << bit for bit in range(7))


@dataclass
class Rec:
    """One record to be: the fields of kmonitor.wire.record.SLOT_DTYPE, and an exec's strings."""

    fields: dict[str, Any]
    filename: bytes = b""
    args: tuple[bytes, ...] = ()


def rec(
    kind: int, tgid: int = 100, *, flags: int = F_MATCH_NODE, filename: bytes = b"", args: tuple[bytes, ...] = (), **fields: Any
) -> Rec:
    """A record with plausible values for what is not given."""
    defaults = {
        "tgid": tgid,
        "tid": tgid,
        "ppid": 1,
        "uid": 1000,
        "gid": 1000,
        "comm": b"work",
        "boottime_ns": 5_000,
        "start_boottime_ns": tgid * 10,
    }
    return Rec({**defaults, **fields, "type": kind, "flags": flags}, filename, args)


def build(records: list[Rec]) -> bytes:
    """The stretch of ring that holds these records."""
    out = []
    for item in records:
        filename = item.filename + b"\0" if item.filename or item.args else b""
        args = b"".join(arg + b"\0" for arg in item.args)
        tail = filename + args
        slots = 1 + -(-len(tail) // SLOT_SIZE)
        head = np.zeros(1, dtype=SLOT_DTYPE)
        for name, value in item.fields.items():
            head[name] = value
        head["version"] = RECORD_VERSION
        head["ring_length"] = slots * SLOT_SIZE - RING_HEADER_SIZE
        head["filename_len"] = len(filename)
        head["args_len"] = len(args)
        out.append(head.tobytes() + tail.ljust((slots - 1) * SLOT_SIZE, b"\0"))
    return b"".join(out)


def positions(records: list[Rec], start: int = 0) -> list[int]:
    """Where each record lies, if the first is at `start`."""
    out = []
    for item in records:
        out.append(start)
        start += len(build([item]))
    return out


def naive_event(data: bytes, position: int, shift: int) -> events_pb2.Event:
    """Decode the one record at the beginning of `data`. `shift`: boot time to Unix, nanoseconds."""
    slot = np.frombuffer(data[:SLOT_SIZE], dtype=SLOT_DTYPE)[0]
    kind, flags, status = int(slot["type"]), int(slot["flags"]), int(slot["status"])
    event = events_pb2.Event(
        position=position,
        type=kind,  # type: ignore[arg-type]
        pid=int(slot["tgid"]),
        tid=int(slot["tid"]),
        ppid=int(slot["ppid"]),
        uid=int(slot["uid"]),
        gid=int(slot["gid"]),
        comm=_text(data[72:88]),
        time=int(slot["boottime_ns"]) + shift,
        start_time=int(slot["start_boottime_ns"]),
        cgroup_id=int(slot["cgroup_id"]),
        inferred=bool(flags & F_INFERRED),
    )
    if kind in {FORK, THREAD_CREATE}:
        event.child_pid = int(slot["child_tgid"])
        event.child_tid = int(slot["child_tid"])
        event.child_start_time = int(slot["child_start_boottime_ns"])
    if kind == EXEC:
        begin, middle = SLOT_SIZE, SLOT_SIZE + int(slot["filename_len"])
        end = middle + int(slot["args_len"])
        event.filename = _text(data[begin:middle])
        if end > middle:
            event.args.extend(arg.decode("utf-8", "replace") for arg in data[middle : end - 1].split(b"\0"))
        event.args_truncated = bool(flags & F_ARGS_TRUNCATED)
    if kind in {EXIT, ABORT, THREAD_EXIT, THREAD_ABORT}:
        event.oom_killed = bool(flags & F_OOM_KILLED)
        if not flags & F_INFERRED:
            if status & 0x7F:
                event.exit_signal = status & 0x7F
                event.core_dumped = bool(status & 0x80)
                if flags & F_KILLED_BY:
                    event.killed_by.SetInParent()
                    event.killed_by.pid = int(slot["killer_tgid"])
                    event.killed_by.uid = int(slot["killer_uid"])
                    event.killed_by.comm = _text(data[96:112])
            elif kind in {EXIT, THREAD_EXIT}:
                event.exit_code = status >> 8 & 0xFF
    return event


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")
