# SPDX-License-Identifier: Apache-2.0
"""What a guard knows of one subject: notifications come in, verdicts go out. It asks nobody, and waits for nothing."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from kmonitor.clients import selection
from kmonitor.clients.events import Event
from kmonitor.clients.identity import Identity
from kmonitor.clients.notifications import (
    Disconnected,
    Fresh,
    Gap,
    NodeChange,
    NodeState,
    Notification,
    Process,
    Progress,
    Reconnected,
    Registered,
    RegistrationState,
    Stale,
)
from kmonitor.clients.selection import Selection
from kmonitor.clients.sight import Sight
from kmonitor.clients.verdict import Blindness, Certainty, Death, Life, Subject, Verdict
from kmonitor.wire import clocks

ANSWERED = frozenset((Blindness.STARTING, Blindness.DISCONNECTED, Blindness.UNREACHABLE, Blindness.GAP))
"""What a node's answer takes away: when it was given all from before had been told."""


class Look(enum.Enum):
    """Whether the broker is to be asked again."""

    NO = "no"
    NOW = "now"
    LATER = "later"


@dataclass(frozen=True, slots=True)
class Clocks:
    """`monotonic` in seconds, `unix` in nanoseconds; `offset`: what makes Unix nanoseconds of a boot-time clock, by boot id; None if
    nobody here knows."""

    monotonic: Callable[[], float] = time.monotonic
    unix: Callable[[], int] = time.time_ns
    offset: Callable[[str], int | None] = lambda _boot_id: None


def own_offset() -> Callable[[str], int | None]:
    """For `Clocks.offset`: known of the machine that this runs on."""
    try:
        here = clocks.boot_id()
    except OSError:
        return lambda _boot_id: None
    return lambda boot_id: clocks.boottime_to_unix_ns() if boot_id == here else None


class Guarded:
    """One subject. `take` is given every notice of the monitor that may be of it, in order, and those events that may be; of answers to
    registrations those to its own."""

    def __init__(self, subject: Subject, wanted: Selection, its_clocks: Clocks) -> None:
        self.subject = subject
        self.wanted = wanted
        """What to register, each time that it is to be looked at."""
        self.key = selection.key(selection.registration(wanted))
        """Of the registration, as `selection.key` has it."""
        self.clocks = its_clocks
        self.sight = Sight(its_clocks.monotonic)
        self.sight.lost(Blindness.STARTING, "the broker has not answered yet")
        self.life = Life.UNKNOWN
        self.certainty = Certainty.SEEN
        self.since = 0
        self.process: Process | None = None
        self.alive = 0
        self.death: Death | None = None
        self.absence = ""
        self.look = Look.NO
        """What it wants to be done; who does it sets it back."""
        self.over = False
        """Nothing will ever change, and its registration is over too."""
        self.leave = False
        """But that it is to be deregistered: what has its pid now is none of its business."""
        self.registration_id = 0
        """Under which the broker has it, or had it last."""
        self.complete_ns = 0
        """Unix nanoseconds by the node's clock: how far it was complete when that was last said."""
        self._told: list[Verdict] = []
        self.verdict = self._snapshot(0)

    @property
    def answered(self) -> bool:
        """Whether there is something to say of it."""
        return Blindness.STARTING not in self.sight or Blindness.UNREACHABLE in self.sight

    @property
    def wants_something(self) -> bool:
        """Whether there is something to be done for it. Of a node that was removed nothing more will be known."""
        return self._wants() and Blindness.GONE not in self.sight

    def take(self, item: Notification) -> list[Verdict]:
        """What has become known by it: verdicts, in order; mostly none."""
        if isinstance(item, Event):
            self._event(item)
        elif isinstance(item, Progress):
            self.complete_ns = next((at.time_unix_nano for at in item.nodes if at.node == self.subject.node), self.complete_ns)
            self._progress(item)
        elif not self.over:
            if isinstance(item, Registered):
                self._registered(item)
            elif isinstance(item, NodeChange):
                self._node_changed(item)
            elif isinstance(item, Gap):
                self._gap(item)
            elif isinstance(item, Disconnected):
                self._lost(Blindness.DISCONNECTED, f"the broker at {item.address} does not answer: {item.reason}")
            elif isinstance(item, Reconnected):
                self._reconnected()
            elif isinstance(item, Stale):
                self._lost(Blindness.STALE, _stale(item))
            elif isinstance(item, Fresh):
                self.sight.back(Blindness.STALE)
        return self.told()

    def refused(self, reason: str) -> list[Verdict]:
        """The node, or the broker, could not take the registration."""
        if not self.over:
            self._refused(reason)
        return self.told()

    def told(self) -> list[Verdict]:
        """What is to be told now, and was not yet."""
        self._tell()
        told, self._told = self._told, []
        return told

    # ---- what kinds of subjects differ in

    def _event(self, event: Event) -> None:
        raise NotImplementedError

    def _progress(self, notice: Progress) -> None:
        raise NotImplementedError

    def _answer(self, answer: Registered) -> None:
        """The node has answered: what stood in the way so far may do so no more."""
        raise NotImplementedError

    def _refused(self, reason: str) -> None:
        """Asked again later: the node may not be known yet to a broker that was just started."""
        self.sight.back(Blindness.STARTING, Blindness.DISCONNECTED)
        self._lost(Blindness.UNREACHABLE, reason)
        self.look = Look.LATER

    def _rebooted(self) -> None:
        """All that ran there has ended."""

    def _wants(self) -> bool:
        return self.look is not Look.NO

    def _lost(self, why: Blindness, reason: str) -> None:
        """This stands in the way from now on."""
        self.sight.lost(why, reason)

    # ---- what they have in common

    def _registered(self, answer: Registered) -> None:
        if answer.error:
            self._refused(answer.error)
            return
        self.registration_id = answer.registration_id
        if answer.state in (RegistrationState.NODE_UNREACHABLE, RegistrationState.NO_NODE):
            self.sight.back(Blindness.STARTING, Blindness.DISCONNECTED)
            known = answer.state is RegistrationState.NODE_UNREACHABLE
            self._lost(Blindness.UNREACHABLE, "the broker does not hear the node" if known else "the broker knows no such node yet")
            return
        self._answer(answer)

    def _node_changed(self, change: NodeChange) -> None:
        if change.state is NodeState.UNREACHABLE:
            self._lost(Blindness.UNREACHABLE, change.reason or "the broker does not hear the node")
        elif change.state is NodeState.GONE:
            self._lost(Blindness.GONE, change.reason or "it was removed from the broker")
        elif change.state in (NodeState.UP, NodeState.REBOOTED):
            if change.state is NodeState.REBOOTED:
                self._rebooted()
            self.look = Look.NOW  # until it has answered nobody knows

    def _gap(self, gap: Gap) -> None:
        if self.life is Life.ALIVE:
            self._lost(Blindness.GAP, f"events of the node are missing ({gap.reason.name.lower()})")
            self.look = Look.NOW

    def _reconnected(self) -> None:
        if self.life is not Life.ALIVE:
            self.look = Look.NOW  # else its registration stands, and is brought again

    def _lives(self, life: Life, since: int, certainty: Certainty = Certainty.SEEN) -> None:
        self.life, self.since, self.certainty = life, since, certainty

    def now(self) -> int:
        """Unix nanoseconds: the node's clock as far as it was heard, else ours."""
        return self.complete_ns or self.clocks.unix()

    def started(self, process: Process) -> int:
        """When it did, Unix nanoseconds, if that can be known; else now."""
        offset = self.clocks.offset(process.boot_id) if process.boot_id else None
        return process.start_time + offset if offset is not None else self.now()

    def _tell(self) -> None:
        fresh = self._snapshot(self.verdict.number + 1)
        if _what_counts(fresh) != _what_counts(self.verdict):
            self.verdict = fresh
            self._told.append(fresh)
        else:
            self.verdict = replace(fresh, number=self.verdict.number)

    def _snapshot(self, number: int) -> Verdict:
        return Verdict(
            self.subject,
            self.life,
            self.certainty,
            self.since,
            self.process,
            self.alive,
            self.death,
            self.sight.blind,
            self.sight.since,
            self.sight.reason or (self.absence if self.life is Life.ABSENT else ""),
            number,
        )


def identity(process: Process) -> Identity:
    """Which process it is, for good."""
    return Identity(process.boot_id, process.pid, process.start_time)


def _what_counts(verdict: Verdict) -> tuple[object, ...]:
    process = verdict.process
    return verdict.life, None if process is None else identity(process), verdict.alive, verdict.blind, verdict.death


def _stale(notice: Stale) -> str:
    if notice.node is None:
        return f"nothing was heard of the broker for {notice.seconds:.1f} s"
    return f"nothing new is known of the node for {notice.seconds:.1f} s"
