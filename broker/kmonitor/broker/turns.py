# SPDX-License-Identifier: Apache-2.0
"""How soon a session sends again, while all of them together send a lot.

A message costs the broker some 0.2 ms, whether it holds one event or a thousand. Up to a thousand messages a second each goes at once.
Beyond that, a session that has just sent lets its rows gather; one that seldom has something to send never waits: it is the one whose
events somebody acts upon.
"""

from __future__ import annotations

import math

FREE = 1000.0
"""Messages a second, of all sessions, up to which nobody waits."""
MOST_S = 0.2
_WINDOW_S = 0.25
_EACH_S = 1e-4
"""For each message a second more: 100 busy sessions come to rest at about 1,600 a second, each of them every 60 ms."""


class Turns:
    """Shared by all sessions. Times in seconds, of the event loop's clock."""

    def __init__(self) -> None:
        self._messages = 0.0
        """Of late: each counts for less the longer ago it was sent."""
        self._at = 0.0

    def sent(self, now: float, messages: int) -> None:
        """So many more."""
        self._messages = self._of_late(now) + messages
        self._at = now

    def wait_s(self, now: float, sent_at: float) -> float:
        """How long a session that sent last at `sent_at` is to wait."""
        rate = self._of_late(now) / _WINDOW_S
        if rate <= FREE:
            return 0.0
        return max(sent_at + min((rate - FREE) * _EACH_S, MOST_S) - now, 0.0)

    def _of_late(self, now: float) -> float:
        return self._messages * math.exp((self._at - now) / _WINDOW_S)
