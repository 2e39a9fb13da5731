# SPDX-License-Identifier: Apache-2.0
"""Notifications as JSON lines (DESIGN section 6). Event lines are put together by hand: json.dumps costs five times as much."""

from __future__ import annotations

import json
import sys
from dataclasses import fields, is_dataclass
from enum import IntEnum, IntFlag
from typing import Any

from kmonitor.clients.events import Batch
from kmonitor.clients.notifications import (
    Deregistered,
    Disconnected,
    Fresh,
    Gap,
    NodeChange,
    Notice,
    Progress,
    Reconnected,
    Registered,
    Stale,
)
from kmonitor.v1 import events_pb2
from kmonitor.wire.masks import TYPE_NAMES

_KINDS: dict[type, str] = {
    Registered: "registered",
    Deregistered: "deregistered",
    Gap: "gap",
    NodeChange: "node",
    Progress: "progress",
    Disconnected: "disconnected",
    Reconnected: "reconnected",
    Stale: "stale",
    Fresh: "fresh",
}
_CACHE_LIMIT = 4096
_BOOL = ("false", "true")


class Quoted(dict[str, str]):
    """text -> its JSON string. A few hundred names come again and again; escaping each costs more than all the rest."""

    def __missing__(self, text: str) -> str:
        if len(self) >= _CACHE_LIMIT:
            self.clear()
        quoted = self[text] = json.dumps(text)
        return quoted


_quoted = Quoted()
_dumps = json.JSONEncoder(separators=(",", ":")).encode


def event_line(source: Batch, event: events_pb2.Event) -> str:
    """One event of a batch, without the line's end."""
    kind = event.type
    line = (
        f'{{"kind":"event","node":{_quoted[source.node]},"type":"{TYPE_NAMES.get(kind, kind)}","pid":{event.pid},"tid":{event.tid},'
        f'"ppid":{event.ppid},"uid":{event.uid},"gid":{event.gid},"comm":{_quoted[event.comm]},"time":{event.time},'
        f'"start_time":{event.start_time},"cgroup_id":{event.cgroup_id},"epoch":{source.epoch},"position":{event.position},'
        f'"inferred":{_BOOL[event.inferred]},"boot_id":{_quoted[source.boot_id]}'
    )
    if kind in (0x08, 0x01):
        return f'{line},"child_pid":{event.child_pid},"child_tid":{event.child_tid},"child_start_time":{event.child_start_time}}}'
    if kind == 0x20:
        args = ",".join(map(_quoted.__getitem__, event.args))
        return f'{line},"filename":{_quoted[event.filename]},"args":[{args}],"args_truncated":{_BOOL[event.args_truncated]}}}'
    code = event.exit_code if event.HasField("exit_code") else "null"
    number = event.exit_signal if event.HasField("exit_signal") else "null"
    killed_by = "null"
    if event.HasField("killed_by"):
        sender = event.killed_by
        killed_by = f'{{"pid":{sender.pid},"comm":{_quoted[sender.comm]},"uid":{sender.uid}}}'
    return (
        f'{line},"exit_code":{code},"exit_signal":{number},"core_dumped":{_BOOL[event.core_dumped]},'
        f'"oom_killed":{_BOOL[event.oom_killed]},"killed_by":{killed_by}}}'
    )


def notice_line(notice: Notice) -> str:
    """Any other notification, without the line's end."""
    return _dumps({"kind": _KINDS[type(notice)], **_plain(notice)})


def _plain(value: Any) -> Any:
    if isinstance(value, (IntEnum, IntFlag)):
        return value.name
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value) if field.repr}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


class JsonLines:
    """Writes to stdout. Flushed at the end of each batch and notice: each line at once when events trickle, and one write for
    hundreds of lines in a storm."""

    def __init__(self, *, progress: bool) -> None:
        self._progress = progress
        self._out = sys.stdout.buffer

    def batch(self, batch: Batch, limit: int) -> None:
        """The first `limit` events. Raises OutputError."""
        events = batch.events
        lines = [event_line(batch, event) for event in (events if limit >= len(events) else events[:limit])]
        lines.append("")
        self._out.write("\n".join(lines).encode())
        self._out.flush()

    def notice(self, notice: Notice) -> None:
        """Raises OutputError."""
        if self._progress or not isinstance(notice, Progress):
            self._out.write(f"{notice_line(notice)}\n".encode())
            self._out.flush()
