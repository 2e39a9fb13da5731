# SPDX-License-Identifier: Apache-2.0
"""What a track file of keepalived should say: one verdict from those on several processes. Knows no clock, no file, no network.

Some of the processes may be out of sight. So the quorum has three answers: held for sure, missed for sure, or not to be told: that is
when it depends on those that nobody sees. What then is said is the user's choice: `WhenBlind`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass


class Sight(enum.Enum):
    """Of one process."""

    ALIVE = "alive"
    DEAD = "dead"
    BLIND = "blind"
    """It may be either: nobody sees it now."""


class Opinion(enum.IntEnum):
    """Of the quorum. In this order: with more processes alive it never becomes less."""

    DOWN = 0
    UNSURE = 1
    UP = 2


class WhenBlind(enum.Enum):
    """What is said when it cannot be told whether the quorum is held."""

    DOWN = "down"
    """Fail-safe: nobody serves whose processes are not seen."""
    KEEP = "keep"
    """Fail-static: what was said last. Only what is seen moves anything."""
    UP = "up"
    """What is not seen dead counts as alive."""


@dataclass(frozen=True, slots=True)
class Policy:
    """All times in seconds. `quorum`: how many must be alive."""

    quorum: int
    when_blind: WhenBlind
    blind_after: float = 5.0
    """For how long blindness changes nothing."""
    up_delay: float = 0.0
    """The quorum must have been held without a break for so long, until up is said."""
    down_delay: float = 0.0
    """The quorum must not have been held for so long, until down is said."""

    def at_first(self, said: bool | None) -> bool:
        """What to say while nobody knows anything: before the first verdict, and after the last one. `said`: what was said before, None
        if nothing was. Nobody has ever seen the processes of a file that says nothing, so KEEP is down for it."""
        if self.when_blind is WhenBlind.KEEP:
            return said is True
        return self.when_blind is WhenBlind.UP


def opinion(quorum: int, sights: Iterable[Sight]) -> Opinion:
    """Whether at least `quorum` of these are alive."""
    alive = blind = 0
    for sight in sights:
        alive += sight is Sight.ALIVE
        blind += sight is Sight.BLIND
    if alive >= quorum:
        return Opinion.UP
    return Opinion.UNSURE if alive + blind >= quorum else Opinion.DOWN


class Track:
    """One track file's verdict. Times are in seconds, of any clock that only goes forward.

    `take` says what was seen, `look` what follows; call it after each `take`, and when the time has come that it gave.
    """

    def __init__(self, policy: Policy, names: Iterable[str], now: float, *, said: bool | None = None) -> None:
        self._policy = policy
        self._sights = dict.fromkeys(names, Sight.BLIND)
        if not 1 <= policy.quorum <= len(self._sights):
            raise ValueError(f"a quorum of {policy.quorum} from {len(self._sights)}")
        self.up = policy.at_first(said)
        """What the file should say, as of the last `look`."""
        self.opinion = Opinion.UNSURE
        self._opinion_since = now
        self._missed_since = now  # the quorum was not held since; of no meaning while it is

    def count(self, sight: Sight) -> int:
        """How many are like this."""
        return sum(each is sight for each in self._sights.values())

    def take(self, name: str, sight: Sight, now: float) -> None:
        """What is seen of a process. Raises KeyError."""
        if self._sights[name] is sight:
            return
        self.look(now)  # what has been due by now was due before this
        self._sights[name] = sight
        found = opinion(self._policy.quorum, self._sights.values())
        if found is self.opinion:
            return
        if self.opinion is Opinion.UP:
            self._missed_since = now
        self.opinion, self._opinion_since = found, now

    def look(self, now: float) -> float:
        """Settle what to say (`up`). Returns when to look again at the latest; infinity if only a `take` can change anything.

        Down counts from the moment at which the quorum was last held: a process that is seen dead, and out of sight in between, is not
        given its delay anew each time. Up counts from the moment since which it has been held without a break.
        """
        target, due = self._wanted()
        if target is self.up:
            return math.inf
        if now < due:
            return due
        self.up = target
        return math.inf

    def _wanted(self) -> tuple[bool, float]:
        policy = self._policy
        if self.opinion is Opinion.UP:
            return True, self._opinion_since + policy.up_delay
        if self.opinion is Opinion.DOWN:
            return False, max(self._opinion_since, self._missed_since + policy.down_delay)
        blind = self.up if policy.when_blind is WhenBlind.KEEP else policy.when_blind is WhenBlind.UP
        return blind, self._opinion_since + policy.blind_after
