# SPDX-License-Identifier: Apache-2.0
"""Whether a subject is seen now: what stands in the way, of which several things may at once."""

from __future__ import annotations

from collections.abc import Callable

from kmonitor.clients.verdict import Blindness

_GRAVEST_FIRST = (
    Blindness.GONE,
    Blindness.DISCONNECTED,
    Blindness.UNREACHABLE,
    Blindness.STALE,
    Blindness.GAP,
    Blindness.STARTING,
)


class Sight:
    """Of one subject. `clock` gives seconds that only go forward."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lost: dict[Blindness, tuple[float, str]] = {}

    def lost(self, why: Blindness, reason: str) -> None:
        """This stands in the way, too. Said again it has another reason, and has lasted since the first time."""
        since = self._lost[why][0] if why in self._lost else self._clock()
        self._lost[why] = since, reason

    def back(self, *why: Blindness) -> None:
        """These do not stand in the way any more."""
        for each in why:
            self._lost.pop(each, None)

    def __contains__(self, why: Blindness) -> bool:
        return why in self._lost

    @property
    def blind(self) -> Blindness | None:
        """The gravest; None if it is seen."""
        return next((why for why in _GRAVEST_FIRST if why in self._lost), None)

    @property
    def reason(self) -> str:
        """Of the gravest: one line."""
        blind = self.blind
        return "" if blind is None else self._lost[blind][1]

    @property
    def since(self) -> float:
        """Since when there was always something in the way; 0 if it is seen."""
        return min((since for since, _ in self._lost.values()), default=0.0)
