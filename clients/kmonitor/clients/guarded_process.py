# SPDX-License-Identifier: Apache-2.0
"""A guarded process: by its pid, to its end; or the one that a pidfile names, and then the next."""

from __future__ import annotations

from kmonitor.clients.events import Event
from kmonitor.clients.guarded import ANSWERED, Clocks, Guarded, Look, identity
from kmonitor.clients.identity import Identity
from kmonitor.clients.notifications import Process, Progress, Registered, RegistrationState
from kmonitor.clients.selection import Selection
from kmonitor.clients.verdict import Blindness, Certainty, Death, Life, Subject
from kmonitor.wire.masks import EventType

_PROGRESSES = 2
"""A process that its node has found gone may yet be told of by its exit: from the log, or from the ring, of which a heartbeat that was
under way may not know yet. After so many heartbeats nothing comes any more."""

_EARLY_MOST = 256


class GuardedProcess(Guarded):
    """`over` once a pid's process has ended."""

    def __init__(self, subject: Subject, its_clocks: Clocks) -> None:
        wanted: Selection = {"node": subject.node, "events": EventType.PROCESS_EXIT}
        if subject.pid is not None:
            wanted["pid"] = subject.pid
            if subject.start_time:
                wanted["start_time"] = subject.start_time
            if subject.boot_id:
                wanted["boot_id"] = subject.boot_id
        elif subject.pidfile is not None:
            wanted["pidfile"] = subject.pidfile
        super().__init__(subject, wanted, its_clocks)
        self._ending = 0
        """How many heartbeats to wait for the exit of one that was found gone; 0 if it was not."""
        self._early: dict[Identity, Event] = {}
        """Exits while no process was known to live. Behind a cursor one may come before the answer that says RUNNING."""

    @property
    def pid(self) -> int | None:
        """Whose exit it wants to be given; None is of all processes of the node."""
        return self.process.pid if self.process is not None and (self.over or self.life is Life.ALIVE) else None

    def _event(self, event: Event) -> None:
        if not event.is_exit:
            return
        who = Identity(event.boot_id, event.pid, event.start_time)
        if self.process is None or not identity(self.process).may_be(who):
            if self.life is not Life.ALIVE and not self.over:
                self._early[who] = event
                if len(self._early) > _EARLY_MOST:
                    del self._early[next(iter(self._early))]
            return
        late = self.life is Life.DEAD and self.death is not None and self.death.inferred and not event.inferred
        if self.life is Life.ALIVE or late:
            self._died(Death.of(event))

    def _progress(self, notice: Progress) -> None:
        if self._ending:
            self._ending -= 1
            if not self._ending:
                self._ended_unseen()

    def _answer(self, answer: Registered) -> None:
        self.sight.back(*ANSWERED)
        if answer.state is RegistrationState.RUNNING and answer.process is not None:
            self._runs(answer.process)
        elif answer.state in (RegistrationState.EXITED, RegistrationState.NOT_FOUND):
            self._not_there(answer.state is RegistrationState.NOT_FOUND)

    def _runs(self, process: Process) -> None:
        if self.process is not None and identity(self.process).may_be(identity(process)):
            if self.life is not Life.ALIVE:
                self.look = Look.LATER  # the file names the dead one still, or this was said before it died
            else:
                self._ending = 0
            return
        if self.life is Life.ALIVE:  # another one has its pid, or its file: it cannot be there any more
            self._ended_unseen()
        if self.over:
            self.leave = True
            return
        self.process, self.alive, self.death, self.absence = process, 1, None, ""
        self._lives(Life.ALIVE, self.started(process))
        early, self._early = self._early, {}
        exit_ = next((event for who, event in early.items() if who.may_be(identity(process))), None)
        if exit_ is not None:
            self._tell()
            self._died(Death.of(exit_))

    def _not_there(self, no_such: bool) -> None:
        if self.life is Life.ALIVE:
            self._ending = self._ending or _PROGRESSES
            # It is not alive, that much is seen; it is not told as dead before it is known how. Nobody shall take it for alive meanwhile.
            self.sight.lost(Blindness.GAP, "the node does not find it any more; how it ended is not known yet")
            return
        if self.subject.pidfile is not None:
            self._absent("there is no such pidfile" if no_such else "the process that the pidfile names has ended")
            self.look = Look.LATER
        else:
            self._absent("there is no such process" if no_such else "the process has ended")
            self._finish()

    def _absent(self, why: str) -> None:
        self.absence = why
        if self.life is Life.UNKNOWN:
            self._lives(Life.ABSENT, self.now())

    def _refused(self, reason: str) -> None:
        if self.subject.pidfile is None or self.life is Life.ALIVE:
            super()._refused(reason)
            return
        # A file that is empty for the moment is as good as none.
        self.sight.back(*ANSWERED)
        self._absent(reason)
        self.look = Look.LATER

    def _ended_unseen(self) -> None:
        assert self.process is not None
        self._died(Death(identity(self.process), self.process.comm, self.now(), inferred=True))

    def _died(self, death: Death) -> None:
        self._ending = 0
        self.sight.back(Blindness.GAP)
        self.alive = 0
        self.death = death
        self._lives(Life.DEAD, death.time_unix_nano, Certainty.INFERRED if death.inferred else Certainty.SEEN)
        if self.subject.pidfile is not None:
            self.look = Look.LATER
            self._tell()  # also if the next is known already
        else:
            self._finish()

    def _finish(self) -> None:
        """Nothing is looked at any more, so nothing stands in the way."""
        self.over = True
        self.look = Look.NO
        self.sight.back(*Blindness)
