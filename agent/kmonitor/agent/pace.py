# SPDX-License-Identifier: Apache-2.0
"""When to send what has gathered in the ring: at once while little comes, together when much does.

A block costs agent, broker and monitor together a millisecond of CPU, whether it holds one event or a thousand. So a node on which
something happens now and then sends each event as it comes; one that forks all the time sends five times a second, and what somebody
may wait for in order to act, the exits of watched processes, goes before its time. docs/decisions/0016 has the figures.
"""

from __future__ import annotations

import math

GATHER_S = 0.2
"""So long, at most, events wait for each other."""
URGENT_GATHER_S = 0.01
"""The same for urgent events while many of them come."""
FILL_BYTES = 1 << 20
"""So much goes at once, however early: 8,192 events."""

_LITTLE = 50.0
"""Slots a second up to which each is sent as it comes."""
_MUCH = 2000.0
"""... and from which on they gather for the longest time; in between it grows with the rate."""
_WINDOW_S = 0.25
_URGENT_MOST = 50.0
"""Urgent events in a row for which nothing gathers. They are earned again at one an URGENT_GATHER_S."""


class Pace:
    """Of one stream's sender. Times in seconds, of the event loop's clock."""

    def __init__(self, gather_s: float = GATHER_S) -> None:
        """`gather_s` 0: everything is sent at once."""
        self._gather_s = gather_s
        self._slots = 0.0
        """Of late: each counts for less the longer ago it was sent."""
        self._sent_at = 0.0
        self._urgent = _URGENT_MOST
        self._urgent_at = 0.0

    def sent(self, now: float, slots: int) -> None:
        """A block of so many slots was."""
        self._slots = self._of_late(now) + slots
        self._sent_at = now

    def sent_early(self, now: float) -> None:
        """... before its time, as something in it was urgent."""
        self._urgent = max(self._urgent_left(now) - 1.0, 0.0)
        self._urgent_at = now

    def nap_s(self, now: float) -> float:
        """How long what comes is to gather; 0: it is sent at once."""
        rate = self._of_late(now) / _WINDOW_S
        return self._gather_s * min(rate / _MUCH, 1.0) if rate > _LITTLE else 0.0

    def calm_s(self, now: float) -> float:
        """How long also what is urgent is to gather; 0: it is not."""
        return max(1.0 - self._urgent_left(now), 0.0) * URGENT_GATHER_S

    def _of_late(self, now: float) -> float:
        return self._slots * math.exp((self._sent_at - now) / _WINDOW_S)

    def _urgent_left(self, now: float) -> float:
        return min(self._urgent + (now - self._urgent_at) / URGENT_GATHER_S, _URGENT_MOST)
