# SPDX-License-Identifier: Apache-2.0
"""The verdicts of a guard that nobody has taken yet."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from kmonitor.clients.guarded import Guarded
from kmonitor.clients.verdict import Verdict


class VerdictQueue:
    """In the order in which they became known. Grows with what changes; but a unit that forks a thousand times a second must not fill
    the memory of one who does not look: of the number of a group's processes only the last is kept, if nothing else has changed."""

    def __init__(self) -> None:
        self._places: deque[tuple[Guarded, list[Verdict]]] = deque()
        self._last: dict[Guarded, list[Verdict]] = {}
        """The last one of each subject, in its place."""

    def __bool__(self) -> bool:
        return bool(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def put(self, guarded: Guarded, verdict: Verdict) -> None:
        """Behind all others, or in the place of the one that it only counts anew."""
        last = self._last.get(guarded)
        if last is not None and replace(last[0], alive=verdict.alive) == verdict:
            last[0] = verdict
            return
        place = self._last[guarded] = [verdict]
        self._places.append((guarded, place))

    def take(self) -> Verdict:
        """The first."""
        guarded, place = self._places.popleft()
        if self._last.get(guarded) is place:
            del self._last[guarded]
        return place[0]

    def drop(self, guarded: Guarded) -> None:
        """All of this subject."""
        if self._last.pop(guarded, None) is not None:
            self._places = deque(item for item in self._places if item[0] is not guarded)

    def clear(self) -> None:
        """All."""
        self._places.clear()
        self._last.clear()
