# SPDX-License-Identifier: Apache-2.0
"""Events, as a monitor gets them. The fields are those of a JSON line (DESIGN section 6).

Times are integers in nanoseconds: `time` of the Unix epoch, `start_time` of the node's boot-time clock. Positions are bytes in
the node's ring: strictly increasing within an epoch, not dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kmonitor.v1 import events_pb2
from kmonitor.wire.masks import EventType

_WITH_CHILD = (0x01, 0x08)
_ENDS = (0x02, 0x04, 0x10, 0x40)
_EXEC = 0x20
_EXIT = 0x40


@dataclass(frozen=True, slots=True)
class KilledBy:
    """Who sent the signal that ended a process. `pid` 0 is the kernel, or a sender that the agent cannot see."""

    pid: int
    comm: str
    uid: int


@dataclass(frozen=True, slots=True, eq=False)
class Event:
    """One event. Fields are read from the protobuf message when asked for: most programs want two or three of the twenty.

    `raw` is that message, as it came.
    """

    node: str
    epoch: int
    raw: events_pb2.Event
    boot_id: str = ""
    """With node, pid and start time it names the process for good; empty if the broker does not tell."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Event) and self._source == other._source and self.raw == other.raw

    @property
    def _source(self) -> tuple[str, str, int]:
        return self.node, self.boot_id, self.epoch

    def __hash__(self) -> int:
        return hash((self.node, self.epoch, self.raw.position, self.raw.pid, self.raw.type))

    def __repr__(self) -> str:
        return f"Event({self.type.name} pid={self.pid} comm={self.comm!r} node={self.node!r} position={self.position})"

    @property
    def type(self) -> EventType:
        """Exactly one bit."""
        return EventType(self.raw.type)

    @property
    def position(self) -> int:
        """In the node's ring."""
        return self.raw.position

    @property
    def pid(self) -> int:
        """The process (thread group)."""
        return self.raw.pid

    @property
    def tid(self) -> int:
        """The thread that did it."""
        return self.raw.tid

    @property
    def ppid(self) -> int:
        """The parent; 0 if it is outside the agent's pid namespace."""
        return self.raw.ppid

    @property
    def uid(self) -> int:
        """Real user id."""
        return self.raw.uid

    @property
    def gid(self) -> int:
        """Real group id."""
        return self.raw.gid

    @property
    def comm(self) -> str:
        """At most 15 bytes."""
        return self.raw.comm

    @property
    def time(self) -> int:
        """Unix nanoseconds."""
        return self.raw.time

    @property
    def start_time(self) -> int:
        """Boot-time nanoseconds."""
        return self.raw.start_time

    @property
    def cgroup_id(self) -> int:
        """The control group (v2) it is in."""
        return self.raw.cgroup_id

    @property
    def inferred(self) -> bool:
        """It was found, not seen happening. An exit then has no status; with source netlink a fork may be inferred too."""
        return self.raw.inferred

    @property
    def child_pid(self) -> int | None:
        """Fork and thread create."""
        return self.raw.child_pid if self.raw.type in _WITH_CHILD else None

    @property
    def child_tid(self) -> int | None:
        """Fork and thread create."""
        return self.raw.child_tid if self.raw.type in _WITH_CHILD else None

    @property
    def child_start_time(self) -> int | None:
        """Fork and thread create: boot-time nanoseconds."""
        return self.raw.child_start_time if self.raw.type in _WITH_CHILD else None

    @property
    def filename(self) -> str | None:
        """Exec: the file as named to execve(2)."""
        return self.raw.filename if self.raw.type == _EXEC else None

    @property
    def args(self) -> tuple[str, ...]:
        """Exec: as many arguments as fit; otherwise empty."""
        return tuple(self.raw.args)

    @property
    def args_truncated(self) -> bool:
        """Exec: the file name or the arguments did not fit."""
        return self.raw.args_truncated

    @property
    def exit_code(self) -> int | None:
        """0 to 255; None if a signal ended it, the exit was inferred, or it is no exit."""
        return self.raw.exit_code if self.raw.HasField("exit_code") else None

    @property
    def exit_signal(self) -> int | None:
        """The signal that ended it, if one did."""
        return self.raw.exit_signal if self.raw.HasField("exit_signal") else None

    @property
    def core_dumped(self) -> bool:
        """A core was dumped."""
        return self.raw.core_dumped

    @property
    def oom_killed(self) -> bool:
        """The out-of-memory killer chose it."""
        return self.raw.oom_killed

    @property
    def killed_by(self) -> KilledBy | None:
        """Who sent the fatal signal, if known."""
        if not self.raw.HasField("killed_by"):
            return None
        sender = self.raw.killed_by
        return KilledBy(sender.pid, sender.comm, sender.uid)

    @property
    def ok(self) -> bool:
        """Not a failure: no exit at all, or one with code 0. An inferred exit is not ok: nobody knows."""
        if self.raw.type not in _ENDS:
            return True
        return not self.raw.inferred and self.raw.HasField("exit_code") and self.raw.exit_code == 0

    @property
    def is_exit(self) -> bool:
        """The process has ended."""
        return self.raw.type == _EXIT


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Events of one node in the order of their positions, as they came. Iterating makes them `Event`s.

    `events` are the protobuf messages: for programs that handle a hundred thousand a second.
    """

    node: str
    epoch: int
    events: Sequence[events_pb2.Event]
    boot_id: str = ""

    def __len__(self) -> int:
        return len(self.events)

    def __iter__(self) -> Iterator[Event]:
        node, epoch, boot_id = self.node, self.epoch, self.boot_id
        return (Event(node, epoch, raw, boot_id) for raw in self.events)
