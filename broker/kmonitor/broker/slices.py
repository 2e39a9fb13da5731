# SPDX-License-Identifier: Apache-2.0
"""How much of the event loop's time what monitors ask for may take: all of them together a slice of each turn, and new streams first.

After a restart thousands of registrations come at once, and hundreds of agents. Nobody is told of a process of a node before its agent
is there; gRPC hands over one new stream at a time, which takes several turns of the loop, and agents may stand behind monitors there.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

SLICE_S = 0.01
"""Of a turn of the loop, seconds."""
HELD_S = 0.03
"""While streams come, so long between two slices."""
_COMING_S = 0.1
"""They come while the last one has for so long."""

Result = TypeVar("Result")


class Slices:
    """Make it on a running event loop. Keeps the order in which work came."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._until: float | None = None
        """When this turn's slice ends; None if none has begun."""
        self._came_at = float("-inf")

    def stream_came(self) -> None:
        """A stream has begun, or an agent's hello was taken: others may be waiting behind it."""
        self._came_at = self._loop.time()

    async def do(self, work: Callable[[], Result]) -> Result:
        """Do it when its turn comes: at once, unless others wait or this turn's slice is used up. Returns, and raises, what it does."""
        if not self._waiting and self._goes_on():
            return work()
        future: asyncio.Future[Result] = self._loop.create_future()
        self._waiting.append((work, future))
        return await future

    def _goes_on(self) -> bool:
        now = self._loop.time()
        if self._until is None:
            self._until = now + SLICE_S
            if now - self._came_at < _COMING_S:
                self._loop.call_later(HELD_S, self._next)
            else:
                self._loop.call_soon(self._next)
        return now < self._until

    def _next(self) -> None:
        """The next slice may begin."""
        self._until = None
        while self._waiting and self._goes_on():
            work, future = self._waiting.popleft()
            if future.done():
                continue  # its stream has ended
            try:
                future.set_result(work())
            except Exception as error:  # noqa: BLE001 -- whoever waits is to know
                future.set_exception(error)
