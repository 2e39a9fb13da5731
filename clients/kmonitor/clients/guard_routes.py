# SPDX-License-Identifier: Apache-2.0
"""Which of a guard's subjects a notification is shown to."""

from __future__ import annotations

from kmonitor.clients import selection
from kmonitor.clients.events import Event
from kmonitor.clients.guarded import Guarded
from kmonitor.clients.guarded_group import GuardedGroup
from kmonitor.clients.guarded_process import GuardedProcess
from kmonitor.clients.notifications import Deregistered, Fresh, Gap, NodeChange, Notification, Registered, Stale

_ANY = 0
"""In place of a pid."""


class Routes:
    """By what is registered, and by process: a node may have many, and an event is of few."""

    def __init__(self) -> None:
        self._all: dict[Guarded, None] = {}
        self._of_key: dict[bytes, set[Guarded]] = {}
        self._of_pid: dict[tuple[str, int], set[GuardedProcess]] = {}
        """Those that want the exit of this process of a node, as far as its pid tells; or _ANY."""
        self._pid_of: dict[GuardedProcess, int] = {}
        self._groups_of: dict[str, list[GuardedGroup]] = {}
        """By node: those that want all events of it."""

    def add(self, guarded: Guarded) -> None:
        """From now on."""
        self._all[guarded] = None
        self._of_key.setdefault(guarded.key, set()).add(guarded)
        if isinstance(guarded, GuardedGroup):
            self._groups_of.setdefault(guarded.subject.node, []).append(guarded)
        self.moved(guarded)

    def moved(self, guarded: Guarded) -> None:
        """It may be about another process now."""
        if isinstance(guarded, GuardedProcess):
            self._index(guarded, guarded.pid or _ANY)

    def remove(self, guarded: Guarded) -> None:
        """From now on no more."""
        if self._all.pop(guarded, guarded) is guarded:
            return
        same = self._of_key[guarded.key]
        same.discard(guarded)
        if not same:
            del self._of_key[guarded.key]
        if isinstance(guarded, GuardedProcess):
            self._index(guarded, None)
        elif isinstance(guarded, GuardedGroup):
            self._groups_of[guarded.subject.node].remove(guarded)

    def is_wanted(self, key: bytes) -> bool:
        """Whether there is a subject that wants this registration, and something may still come of it."""
        return any(not guarded.over for guarded in self._of_key.get(key, ()))

    def concerned(self, item: Notification) -> list[Guarded]:
        """Who is to be shown it."""
        if isinstance(item, Event):
            of_any = self._of_pid.get((item.node, _ANY), ())
            return [*self._of_pid.get((item.node, item.pid), ()), *of_any, *self._groups_of.get(item.node, ())]
        if isinstance(item, Registered):
            if item.registration is not None:
                return list(self._of_key.get(selection.key(item.registration), ()))
            said_of = item.registration_id or item.request_id  # one that stood, and was refused when it was brought again
            return [guarded for guarded in self._all if guarded.registration_id == said_of]
        return [guarded for guarded in self._all if concerns(item, guarded)]

    def __len__(self) -> int:
        return len(self._of_pid)

    def _index(self, guarded: GuardedProcess, pid: int | None) -> None:
        before = self._pid_of.get(guarded)
        if before == pid:
            return
        if before is not None:
            place = guarded.subject.node, before
            self._of_pid[place].discard(guarded)
            if not self._of_pid[place]:
                del self._of_pid[place]
            del self._pid_of[guarded]
        if pid is not None:
            self._of_pid.setdefault((guarded.subject.node, pid), set()).add(guarded)
            self._pid_of[guarded] = pid


def concerns(item: Notification, guarded: Guarded) -> bool:
    """Whether a notice other than an answer is to be shown to it."""
    if isinstance(item, Gap | NodeChange):
        return item.node == guarded.subject.node
    if isinstance(item, Stale | Fresh):
        return item.node in (None, guarded.subject.node)
    return not isinstance(item, Deregistered)
