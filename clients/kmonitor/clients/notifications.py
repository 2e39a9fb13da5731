# SPDX-License-Identifier: Apache-2.0
"""What a monitor is told beside events: one frozen class for each kind of notification (DESIGN section 5).

Times are integers in nanoseconds: of the Unix epoch, or for `start_time` of the node's boot-time clock. Positions are bytes in
the node's ring: strictly increasing within an epoch, not dense.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Self

from kmonitor.clients.events import Event
from kmonitor.v1 import events_pb2, monitor_pb2
from kmonitor.wire.masks import EventType


class _OpenEnum(enum.IntEnum):
    """Values of a newer broker that this client does not know read as UNSPECIFIED."""

    @classmethod
    def _missing_(cls, value: object) -> Self:
        return cls(0)


class RegistrationState(_OpenEnum):
    """What became of a registration on one node. EXITED and NOT_FOUND are final: nothing will come from there."""

    UNSPECIFIED = 0
    RUNNING = 1
    EXITED = 2
    NOT_FOUND = 3
    NODE_UNREACHABLE = 4
    ARMED = 5
    NO_NODE = 6


class GapReason(_OpenEnum):
    """Where events were lost."""

    UNSPECIFIED = 0
    RING = 1
    AGENT = 2
    LOG = 3
    SUBSCRIBER = 4


class NodeState(_OpenEnum):
    """Whether the broker hears a node."""

    UNSPECIFIED = 0
    UP = 1
    UNREACHABLE = 2
    REBOOTED = 3
    GONE = 4


@dataclass(frozen=True, slots=True)
class Process:
    """A process of a node, now. `threads` 0 is one that ended and was not waited for.

    With the node's name `boot_id`, `pid` and `start_time` name it for good: `boot_id` is empty if the broker does not tell. `args` are
    the first 256 bytes of its command line, if they were asked for. `age_ns` is how long it had run when its node looked, in nanoseconds;
    None if the node does not tell.
    """

    pid: int
    ppid: int
    uid: int
    gid: int
    comm: str
    start_time: int
    cgroup_id: int
    threads: int
    boot_id: str = ""
    args: tuple[str, ...] = field(default=(), compare=False)
    args_truncated: bool = field(default=False, compare=False)
    age_ns: int | None = field(default=None, compare=False)

    @classmethod
    def from_proto(cls, message: events_pb2.Process, boot_id: str = "", boottime_ns: int = 0) -> Process:
        """Of a kmonitor.v1.Process, and the boot id that came beside it."""
        return cls(
            message.pid,
            message.ppid,
            message.uid,
            message.gid,
            message.comm,
            message.start_time,
            message.cgroup_id,
            message.threads,
            boot_id,
            tuple(message.args),
            message.args_truncated,
            max(boottime_ns - message.start_time, 0) if boottime_ns else None,
        )


@dataclass(frozen=True, slots=True)
class Members:
    """Who was in a control group, and in those below it, when its node looked. `cgroup_ids` are theirs, the group's own first; none if
    there is no such group. The end of a process that is not among them lies before `position` in the node's ring, if it was recorded."""

    processes: tuple[Process, ...]
    cgroup_ids: tuple[int, ...]
    epoch: int
    position: int


@dataclass(frozen=True, slots=True)
class Registered:
    """One node's answer to a registration: events from `position` on are delivered. `error` is set if this node could not take it
    (others may have), or, with no node, if a registration that was brought again after a reconnect was refused. `boot_id` is the
    node's now; empty if it is not known. `registration` is what was asked for, if this monitor knows of it; not to be changed."""

    request_id: int
    registration_id: int
    node: str
    state: RegistrationState
    process: Process | None
    epoch: int
    position: int
    pending: int
    event_mask: int
    target: str
    error: str | None = None
    boot_id: str = ""
    registration: monitor_pb2.Registration | None = field(default=None, compare=False, repr=False)
    stream_id: int = field(default=0, compare=False, repr=False)

    @classmethod
    def from_proto(cls, message: monitor_pb2.Registered) -> Registered:
        """Of a kmonitor.v1.Registered."""
        return cls(
            message.request_id,
            message.registration_id,
            message.node,
            RegistrationState(message.state),
            Process.from_proto(message.process, message.boot_id) if message.HasField("process") else None,
            message.epoch,
            message.position,
            message.pending,
            message.event_mask,
            target_text(message.target),
            message.error.message if message.HasField("error") else None,
            message.boot_id,
            stream_id=message.stream_id,
        )


@dataclass(frozen=True, slots=True)
class Deregistered:
    """Bits were cleared. `event_mask` are those that are left; 0 is the registration's end. `registration` is as in the request; not
    to be changed."""

    request_id: int
    registration_id: int
    event_mask: int
    error: str | None = None
    registration: monitor_pb2.Registration | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class LostCount:
    """So many events of a type."""

    type: EventType
    count: int


@dataclass(frozen=True, slots=True)
class Gap:
    """Events of a node are missing: all before `from_position` came, and all from `to_position` on will. `number` is the gap's
    place in the broker's log, which `log_id` names: larger for later ones; 0 if it is this stream's alone."""

    node: str
    reason: GapReason
    epoch: int
    from_position: int
    to_position: int
    from_time_unix_nano: int
    to_time_unix_nano: int
    lost: tuple[LostCount, ...]
    number: int = 0
    log_id: int = 0


@dataclass(frozen=True, slots=True)
class NodeChange:
    """A node came or went. `reason` is one line."""

    node: str
    state: NodeState
    time_unix_nano: int
    boot_id: str
    reason: str
    registration_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NodeProgress:
    """A node's events are complete up to here."""

    node: str
    epoch: int
    position: int
    time_unix_nano: int


@dataclass(frozen=True, slots=True)
class Progress:
    """The heartbeat, every second: all events up to these positions were delivered, and all gaps up to `number` of the log `log_id`
    told."""

    nodes: tuple[NodeProgress, ...]
    number: int = 0
    log_id: int = 0
    stream_id: int = field(default=0, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The broker does not answer; the client keeps trying. From here to `Reconnected` the monitor is blind."""

    address: str
    reason: str


@dataclass(frozen=True, slots=True)
class Reconnected:
    """The broker answers again. What was registered is being registered again (each is told as `Registered`), and events go on
    behind the last one that came, if the broker's log reaches. `seconds` is how long it was away."""

    address: str
    attempts: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Stale:
    """What this monitor knows of a node is old: it is complete only up to a time that has not moved on for `seconds`, though the
    broker has not lost the node. Without a node: nothing was heard of the broker itself for `seconds`, so that all is old."""

    node: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Fresh:
    """A `Stale` for the same node, or for all, is over. `seconds` is how long nothing had moved on in the end."""

    node: str | None
    seconds: float


Notice = Registered | Deregistered | Gap | NodeChange | Progress | Disconnected | Reconnected | Stale | Fresh
Notification = Event | Notice


def target_text(target: monitor_pb2.Target) -> str:
    """For people: "pid 4711", "pidfile /run/nginx.pid", "unit nginx.service", "everything"."""
    kind = target.WhichOneof("kind")
    if kind == "process":
        return f"pid {target.process.pid}"
    if kind == "pidfile":
        return f"pidfile {target.pidfile}"
    if kind == "cgroup":
        return f"control group {target.cgroup}"
    return f"unit {target.unit}" if kind == "unit" else "everything"


def gap_from_proto(message: monitor_pb2.Gap) -> Gap:
    """Of a kmonitor.v1.Gap."""
    return Gap(
        message.node,
        GapReason(message.reason),
        message.epoch,
        message.from_position,
        message.to_position,
        message.from_time_unix_nano,
        message.to_time_unix_nano,
        tuple(LostCount(EventType(lost.type), lost.count) for lost in message.lost),
        message.number,
        message.log_id,
    )


def node_change_from_proto(message: monitor_pb2.NodeChange) -> NodeChange:
    """Of a kmonitor.v1.NodeChange."""
    return NodeChange(
        message.node, NodeState(message.state), message.time_unix_nano, message.boot_id, message.reason, tuple(message.registration_ids)
    )


def progress_from_proto(message: monitor_pb2.Progress) -> Progress:
    """Of a kmonitor.v1.Progress."""
    nodes = tuple(NodeProgress(node.node, node.epoch, node.position, node.time_unix_nano) for node in message.nodes)
    return Progress(nodes, message.number, message.log_id, message.stream_id)
