# SPDX-License-Identifier: Apache-2.0
"""What a subject's process is right now: asked of the node's agent, beside the guard, which may be a moment behind."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from kmonitor.clients.errors import RegistrationError
from kmonitor.clients.ha.judge import Present
from kmonitor.clients.identity import Identity
from kmonitor.clients.monitor import Monitor
from kmonitor.clients.notifications import Process, RegistrationState
from kmonitor.clients.verdict import Verdict
from kmonitor.wire.errors import KmonitorError
from kmonitor.wire.masks import EventType

LIMIT_S = 2.0


@dataclass(frozen=True, slots=True)
class Found:
    """`process` of ALIVE; `why` of UNKNOWN, one line."""

    present: Present
    process: Process | None = None
    why: str = ""

    @property
    def identity(self) -> Identity | None:
        """Which process it is."""
        return None if self.process is None else Identity(self.process.boot_id, self.process.pid, self.process.start_time)


class Lookup:
    """Asks through a monitor of its own: a registration there and back. Whoever uses it throws away what that monitor is told."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    async def look(self, verdict: Verdict) -> Found:
        """Of the subject of a verdict. An answer in LIMIT_S, or UNKNOWN."""
        try:
            async with asyncio.timeout(LIMIT_S):
                return await self._look(verdict)
        except TimeoutError:
            return Found(Present.UNKNOWN, why=f"no answer in {LIMIT_S:g} s")
        except KmonitorError as error:
            return Found(Present.UNKNOWN, why=str(error))

    async def _look(self, verdict: Verdict) -> Found:
        subject = verdict.subject
        if subject.pidfile is None:
            return Found(Present.ALIVE if verdict.alive else Present.GONE, verdict.process if verdict.alive else None)
        try:
            registration = await self._monitor.register(node=subject.node, pidfile=subject.pidfile, events=EventType.PROCESS_EXIT)
        except RegistrationError as refusal:  # an empty file, as when it is just being written
            return Found(Present.UNKNOWN, why=str(refusal))
        state = registration.states.get(subject.node)
        if state is RegistrationState.RUNNING:
            process = registration.process(subject.node)
            await self._monitor.deregister(registration)
            return Found(Present.ALIVE, process)
        if state is RegistrationState.EXITED:
            return Found(Present.GONE)
        if state is RegistrationState.NOT_FOUND:
            return Found(Present.NOTHING)
        await self._monitor.deregister(registration)  # it would be armed when the node is back
        return Found(Present.UNKNOWN, why="its node is not connected to the broker")
