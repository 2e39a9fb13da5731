# SPDX-License-Identifier: Apache-2.0
"""What is done for events, some of it at the same time, and up to where the stream is dealt with: in order, whatever ends first."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from kmonitor.wire.errors import KmonitorError

PENDING_MOST = 1024
"""So much may have ended behind something that has not. Then nothing is begun until that has ended."""

T = TypeVar("T")


class Jobs(Generic[T]):
    """At most `most` at a time. `done` is called with each item, in the order in which they came, when it and all before it are dealt
    with; what it raises ends all."""

    def __init__(self, most: int, done: Callable[[T], None]) -> None:
        self._most = most
        self._done = done
        self._pending: deque[tuple[T, asyncio.Task[None] | None]] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._failure: KmonitorError | None = None

    async def begin(self, item: T, work: Coroutine[Any, Any, None]) -> None:
        """Returns when there is room for the next. If it is cancelled the work goes on: see `finish`. Raises what earlier work has
        raised."""
        task = asyncio.create_task(work)
        self._running.add(task)
        self._pending.append((item, task))
        task.add_done_callback(self._ended)
        while len(self._running) >= self._most or len(self._pending) >= PENDING_MOST:
            self._check()
            await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
        self._check()

    def passed(self, item: T) -> None:
        """There is nothing to do for this one. Raises as `begin`."""
        self._pending.append((item, None))
        self._settle()
        self._check()

    async def finish(self) -> KmonitorError | None:
        """Wait for all that was begun. If that is cancelled it is cancelled too, and waited for. Returns what earlier work has raised."""
        try:
            while self._running:
                await asyncio.wait(self._running)
        except asyncio.CancelledError:
            while self._running:
                for task in self._running:
                    task.cancel()
                await asyncio.wait(self._running)
            raise
        return self._failure

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if not isinstance(error, KmonitorError):
                raise error
            self._failure = self._failure or error
        self._settle()

    def _settle(self) -> None:
        """What was cut off, or failed, was not dealt with, nor is anything behind it."""
        while self._pending and self._failure is None:
            item, task = self._pending[0]
            if task is not None and (not task.done() or task.cancelled()):
                return
            self._pending.popleft()
            try:
                self._done(item)
            except KmonitorError as error:
                self._failure = error

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
