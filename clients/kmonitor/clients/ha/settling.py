# SPDX-License-Identifier: Apache-2.0
"""One end of a resource's process, from the word of it to an outcome: asked until it is clear, and told to the cluster at most once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from kmonitor.clients.guarded import identity
from kmonitor.clients.ha import judge
from kmonitor.clients.ha.crm import Crm, CrmError
from kmonitor.clients.ha.judge import Act, Case, Decision, Present, Settings
from kmonitor.clients.ha.lookup import Found, Lookup
from kmonitor.clients.ha.report import Outcome, Report, cause
from kmonitor.clients.ha.view import View
from kmonitor.clients.identity import Identity
from kmonitor.clients.notifications import Process
from kmonitor.clients.verdict import Death, Verdict

BUSY_S = 1.0
"""A cluster that is at work for so long is asked what it is about to do, instead of being waited for. Longer by far than an operation that
has begun takes to be in the CIB."""
PATIENCE_S = 60.0
"""For so long a death is asked about again. By then a recurring monitor has, as a rule, found it."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 0.5


@dataclass(frozen=True, slots=True)
class Options:
    """What the user chose."""

    dry_run: bool = False
    attribute: bool = False
    act_on_inferred: bool = False
    act_on_unreachable: float | None = None
    """Seconds; None: never."""

    @property
    def settings(self) -> Settings:
        """Those that decide."""
        return Settings(self.act_on_inferred, self.act_on_unreachable)


class Settling:
    """Of all resources."""

    def __init__(self, crm: Crm, view: View, lookup: Lookup, report: Report, options: Options) -> None:
        self._crm = crm
        self._view = view
        self._lookup = lookup
        self._report = report
        self._options = options
        self._acted: dict[tuple[str, str], Identity] = {}
        """Resource and node -> the process whose death was told last."""

    async def settle(self, place: tuple[str, str], death: Death | None, verdict: Callable[[], Verdict], grace: float) -> Outcome | None:
        """See a death through; the outcome, which was reported, or None where there was nothing to report. `verdict` is the guard's,
        as it is when it is asked for. `death` None: its process was found gone, in a place where it was not seen alive."""
        began = time.monotonic()
        died = None if death is None else death.process
        if died is not None and self._acted.get(place) == died:
            return None
        case = Case(*place, inferred=death is not None and death.inferred, died=died)
        decision = judge.before_asking(case, self._options.settings)
        pause, said = FIRST_PAUSE_S, ""
        if decision is None and grace:
            await asyncio.sleep(grace)
        while decision is None or decision.act is Act.WAIT:
            try:
                decision = await self._ask(case, verdict(), time.monotonic() - began > BUSY_S + grace)
                if decision is not None and decision.act is Act.FAIL:
                    return await self._fail(place, death, decision, began)
            except CrmError as error:
                decision = Decision(Act.WAIT, str(error))
                if str(error) != said and death is not None:
                    said = str(error)
                    self._report.note(f"{place[0]} on {place[1]}: {cause(death)}: not told to Pacemaker yet: {error}")
            if decision is None:
                return None
            if decision.act is Act.WAIT:
                if time.monotonic() - began > PATIENCE_S + grace:
                    return self._end(place, death, "given-up", f"{decision.reason}, for {PATIENCE_S:g} s", began)
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE_S)
        if death is None:
            return None
        return self._end(place, death, "left", decision.reason, began)

    async def settle_unheard(
        self, place: tuple[str, str], process: Process, decide: Callable[[], Decision], telling: asyncio.Event
    ) -> bool:
        """A process of whose node nothing is heard: the cluster is asked as for a death, but its present process cannot be looked up.
        `decide` says whether that is still so; `telling` is set from when Pacemaker is told on. Whether it came to an outcome, which was
        reported: if not, sight is back."""
        began = time.monotonic()
        case = Case(*place, inferred=False, died=identity(process))
        pause, said = FIRST_PAUSE_S, ""
        while (unheard := decide()).act is Act.FAIL:
            try:
                decision, _ = await self._judge(case, time.monotonic() - began > BUSY_S)
                if decision.act is Act.FAIL and decide().act is Act.FAIL:
                    telling.set()
                    await self._fail(place, process, unheard, began)
                    return True
            except CrmError as error:
                telling.clear()
                decision = Decision(Act.WAIT, str(error))
                if str(error) != said:
                    said = str(error)
                    self._report.note(f"{place[0]} on {place[1]}: {cause(process)}: not told to Pacemaker yet: {error}")
            if decision.act is Act.LEAVE:
                self._end(place, process, "left", decision.reason, began)
                return True
            if decision.act is Act.WAIT:
                if time.monotonic() - began > PATIENCE_S:
                    self._end(place, process, "given-up", f"{decision.reason}, for {PATIENCE_S:g} s", began)
                    return True
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE_S)
        return False

    async def _judge(self, case: Case, busy: bool, verdict: Verdict | None = None) -> tuple[Decision, Found | None]:
        """What the cluster's state says of it, and what is there now if a `verdict` says where to look."""
        idle = await self._view.idle()
        state, found = await asyncio.gather(self._view.now(), self._found(verdict))
        decision = judge.judge(case, state, idle=idle)
        if decision.act is Act.WAIT and busy and not idle and case.died is not None:
            decision = judge.judge(case, state, idle=idle, planned=await self._view.planned(case.resource))
        return decision, found

    async def _found(self, verdict: Verdict | None) -> Found | None:
        return None if verdict is None else await self._lookup.look(verdict)

    async def _ask(self, case: Case, verdict: Verdict, busy: bool) -> Decision | None:
        """None: nothing had died, or it is of no concern any more."""
        if case.died is None and (decision := _of_unseen(await self._lookup.look(verdict))).act is not Act.FAIL:
            return None if decision.act is Act.LEAVE else decision
        # From here on it is known to have ended before the DC is asked: what the DC begins later cannot be the cause.
        decision, found = await self._judge(case, busy, verdict)
        if decision.act is not Act.FAIL or found is None:
            return decision
        if found.present is Present.UNKNOWN:
            return Decision(Act.WAIT, f"what runs there now cannot be looked up: {found.why}")
        return judge.present(decision, case, found.present, found.identity)

    async def _fail(self, place: tuple[str, str], end: Death | Process | None, decision: Decision, began: float) -> Outcome:
        if not self._options.dry_run:
            await self._crm.fail(*place)
        if end is not None:
            self._acted[place] = end.process if isinstance(end, Death) else identity(end)
        outcome = self._end(place, end, "would-fail" if self._options.dry_run else "failed", decision.reason, began)
        if self._options.attribute and not self._options.dry_run:
            try:
                at = time.localtime(end.time_unix_nano / 1e9 if isinstance(end, Death) else None)
                why = f"{cause(end)}: {decision.reason}" if isinstance(end, Process) else cause(end)
                await self._crm.attribute(place[1], f"kmonitor-{place[0]}", f"{time.strftime('%Y-%m-%d %H:%M:%S', at)}: {why}")
            except CrmError as error:
                self._report.note(f"{place[0]} on {place[1]}: its cause is not in a node attribute: {error}")
        return outcome

    def _end(self, place: tuple[str, str], end: Death | Process | None, action: str, reason: str, began: float) -> Outcome:
        outcome = Outcome(*place, end, action, reason, time.monotonic() - began)
        self._report.outcome(outcome)
        return outcome


def _of_unseen(found: Found) -> Decision:
    """Of a process that was not seen alive there is less to go by: only a pidfile that was left behind says that it has died."""
    if found.present is Present.GONE:
        return Decision(Act.FAIL, "")
    return Decision(Act.WAIT if found.present is Present.UNKNOWN else Act.LEAVE, found.why)
