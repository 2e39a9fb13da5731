# SPDX-License-Identifier: Apache-2.0
"""Records that the source could not make: noticed by their counts, and told each at its place in the stream, but not too often."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from kmonitor.agent.maps import LOST_FOLLOW, LOST_PROCESS, TYPE_BITS
from kmonitor.agent.source import Feed
from kmonitor.v1 import agent_pb2, events_pb2

INTERVAL_S = 0.2
"""Between two notices. A storm that loses some at each block would make one of each; a monitor has no use for so many gaps."""
_MOST = 16

LostCounts = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(slots=True)
class _Loss:
    """Between which positions and times; and the totals when it was seen last."""

    from_position: int
    from_time_ns: int
    to_position: int
    to_time_ns: int
    counts: LostCounts
    since_s: float
    after_s: float
    """The last look at which it had not happened."""


class _Look(NamedTuple):
    """At what the source has lost so far: what it lost before is known."""

    position: int
    time_ns: int
    at_s: float


class Losses:
    """What one stream has seen of them, and has told. Times without a unit are of the event loop's clock, in seconds.

    Told is what lies behind everything that was made before it ended: its `to_position` was sent. While records are lost all the time
    that position runs ahead; so what is seen for an interval is closed, and what comes then is another loss.
    """

    def __init__(self, feed: Feed) -> None:
        self._ring = feed.ring
        self._control = feed.control
        self._seen: LostCounts = self._control.lost()
        self._waiting: deque[_Loss] = deque()
        self._told_at = float("-inf")
        self._last = self._last_thorough = _Look(self._ring.consumer, time.time_ns(), float("-inf"))

    def totals(self) -> agent_pb2.Lost:
        """All of this epoch so far: for the hello, which makes them known to the broker."""
        self._waiting.clear()
        self._seen = self._control.lost()
        # What the broker does not know of them was lost while there was no stream: since it last acknowledged.
        return _message(_Loss(self._ring.consumer, 0, self._ring.producer, time.time_ns(), self._seen, 0.0, 0.0))

    def look(self, now: float, *, quick: bool = False) -> None:
        """See what was lost: between two looks it lies between the producer's position before the first and after the second.

        A `quick` one does not see all (see Control.lost): what only others see may have been lost since the last that was not quick.
        """
        look = _Look(self._ring.producer, time.time_ns(), now)
        counts = self._control.lost(quick=quick)
        if counts != self._seen:
            self._seen = counts
            since = self._last if quick else self._last_thorough
            waiting = self._waiting
            if not waiting or (now - waiting[-1].since_s >= INTERVAL_S and len(waiting) < _MOST):
                waiting.append(_Loss(since.position, since.time_ns, 0, 0, counts, now, since.at_s))
            last = waiting[-1]
            last.from_position, last.from_time_ns = min(last.from_position, since.position), min(last.from_time_ns, since.time_ns)
            last.to_position, last.to_time_ns, last.counts = self._ring.producer, time.time_ns(), counts
            last.after_s = min(last.after_s, since.at_s)
            look = look._replace(time_ns=last.to_time_ns)  # what is lost next is no part of this
        self._last = look
        if not quick:
            self._last_thorough = look

    def clear_at(self, now: float) -> bool:
        """Return whether everything lost before a moment was told, which lies before the last look that was not quick."""
        return not self._waiting or min(loss.after_s for loss in self._waiting) >= now

    def complete_before(self, position: int) -> int:
        """The least of `position` and that of the first loss that was not told."""
        return min([position, *(loss.from_position for loss in self._waiting)])

    def due(self) -> float | None:
        """When a loss that can be told may be; None if there is none. It can be when all around it was sent."""
        if self._waiting and self._ring.position >= self._waiting[0].to_position:
            return self._told_at + INTERVAL_S
        return None

    def take(self, now: float, *, force: bool = False) -> agent_pb2.Lost | None:
        """A notice of all that can be told, if it is time for one; with `force` in any case. It counts as told."""
        due = self.due()
        if due is None or (now < due and not force):
            return None
        taken = [self._waiting.popleft()]
        while self._waiting and self._ring.position >= self._waiting[0].to_position:
            taken.append(self._waiting.popleft())
        loss = taken[-1]
        loss.from_position, loss.from_time_ns = min(each.from_position for each in taken), min(each.from_time_ns for each in taken)
        self._told_at = now
        return _message(loss)


def _message(loss: _Loss) -> agent_pb2.Lost:
    message = agent_pb2.Lost(
        from_position=loss.from_position,
        to_position=loss.to_position,
        from_time_unix_nano=loss.from_time_ns,
        to_time_unix_nano=loss.to_time_ns,
    )
    for which, totals in enumerate(loss.counts):
        for index, total in enumerate(totals):
            if total:
                # A child that could not be followed: any type of event may be missing, of processes that nobody knows.
                kind = events_pb2.EVENT_TYPE_UNSPECIFIED if index == LOST_FOLLOW else TYPE_BITS[index]
                message.counts.add(type=kind, watched=which == LOST_PROCESS, total=total)
    return message
