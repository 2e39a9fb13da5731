# SPDX-License-Identifier: Apache-2.0
"""Whether the event loop has had nothing to do: then all that had come by then was dealt with, and who was not heard has said nothing.

A turn of the loop deals with what it finds, and gRPC gives it one thing at a time: turns say little of how much still waits.
"""

from __future__ import annotations

import asyncio
import selectors


class _Selector(selectors.DefaultSelector):
    """Counts how often nothing was there."""

    def __init__(self) -> None:
        super().__init__()
        self.idle_turns = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(timeout)
        if not found:
            self.idle_turns += 1
        return found


TURNS = 32
"""Of the event loop, that find nothing new: what lies in a socket, or in gRPC's queue, is with us after fewer."""


class IdleLoop(asyncio.SelectorEventLoop):
    """An event loop that knows how many of its turns have found nothing new."""

    def __init__(self) -> None:
        self._counting = _Selector()
        super().__init__(self._counting)

    @property
    def idle_turns(self) -> int:
        """So far."""
        return self._counting.idle_turns


class Backlog:
    """What had come by the time when this was made, and is still to be dealt with. Look once a turn of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._turns = TURNS
        self._idle_until = loop.idle_turns + TURNS if isinstance(loop, IdleLoop) else 0

    def look_again(self) -> bool:
        """Whether it is too early to tell: look at the next turn. Few may be enough."""
        self._turns -= 1
        return self._turns >= 0

    def waits(self) -> bool:
        """Whether anything may still wait for its turn."""
        return isinstance(self._loop, IdleLoop) and self._loop.idle_turns < self._idle_until
