# SPDX-License-Identifier: Apache-2.0
"""--act-on-unreachable: a resource whose node the broker has not heard for so long is failed, once for a stretch of blindness.

Nothing is known of its process then. The cluster may have the node online all the same, and whoever gives this option wants the resource
to be stopped and started there rather than left in doubt.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from kmonitor.clients.guarded import identity
from kmonitor.clients.ha import judge
from kmonitor.clients.ha.judge import Act, Settings, Sight
from kmonitor.clients.ha.settling import Settling
from kmonitor.clients.ha.view import View
from kmonitor.clients.identity import Identity
from kmonitor.clients.verdict import Blindness, Life, Verdict

Place = tuple[str, str]


@dataclass(slots=True)
class _Stretch:
    """From the first word that a node is not heard until its process is seen again."""

    start: str
    """The resource's last start there that the cluster knew of then."""
    verdict: Verdict
    since: float
    """By time.monotonic(): unheard without a break. A guard's `blind_since` is of any blindness."""
    task: asyncio.Task[None] | None = None
    over: bool = False
    """It was dealt with: nothing more comes of it."""
    failing: asyncio.Event = field(default_factory=asyncio.Event)
    """Pacemaker is being told, or was."""


class Unheard:
    """Of all resources. Does nothing unless it was asked for."""

    def __init__(self, settling: Settling, view: View, settings: Settings) -> None:
        self._settling = settling
        self._view = view
        self._settings = settings
        self._stretches: dict[Place, _Stretch] = {}

    def take(self, place: Place, verdict: Verdict) -> None:
        """Every verdict of a resource, in order."""
        if self._settings.act_on_unreachable is None:
            return
        stretch = self._stretches.get(place)
        if verdict.blind is Blindness.UNREACHABLE:
            if stretch is None:
                stretch = self._stretches[place] = _Stretch(self._start(place), verdict, time.monotonic())
            elif stretch.verdict.blind is not Blindness.UNREACHABLE:
                stretch.since = time.monotonic()
            stretch.verdict = verdict
            if not stretch.over and (stretch.task is None or stretch.task.done()):
                stretch.task = asyncio.create_task(self._watch(place, stretch), name=f"kmonitor ha: {place} unheard")
        elif stretch is not None:
            stretch.verdict = verdict
            self._stop(stretch)
            if verdict.blind is None and verdict.life is not Life.DEAD:
                del self._stretches[place]  # seen again

    def told(self, place: Place, died: Identity) -> bool:
        """Whether Pacemaker was told of this process already. Of a unit or control group: of those that ran before it was lost from
        sight, of which the last to end may be named, and not the oldest."""
        stretch = self._stretches.get(place)
        if stretch is None or not stretch.failing.is_set():
            return False
        return _process_of(stretch.verdict) == died or stretch.verdict.subject.pidfile is None

    async def settled(self, place: Place) -> None:
        """Until Pacemaker is not just being told."""
        stretch = self._stretches.get(place)
        if stretch is not None and stretch.task is not None:
            await asyncio.wait([stretch.task])

    def forget(self, place: Place) -> None:
        """It is not guarded there any more."""
        stretch = self._stretches.pop(place, None)
        if stretch is not None:
            self._stop(stretch)

    def close(self) -> None:
        """At the end."""
        for stretch in self._stretches.values():
            if stretch.task is not None:
                stretch.task.cancel()

    @staticmethod
    def _stop(stretch: _Stretch) -> None:
        if stretch.task is not None and not stretch.failing.is_set():
            stretch.task.cancel()
            stretch.task = None

    def _start(self, place: Place) -> str:
        return "" if self._view.state is None else self._view.state.starts.get(place, "")

    async def _watch(self, place: Place, stretch: _Stretch) -> None:
        def sight() -> Sight:
            verdict = stretch.verdict
            unheard = time.monotonic() - stretch.since if verdict.blind is Blindness.UNREACHABLE else 0.0
            return Sight(verdict.life, verdict.blind, unheard, _process_of(verdict), self._start(place) != stretch.start)

        limit = self._settings.act_on_unreachable or 0.0
        while True:
            decision = judge.unheard(sight(), self._settings)
            if decision.act is not Act.WAIT:
                break
            await asyncio.sleep(max(0.01, limit - sight().unheard))
        process = stretch.verdict.process
        if decision.act is Act.FAIL and process is not None:
            stretch.over = await self._settling.settle_unheard(
                place, process, lambda: judge.unheard(sight(), self._settings), stretch.failing
            )


def _process_of(verdict: Verdict) -> Identity | None:
    return None if verdict.process is None else identity(verdict.process)
