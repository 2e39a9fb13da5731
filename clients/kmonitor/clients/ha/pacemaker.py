# SPDX-License-Identifier: Apache-2.0
"""Tells Pacemaker of the ends of its resources' processes: keeps a guard on each where the cluster has it, and sees each death through."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kmonitor.clients.errors import ClosedError
from kmonitor.clients.guard import ProcessGuard
from kmonitor.clients.ha.cluster_state import Resource, Version
from kmonitor.clients.ha.crm import CrmAwayError, CrmError
from kmonitor.clients.ha.lookup import Lookup
from kmonitor.clients.ha.processes import Processes
from kmonitor.clients.ha.report import Report, cause
from kmonitor.clients.ha.says import Says, means
from kmonitor.clients.ha.settling import Settling
from kmonitor.clients.ha.unheard import Unheard
from kmonitor.clients.ha.view import View
from kmonitor.clients.verdict import Blindness, Death, Life, Subject, Verdict
from kmonitor.wire.errors import BrokerUnreachableError, KmonitorError, NotAuthorisedError

KEEP_S = 30.0
"""A guard stays for so long after the cluster stopped a resource: it may start it there again."""
SETTLED_S = 0.5
"""Longer than the guard's own look: what was started is seen alive by then, if it is."""

Place = tuple[str, str]


@dataclass(slots=True)
class Kept:
    """One resource on one node, guarded."""

    resource: Resource
    subject: Subject
    grace: float
    gone_since: float = 0.0
    """By time.monotonic(): the cluster has it there no more. 0: it has."""
    start: str = ""
    """The last start that the cluster knows of there (ClusterState.starts)."""
    answered: bool = False
    known: set[str] = field(default_factory=set)
    """Starts whose process was seen alive, or whose end was dealt with."""
    blind: Blindness | None = None


class Pacemaker:
    """From `run` to its cancellation."""

    def __init__(
        self,
        guard: ProcessGuard,
        view: View,
        processes: Processes,
        settling: Settling,
        lookup: Lookup,
        report: Report,
        unheard: Unheard,
        *,
        poll: float,
        grace_of: Callable[[str, str], float],
    ) -> None:
        """`poll` in seconds."""
        self._guard = guard
        self._view = view
        self._processes = processes
        self._settling = settling
        self._lookup = lookup
        self._report = report
        self._unheard = unheard
        self._poll = poll
        self._grace_of = grace_of
        self._kept: dict[Place, Kept] = {}
        self._of_name: dict[str, Place] = {}
        self._alive: set[tuple[str, str]] = set()
        """Resource and what it is guarded by: seen alive through it once, so that it is known to say what it seems to say."""
        self._cases: dict[Place, asyncio.Task[None]] = {}
        self._says = Says(report)
        self._followed: Version | None = None
        """The content of the CIB that is guarded."""

    async def run(self) -> None:
        """Until it is cancelled, or the guard's monitor ends: raises what that does, and CrmError if Pacemaker does not answer at first."""
        await self._view.update()
        await self._follow()
        self._says.ready({place[0] for place in self._kept})
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen(), name="kmonitor ha: verdicts")
            group.create_task(self._keep_up(), name="kmonitor ha: cluster")

    # ---- what the guard says

    async def _listen(self) -> None:
        try:
            async for verdict in self._guard:
                place = self._of_name.get(verdict.subject.name)
                if place is not None:
                    self._take(place, verdict)
        finally:
            self._unheard.close()
            for task in self._cases.values():
                task.cancel()

    def _take(self, place: Place, verdict: Verdict) -> None:
        kept = self._kept[place]
        if verdict.blind is not kept.blind:
            self._says.blindness(place, verdict, before=kept.blind)
            kept.blind = verdict.blind
        self._unheard.take(place, verdict)
        if verdict.life is Life.ALIVE:
            self._alive.add(_evidence(kept))
            kept.known.add(kept.start)
            process = verdict.process
            self._says.guarding(place, kept.subject, process.pid if process else 0, process.comm if process else "")
        elif verdict.life is Life.DEAD and verdict.death is not None:
            what = f"{verdict.death.process} {verdict.death.inferred}"  # one that was inferred may be told with its status later
            if self._says.is_new(place, what):  # else told again for its blindness' sake
                self._open(place, kept, verdict.death)
        elif verdict.life is Life.ABSENT and verdict.blind is None:
            self._says.guarding(place, kept.subject, None, "")
            self._unseen(place, kept)

    def _open(self, place: Place, kept: Kept, death: Death | None) -> None:
        before = self._cases.get(place)
        task = asyncio.create_task(self._settle(place, kept, death, before), name=f"kmonitor ha: {place}")
        self._cases[place] = task
        task.add_done_callback(lambda done: self._cases.pop(place) if self._cases.get(place) is done else None)

    async def _settle(self, place: Place, kept: Kept, death: Death | None, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        await self._unheard.settled(place)
        start = kept.start
        if death is not None and self._unheard.told(place, death.process):
            kept.known.add(start)
            self._report.note(f"{place[0]} on {place[1]}: {cause(death)}: Pacemaker was told of it while its node was not heard")
            return
        if death is None:
            was = self._verdict(kept).process
            await asyncio.sleep(SETTLED_S)
            if self._kept.get(place) is not kept or self._verdict(kept).process != was:
                return  # it was seen after all, and if it has ended since, that is another case
        try:
            outcome = await self._settling.settle(place, death, lambda: self._verdict(kept), kept.grace)
        except KmonitorError as error:
            self._report.note(f"{place[0]} on {place[1]}: its end could not be dealt with: {error}")
            return
        if death is None and outcome is None:
            self._says.note(
                ("absent", place),
                f"{place[0]} on {place[1]}: {means(kept.subject)} is not there, and the cluster has it active: nothing is done",
            )
        kept.known.add(start)

    def _unseen(self, place: Place, kept: Kept) -> None:
        """It is not there: did it die before the guard came to it?"""
        if kept.gone_since or not kept.resource.active or kept.start in kept.known or place in self._cases:
            return  # if there is something to it, the next look at the cluster comes here again
        if _evidence(kept) in self._alive:
            self._open(place, kept, None)

    # ---- what the cluster has

    async def _keep_up(self) -> None:
        while True:
            # Not sooner after a death: it would take CPU time of the recovery, and what is started again at the same place is found
            # by the guard itself.
            await asyncio.sleep(self._poll)
            try:
                await self._view.update()
                self._says.note("crm", "", "Pacemaker answers again")
            except CrmError as error:
                self._says.note("crm", f"Pacemaker does not answer here: {error}; trying again")
                continue
            if self._is_behind() or any(kept.gone_since for kept in self._kept.values()) or self._missing():
                with contextlib.suppress(CrmAwayError):
                    await self._follow()
            else:
                await self._look_at_starts()

    def _is_behind(self) -> bool:
        """Whether the cluster as it is known is another than the one that was gone by: whoever asks about a death may have read it too."""
        return self._view.state is not None and self._view.state.version != self._followed

    def _missing(self) -> bool:
        return any(not kept.answered for kept in self._kept.values())

    async def _follow(self) -> None:
        """Guard what is to be guarded now."""
        state = self._view.state
        if state is None:
            return
        now = time.monotonic()
        wanted: dict[Place, tuple[Resource, Subject]] = {}
        for resource in state.resources:
            if resource.orphaned:
                continue
            try:
                subject = await self._processes.subject(resource, state)
            except CrmError as error:
                subject = str(error)
            if isinstance(subject, str):
                self._says.note(("why", resource.id), f"{resource.id}: not guarded: {subject}")
            else:
                wanted[resource.place] = resource, subject
        for place, kept in list(self._kept.items()):
            if place in wanted and wanted[place][1] == kept.subject:
                kept.gone_since = 0.0
                continue
            kept.gone_since = kept.gone_since or now
            if place in wanted or (now - kept.gone_since > KEEP_S and place not in self._cases):
                await self._drop(place, kept)
        for place, (resource, subject) in wanted.items():
            if place not in self._kept:
                kept = Kept(resource, subject, self._grace_of(resource.id, resource.primitive))
                self._kept[place] = kept
                self._of_name[subject.name] = place
            self._kept[place].resource = resource
        await asyncio.gather(*(self._add(place, kept) for place, kept in self._kept.items() if not kept.answered))
        self._followed = state.version
        await self._look_at_starts()

    async def _look_at_starts(self) -> None:
        """Is there a start of whose process the guard knows nothing?"""
        state = self._view.state
        if state is None:
            return
        for place, kept in list(self._kept.items()):
            start = state.starts.get(place, kept.start)
            if kept.answered and kept.resource.active:
                await self._after_start(place, kept, start)
            kept.start = start

    async def _after_start(self, place: Place, kept: Kept, start: str) -> None:
        """A start that is over: is it its process that is guarded?"""
        verdict = self._verdict(kept)
        if verdict.blind is not None:
            return
        if verdict.life is not Life.ALIVE:
            kept.start = start
            self._unseen(place, kept)
            return
        if start == kept.start:
            return
        kept.known.add(start)
        found = await self._lookup.look(verdict)
        guarded = verdict.process
        if found.process and guarded and (found.process.pid, found.process.start_time) != (guarded.pid, guarded.start_time):
            # What is guarded lives, and is not what the pidfile names any more: a stranger that got the pid, or a predecessor that stays.
            await self._guard.remove(kept.subject.name)
            kept.answered = False
            await self._add(place, kept)

    def _verdict(self, kept: Kept) -> Verdict:
        """As the guard has it; of one that is not guarded just now nothing is known."""
        try:
            return self._guard.verdict(kept.subject.name)
        except KeyError:
            return Verdict(kept.subject)

    async def _add(self, place: Place, kept: Kept) -> None:
        try:
            await self._guard.add(kept.subject)
        except (BrokerUnreachableError, NotAuthorisedError, ClosedError):
            raise
        except KmonitorError as refusal:  # of this one: the others are guarded
            self._says.note(("add", place), f"{place[0]} on {place[1]}: not guarded yet: {refusal}")
            return
        kept.answered = True
        self._says.forget(("add", place))

    async def _drop(self, place: Place, kept: Kept) -> None:
        del self._kept[place]
        del self._of_name[kept.subject.name]
        self._unheard.forget(place)
        self._says.forget(place)
        if kept.answered:
            await self._guard.remove(kept.subject.name)


def _evidence(kept: Kept) -> tuple[str, str]:
    return kept.resource.primitive, means(kept.subject)
