# SPDX-License-Identifier: Apache-2.0
"""When to send what has gathered in the ring: at once while that is seldom, together when much comes.

A block costs agent, broker and monitors together a millisecond of CPU, whether it holds one event or a thousand. So a node on which
something happens now and then sends each event as it comes; one that forks all the time sends some blocks a second, and the events of
watched processes that somebody may act upon (urgent ones: their exits) go before their time.
"""

from __future__ import annotations

GATHER_S = 0.1
"""So long, at most, events wait for each other while many come."""
PROMPT_MOST = 20.0
"""Blocks in a row that are sent at once. They are earned again at one a GATHER_S."""
URGENT_GATHER_S = 0.01
"""The same for urgent events while many of them come."""
URGENT_MOST = 50.0
FILL_BYTES = 128 << 10
"""So much is worth a block of its own, however early: 1,024 events."""


class _Allowance:
    """A token bucket. Times in seconds, of any clock."""

    def __init__(self, most: float, each_s: float) -> None:
        self._most = most
        self._each_s = each_s
        self._left = most
        self._at = 0.0

    def use(self, now: float) -> None:
        """One less, if there is one."""
        self._look(now)
        self._left = max(self._left - 1.0, 0.0)

    def missing_s(self, now: float) -> float:
        """How long until there is one."""
        self._look(now)
        return max(1.0 - self._left, 0.0) * self._each_s

    def _look(self, now: float) -> None:
        if self._each_s:
            self._left = min(self._left + (now - self._at) / self._each_s, self._most)
        self._at = now


class Pace:
    """What one stream's sender may still send at once. Times in seconds, of the event loop's clock."""

    def __init__(self, gather_s: float = GATHER_S) -> None:
        """`gather_s` 0: everything is sent at once."""
        self._prompt = _Allowance(PROMPT_MOST if gather_s else float("inf"), gather_s)
        self._urgent = _Allowance(URGENT_MOST, min(URGENT_GATHER_S, gather_s))

    def sent(self, now: float) -> None:
        """A block was."""
        self._prompt.use(now)

    def sent_early(self, now: float) -> None:
        """... and before its time, as something in it was urgent."""
        self._urgent.use(now)

    def nap_s(self, now: float) -> float:
        """How long what comes is to gather; 0: it is sent at once."""
        return self._prompt.missing_s(now)

    def calm_s(self, now: float) -> float:
        """How long also what is urgent is to gather."""
        return self._urgent.missing_s(now)
