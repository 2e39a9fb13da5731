# SPDX-License-Identifier: Apache-2.0
"""What `kmon watch` does for each event beside showing it: run a command, or signal a process."""

from __future__ import annotations

import asyncio
import os
from typing import Protocol

from kmonitor.clients.cli.jsonlines import event_line
from kmonitor.clients.cli.notify import Notifier
from kmonitor.clients.cli.options import say
from kmonitor.clients.events import Batch
from kmonitor.v1 import events_pb2
from kmonitor.wire.masks import TYPE_NAMES


class Action(Protocol):
    """Done once for each event of a batch, in order; the next event waits for it."""

    async def act(self, source: Batch, event: events_pb2.Event) -> None:
        """Let end once it was begun. May raise a KmonitorError, which ends the watch."""


class Command:
    """--exec: `sh -c COMMAND`, one at a time, with the event's JSON line on stdin and the KMON_ variables."""

    def __init__(self, command: str) -> None:
        self._command = command

    async def act(self, source: Batch, event: events_pb2.Event) -> None:
        """Waits for the command, and reports one that fails."""
        line = event_line(source, event).encode() + b"\n"
        process = await asyncio.create_subprocess_shell(
            self._command, stdin=asyncio.subprocess.PIPE, env={**os.environ, **variables(source, event)}
        )
        await process.communicate(line)
        if process.returncode:
            say(f"--exec: the command ended with status {process.returncode} for pid {event.pid} on {source.node}")


def variables(source: Batch, event: events_pb2.Event) -> dict[str, str]:
    """KMON_NODE, _TYPE, _PID, _TID, _PPID, _UID, _GID, _COMM, _TIME, _START_TIME, _BOOT_ID, _INFERRED, and by type _CHILD_PID,
    _CHILD_TID, _FILENAME, _EXIT_CODE, _EXIT_SIGNAL."""
    found: dict[str, object] = {
        "NODE": source.node,
        "TYPE": TYPE_NAMES.get(event.type, event.type),
        "PID": event.pid,
        "TID": event.tid,
        "PPID": event.ppid,
        "UID": event.uid,
        "GID": event.gid,
        "COMM": event.comm,
        "TIME": event.time,
        "START_TIME": event.start_time,
        "BOOT_ID": source.boot_id,
        "INFERRED": int(event.inferred),
    }
    if event.child_pid:
        found |= {"CHILD_PID": event.child_pid, "CHILD_TID": event.child_tid}
    if event.filename:
        found["FILENAME"] = event.filename
    if event.HasField("exit_code"):
        found["EXIT_CODE"] = event.exit_code
    if event.HasField("exit_signal"):
        found["EXIT_SIGNAL"] = event.exit_signal
    return {f"KMON_{name}": str(value).replace("\0", "") for name, value in found.items()}


class Signal:
    """--signal and --notify."""

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier

    async def act(self, source: Batch, event: events_pb2.Event) -> None:
        """Raises UsageError if the receiver is gone. A full queue is told once, and then each time that the loss has doubled."""
        if not self._notifier.send(event.type, event.pid, event.uid):
            lost = self._notifier.lost
            if lost & (lost - 1) == 0:
                say(f"--notify: the signal queue of {self._notifier.pid} is full, {lost} lost so far (see RLIMIT_SIGPENDING)")
