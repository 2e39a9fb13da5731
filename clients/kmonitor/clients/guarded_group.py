# SPDX-License-Identifier: Apache-2.0
"""A guarded control group or systemd unit: who is in it, which of them count, and how the oldest of those ended.

Members are known from a list that the node makes once it is armed, and from then on by their events. Whoever is forked by a member is
one. A process that is moved into the group is met with its first event there, or in the next list; one that was moved out is missed in
a list, and looked for by its pid: it lives, so that is no death.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import replace

from kmonitor.clients.events import Event
from kmonitor.clients.guarded import ANSWERED, Clocks, Guarded, Look, identity
from kmonitor.clients.identity import Identity
from kmonitor.clients.notifications import Gap, Members, Process, Progress, Registered, RegistrationState
from kmonitor.clients.selection import Selection
from kmonitor.clients.verdict import Blindness, Certainty, Death, Life, Subject
from kmonitor.wire.masks import EventType

LIST_EVERY = 10
"""Heartbeats after which the members are listed again: for those that were moved. Where there are none, at each."""
_MEANWHILE_MOST = 10_000
_EVENTS = EventType.PROCESS_FORK | EventType.PROCESS_EXEC | EventType.PROCESS_EXIT


class GuardedGroup(Guarded):
    """Never over. Beside what all do it wants lists (`wants_list`, then `listing` and `listed`) and look-ups (`wants_pids`, `found`)."""

    def __init__(self, subject: Subject, its_clocks: Clocks) -> None:
        wanted: Selection = {"node": subject.node, "events": _EVENTS}
        if subject.unit is not None:
            wanted["unit"] = subject.unit
        elif subject.cgroup is not None:
            wanted["cgroup"] = subject.cgroup
        super().__init__(subject, wanted, its_clocks)
        self.wants_list = Look.NO
        self.wants_pids: tuple[int, ...] = ()
        """Of those that are missing: do they live elsewhere?"""
        self._members: dict[Identity, Process] = {}
        self._counted: set[Identity] = set()
        """Those of them that have one of the names."""
        self._ids: frozenset[int] = frozenset()
        """Of the group, and of those below it."""
        self._strangers: set[int] = set()
        """Ids of groups that are none of these."""
        self._is_listing = False
        self._heard: set[Identity] = set()
        """Of whom there were events while a list was made: what that says of them is older."""
        self._meanwhile: list[Event] = []
        """Events from then, of which only the list can tell whether they are of this group."""
        self._missing: dict[Identity, tuple[int, int]] = {}
        """Who was not in a list: and the epoch and position before which their ends are, if they were recorded."""
        self._looked_for: frozenset[Identity] = frozenset()
        self._clears: frozenset[Blindness] = frozenset()
        """What the next list takes away."""
        self._heartbeats = 0
        self._after_gap = False
        """Events of the node were lost, and no list was made since."""
        self._unaccounted = False
        """All that counted are missing."""
        self._main: Identity | None = None
        """The oldest that counted when it came to life."""
        self._main_death: Death | None = None
        self._last_death: Death | None = None

    # ---- what is done for it

    def listing(self) -> None:
        """A list is asked for now."""
        self.wants_list = Look.NO
        self._is_listing = True

    def not_listed(self) -> None:
        """It could not be had: once more."""
        self._no_more_listing()
        self._list_later()

    def listed(self, members: Members) -> None:
        """It has come."""
        self._ids = frozenset(members.cgroup_ids)
        self._strangers -= self._ids
        there = {identity(process): process for process in members.processes if process.threads}
        for who, process in there.items():
            self._missing.pop(who, None)
            if who not in self._heard:
                self._keep(process)
        for who in self._members.keys() - there.keys() - self._heard:
            self._missing.setdefault(who, (members.epoch, members.position))
        meanwhile = self._no_more_listing()
        self.sight.back(*self._clears)
        self._after_gap = self._after_gap and Blindness.GAP not in self._clears
        self._clears = frozenset()
        for event in meanwhile:
            self._event(event)
        self._count("no process of it runs")

    def found(self, living: Iterable[Process]) -> None:
        """These of `wants_pids` run on the node: they have left the group. The others have ended, and nobody saw it."""
        elsewhere = {identity(process) for process in living if process.threads}
        died = False
        for who in self._looked_for & self._missing.keys():
            del self._missing[who]
            died |= self._gone(who, None if who in elsewhere else self._unseen(who))
        self._looked_for = frozenset()
        self._count("its processes are in another control group now", died=died)

    def not_found(self) -> None:
        """Nobody could look: at the next heartbeat, once more."""
        self._looked_for = frozenset()

    # ---- what comes

    def _event(self, event: Event) -> None:
        who = Identity(event.boot_id, event.pid, event.start_time)
        if self.death is not None and self.death.inferred and self.death.process == who and event.is_exit and not event.inferred:
            self.death = Death.of(event)  # later than the heartbeat that it was waited for
            self._lives(self.life, event.time)
            return
        if who not in self._members and not self._is_of_it(event):
            return
        if self._is_listing:
            self._heard.add(who)
        if event.is_exit:
            self._missing.pop(who, None)
            self._count("", died=self._gone(who, Death.of(event)))
            return
        known = self._members.get(who) or _process_of(event)
        self._keep(replace(known, comm=event.comm, cgroup_id=event.cgroup_id))
        if event.type == EventType.PROCESS_FORK and event.child_pid and event.child_start_time:
            child = replace(known, pid=event.child_pid, ppid=event.pid, comm=event.comm, start_time=event.child_start_time, threads=1)
            self._keep(child)
            if self._is_listing:
                self._heard.add(identity(child))
        self._count("its processes have other names now", at=event.time)

    def _is_of_it(self, event: Event) -> bool:
        if event.cgroup_id in self._ids:
            return True
        if self._is_listing and len(self._meanwhile) < _MEANWHILE_MOST:
            self._meanwhile.append(event)
        elif self._is_listing or (event.cgroup_id not in self._strangers and self._ids):
            # Of another registration; or of a group below that was made since: a list will tell.
            self._strangers.add(event.cgroup_id)
            self._list_later()
        return False

    def _progress(self, notice: Progress) -> None:
        self._heartbeats += 1
        if self._heartbeats >= (LIST_EVERY if self._counted else 1) and self._ids:
            self._heartbeats = 0
            self._strangers.clear()
            self._list_later()
        if not self._missing or self._looked_for:
            return
        at = next(((at.epoch, at.position) for at in notice.nodes if at.node == self.subject.node), None)
        # A heartbeat that leaves the node out: nothing is registered there any more, and nothing will come.
        overdue = {who for who, (epoch, position) in self._missing.items() if at is None or epoch != at[0] or position <= at[1]}
        if overdue:
            self._looked_for = frozenset(overdue)
            self.wants_pids = tuple(who.pid for who in overdue)

    def _answer(self, answer: Registered) -> None:
        if answer.state is RegistrationState.ARMED:
            self._clears = ANSWERED
            self.wants_list = Look.NOW
        elif answer.state in (RegistrationState.EXITED, RegistrationState.NOT_FOUND):
            self.sight.back(*ANSWERED)
            self._ids, self._clears, self.wants_list = frozenset(), frozenset(), Look.NO
            for who in self._members:  # a group that is gone is empty
                self._missing.setdefault(who, (answer.epoch, answer.position))
            self._count("the unit does not run" if self.subject.unit is not None else "there is no such control group")
            self.look = Look.LATER

    def _wants(self) -> bool:
        return super()._wants() or self.wants_list is not Look.NO or bool(self.wants_pids)

    def _lost(self, why: Blindness, reason: str) -> None:
        self._clears -= {why}
        super()._lost(why, reason)

    def _gap(self, gap: Gap) -> None:
        self._after_gap = True
        self._lost(Blindness.GAP, f"events of the node are missing ({gap.reason.name.lower()})")
        self.look = Look.NOW

    def _rebooted(self) -> None:
        died = False
        for who in list(self._members):
            died |= self._gone(who, self._unseen(who))
        self._missing.clear()
        self._count("", died=died)

    # ---- who is there

    def _keep(self, process: Process) -> None:
        who = identity(process)
        self._members[who] = process
        self._missing.pop(who, None)
        globs = self.subject.comms
        if not globs or any(fnmatch.fnmatchcase(process.comm, glob) for glob in globs):
            self._counted.add(who)
        else:
            self._counted.discard(who)

    def _gone(self, who: Identity, death: Death | None) -> bool:
        """It is no member any more. Whether one that counted has died."""
        self._members.pop(who, None)
        if who not in self._counted:
            return False
        self._counted.discard(who)
        if death is None:
            return False
        self._last_death = death
        if who == self._main:
            self._main_death = death
        return True

    def _unseen(self, who: Identity) -> Death:
        return Death(who, self._members[who].comm, self.now(), inferred=True)

    def _list_later(self) -> None:
        if self.wants_list is Look.NO:
            self.wants_list = Look.LATER

    def _no_more_listing(self) -> list[Event]:
        self._is_listing = False
        self._heartbeats = 0
        self._heard.clear()
        meanwhile, self._meanwhile = self._meanwhile, []
        return meanwhile

    # ---- what that makes of it

    def _count(self, why_not: str, *, died: bool = False, at: int = 0) -> None:
        """`died`: one that counted has just done so. `why_not`: why there is none, if nobody died."""
        self._look_out(unaccounted=bool(self._counted) and self._counted <= self._missing.keys())
        self.alive = len(self._counted)
        if self._counted:
            oldest = self._oldest()
            if self.life is not Life.ALIVE:
                self._main, self._main_death, self._last_death = identity(oldest), None, None
                self.death, self.absence = None, ""
                self._lives(Life.ALIVE, self.started(oldest))
            self.process = oldest
        elif died and self._last_death is not None:
            seen_main = self._main_death is not None and not self._main_death.inferred
            death = self._main_death if self._main_death is not None and seen_main else self._last_death
            self.death = death
            self._lives(Life.DEAD, death.time_unix_nano, Certainty.INFERRED if death.inferred else Certainty.SEEN)
            self._tell()  # also if the next is known already
        elif self.life is not Life.DEAD:
            self.absence = why_not
            if self.life is not Life.ABSENT:
                self._lives(Life.ABSENT, at or self.now())

    def _look_out(self, *, unaccounted: bool) -> None:
        """While the node finds none of those that count, and it is not known how they ended, nobody shall take them for alive."""
        if unaccounted:
            self.sight.lost(Blindness.GAP, "the node does not find its processes any more; how they ended is not known yet")
        elif self._unaccounted and not self._after_gap:
            self.sight.back(Blindness.GAP)
        self._unaccounted = unaccounted

    def _oldest(self) -> Process:
        """Of those that count. A newcomer is younger, as a rule, so mostly it is the one of before."""
        if self.process is not None and (who := identity(self.process)) in self._counted:
            # One that was moved here may be older; it is found when it matters.
            return self._members[who]
        return min((self._members[who] for who in self._counted), key=lambda process: process.start_time)


def _process_of(event: Event) -> Process:
    return Process(event.pid, event.ppid, event.uid, event.gid, event.comm, event.start_time, event.cgroup_id, 1, event.boot_id)
