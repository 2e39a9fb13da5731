# SPDX-License-Identifier: Apache-2.0
"""What `kmon watch` does for each event beside showing it: run a command, or signal a process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
from typing import Protocol

from kmonitor.clients.cli.jsonlines import event_line
from kmonitor.clients.cli.notify import Notifier
from kmonitor.clients.cli.output import say
from kmonitor.clients.events import Batch
from kmonitor.v1 import events_pb2
from kmonitor.wire.errors import UsageError
from kmonitor.wire.masks import TYPE_NAMES

GRACE_S = 2.0
"""Between SIGTERM and SIGKILL."""


class Action(Protocol):
    """Done once for each event."""

    async def act(self, source: Batch, event: events_pb2.Event) -> None:
        """Cancelled only if the user insists. May raise a KmonitorError, which ends the watch."""


class Command:
    """--exec: a program, in a process group of its own, with the event's JSON line on stdin and the KMON_ variables. No shell."""

    def __init__(self, command: str, limit: float) -> None:
        """`limit`: seconds that it may take. Raises UsageError if there is no such program."""
        try:
            self._argv = shlex.split(command)
        except ValueError as error:
            raise UsageError(f"--exec {command!r}: {str(error).lower()}") from None
        if not self._argv:
            raise UsageError("--exec: name a program to run")
        if shutil.which(self._argv[0]) is None:
            raise UsageError(f"--exec: there is no program {self._argv[0]!r}. No shell runs the command: for one write \"sh -c '...'\"")
        self._limit = limit

    async def act(self, source: Batch, event: events_pb2.Event) -> None:
        """Waits for the program, and reports one that fails, or takes too long."""
        line = event_line(source, event).encode() + b"\n"
        about = f"for pid {event.pid} on {source.node}"
        try:
            process = await asyncio.create_subprocess_exec(
                *self._argv, stdin=asyncio.subprocess.PIPE, env={**os.environ, **variables(source, event)}, process_group=0
            )
        except OSError as error:
            say(f"--exec: {self._argv[0]} could not be run {about}: {error.strerror}")
            return
        try:
            async with asyncio.timeout(self._limit):
                await process.communicate(line)
        except TimeoutError:
            await _end_group(process)
            say(f"--exec: the command took more than {self._limit:g} s {about}, and was ended")
            return
        except asyncio.CancelledError:
            await _end_group(process)
            say(f"--exec: the command was cut off {about}")
            raise
        if process.returncode:
            say(f"--exec: the command ended with status {process.returncode} {about}")


async def _end_group(process: asyncio.subprocess.Process) -> None:
    """End it and what it has started: in order if it heeds SIGTERM, else after GRACE_S all the same."""
    for number, limit in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                await process.wait()


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
