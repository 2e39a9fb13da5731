# SPDX-License-Identifier: Apache-2.0
"""A guard: for each of some processes, wherever they run, is it alive, since when, why did it die, and how sure is that."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from kmonitor.clients.monitor import Monitor
from kmonitor.clients.verdict import Subject, Verdict


class ProcessGuard:
    """Guards subjects through one monitor, whose iteration is then the guard's.

    async with connect() as monitor, ProcessGuard(monitor) as guard:
        await guard.add(Subject("web", node="alpha", pidfile="/run/web.pid"))
        async for verdict in guard:
            ...

    Iteration gives a verdict whenever `life`, `process`, `alive` or `blind` of a subject has changed, in the order in which that
    became known. A consumer that is slow misses none: the queue is of changes, and those are few.

    A pid is followed to its end, which is final. A pidfile, unit or control group goes on: DEAD is followed by ALIVE, with another
    process, when it is back. (For a pidfile that means that the agent reads it again every `look_again` seconds while it is not ALIVE;
    a new process that the file names while the old one still lives is found only when that one has ended.)

    While the watch is blind a verdict keeps its `life`, and says why and since when in `blind`. When sight is back, what was missed is
    told: a process that ended meanwhile with its cause if the log has it, else as inferred.
    """

    def __init__(self, monitor: Monitor, *, look_again: float = 0.2) -> None:
        raise NotImplementedError

    async def add(self, *subjects: Subject) -> None:
        """Guard these too. Returns when the broker has answered for each: its first verdict is then to be had from `verdict`, and
        comes in the iteration. Raises UsageError for a name that is there already, and what `Monitor.register` raises: then none of
        these is guarded."""
        raise NotImplementedError

    async def remove(self, name: str) -> None:
        """Guard it no more. Nothing of it comes in the iteration after that. Raises KeyError."""
        raise NotImplementedError

    def verdict(self, name: str) -> Verdict:
        """As it is known now. Raises KeyError."""
        raise NotImplementedError

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """Of all subjects, by name."""
        raise NotImplementedError

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Verdict:
        """Raises what ends the monitor (ClosedError, BrokerUnreachableError, NotAuthorisedError, ...); StopAsyncIteration when the guard was
        closed."""
        raise NotImplementedError

    async def close(self) -> None:
        """End the guard; the monitor is the caller's."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        raise NotImplementedError

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()
