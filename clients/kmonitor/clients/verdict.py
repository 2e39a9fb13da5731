# SPDX-License-Identifier: Apache-2.0
"""What a guard says of a process: is it alive, since when, why did it die, and how sure is that. See `kmonitor.clients.guard`."""

from __future__ import annotations

import enum
import signal
from dataclasses import dataclass, field

from kmonitor.clients.events import Event, KilledBy
from kmonitor.clients.identity import Identity
from kmonitor.clients.notifications import Process
from kmonitor.wire.plain import plain_text


class Life(enum.Enum):
    """Of a subject."""

    UNKNOWN = "unknown"
    """Nobody has answered yet."""
    ALIVE = "alive"
    DEAD = "dead"
    """It was alive, and has ended."""
    ABSENT = "absent"
    """It is not there, and was not since the guard began to look: no such process, an empty control group, no pidfile."""


class Certainty(enum.Enum):
    """Where the verdict has its life from."""

    SEEN = "seen"
    """The kernel said so: it found the process when it armed, or reported the exit."""
    INFERRED = "inferred"
    """It was found gone afterwards: behind a gap, an agent's restart, or a reboot. When and why is not known."""


class Blindness(enum.Enum):
    """Why what happens now would not be told now. What the verdict says is then of the past."""

    STARTING = "starting"
    """The registration was not answered yet."""
    DISCONNECTED = "disconnected"
    """The broker does not answer."""
    STALE = "stale"
    """The broker answers, but nothing new is known of the node, or no heartbeat came."""
    UNREACHABLE = "unreachable"
    """The broker does not hear the node: it is down, cut off, or its agent ended. Whether the process lives is Corosync's to say, or
    STONITH's."""
    GAP = "gap"
    """Events of the node were lost, and its agent has not yet said that it looked at what is watched."""
    GONE = "gone"
    """The node was removed from the broker: final."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is guarded: on one node the process of a `pid` (and `start_time` and `boot_id`: no other), the one that a `pidfile` names, or
    those of a systemd `unit` or of a control group (`cgroup`, a path below /sys/fs/cgroup); give one of the four. `comms` are globs:
    of a unit or group only processes of such names count.

    `name` is the caller's, and tells subjects apart: two of a guard cannot have the same.
    """

    name: str
    node: str
    pid: int | None = None
    start_time: int = 0
    boot_id: str = ""
    pidfile: str | None = None
    unit: str | None = None
    cgroup: str | None = None
    comms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Death:
    """How a process ended. Without status (`exit_code` and `exit_signal` None) if it was inferred."""

    process: Identity
    comm: str
    time_unix_nano: int
    exit_code: int | None = None
    exit_signal: int | None = None
    core_dumped: bool = False
    oom_killed: bool = False
    killed_by: KilledBy | None = None
    inferred: bool = False

    @classmethod
    def of(cls, event: Event) -> Death:
        """What a PROCESS_EXIT says."""
        return cls(
            Identity(event.boot_id, event.pid, event.start_time),
            event.comm,
            event.time,
            event.exit_code,
            event.exit_signal,
            event.core_dumped,
            event.oom_killed,
            event.killed_by,
            event.inferred,
        )

    @property
    def failed(self) -> bool:
        """Not by exit code 0. An inferred end counts as one: nobody knows."""
        return self.exit_code != 0

    def __str__(self) -> str:
        """One line for people, without the process's name: "killed by SIGKILL from pid 4711 (bash), uid 0", "exit code 3"."""
        if self.exit_signal is None:
            return "end not seen" if self.exit_code is None else f"exit code {self.exit_code}"
        text = f"killed by {_signal_name(self.exit_signal)}{_sender(self)}"
        return f"{text}, core dumped" if self.core_dumped else text


@dataclass(frozen=True, slots=True)
class Verdict:
    """A subject, as the guard knows it now. A snapshot."""

    subject: Subject
    life: Life = Life.UNKNOWN
    certainty: Certainty = Certainty.SEEN
    since_unix_nano: int = 0
    """Of this life, by the node's clock: for ALIVE the process's start where the node's clock allows to say, else when it was found."""
    process: Process | None = None
    """The one that is alive, or was the last. Of a unit or control group the oldest that counts."""
    alive: int = 0
    """Processes that count and live: 0 or 1, more for a unit or control group."""
    death: Death | None = None
    """Of DEAD: why. Of a unit or control group the end of its oldest process, or of the last if that one's is not known."""
    blind: Blindness | None = None
    blind_since: float = 0.0
    """By time.monotonic() of this side."""
    reason: str = ""
    """Of blindness, or of ABSENT: one line."""
    number: int = field(default=0, compare=False)
    """Counts the verdicts of this subject."""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _sender(death: Death) -> str:
    if death.oom_killed:
        return ": out of memory"
    by = death.killed_by
    if by is None or (by.pid == 0 and not by.comm):  # the kernel itself, as at a fault
        return ""
    comm = plain_text(by.comm)
    return f" from pid {by.pid} ({comm}), uid {by.uid}" if by.pid else f" from {comm} outside, uid {by.uid}"
