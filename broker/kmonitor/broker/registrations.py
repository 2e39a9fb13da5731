# SPDX-License-Identifier: Apache-2.0
"""A registration as it was asked for, checked and in canonical form; and what became of it on each node."""

from __future__ import annotations

import enum
import functools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from kmonitor.broker.block import ProcessKey
from kmonitor.broker.filters import NO_FILTER, Filter
from kmonitor.broker.interest import Group
from kmonitor.v1 import monitor_pb2
from kmonitor.wire.errors import BadSelectorError
from kmonitor.wire.masks import EventType, check_mask
from kmonitor.wire.selectors import (
    check_boot_id,
    check_cgroup_path,
    check_glob,
    check_node_selector,
    check_pid,
    check_pidfile,
    check_unit_name,
    is_glob,
    node_matches,
)

T = TypeVar("T")

LIST_LIMIT = 1024
"""Names, labels, globs or uids in one registration."""


@dataclass(frozen=True, slots=True)
class Process:
    """One process by pid; start time 0 is whichever has the pid."""

    pid: int
    start: int
    boot_id: str = ""
    """The boot that the start time is of; empty if that is not said."""

    @property
    def key(self) -> ProcessKey:
        """(pid, start time), as a node's interest and records have it."""
        return self.pid, self.start

    def may_be(self, other: Process) -> bool:
        """Whether this is the other process, as far as both say which they mean."""
        return (
            self.pid == other.pid
            and (self.start == other.start or 0 in {self.start, other.start})
            and (self.boot_id == other.boot_id or "" in {self.boot_id, other.boot_id})
        )


@dataclass(frozen=True, slots=True)
class Pidfile:
    """The process that a file of the node names when the node is asked."""

    path: str


Target = Process | Group | Pidfile | None
"""None is every process of the node."""


@dataclass(frozen=True, slots=True)
class Key:
    """What makes two registrations the same: registering again adds bits to the mask."""

    names: tuple[str, ...]
    labels: tuple[tuple[str, str], ...]
    target: Target
    follow: bool
    filter: Filter

    def selects(self, node: str, labels: dict[str, str]) -> bool:
        """Whether it is about this node."""
        return node_matches(node, labels, self.names, dict(self.labels))

    @property
    def exact_names(self) -> tuple[str, ...]:
        """Those of its names that are no globs."""
        return tuple(name for name in self.names if not is_glob(name))

    @property
    def exact(self) -> bool:
        """Whether it names all the nodes it can ever select."""
        return bool(self.names) and len(self.exact_names) == len(self.names)


class ArmState(enum.Enum):
    """Where a registration stands on one node."""

    AWAY = enum.auto()
    """The node is not connected; to be armed when it returns."""
    ASKED = enum.auto()
    """The agent has not answered yet."""
    ARMED = enum.auto()
    OVER = enum.auto()
    """The process has ended, or there is no such target."""


@dataclass(eq=False, slots=True)
class Arm:
    """One registration on one node."""

    registration: Registration
    node: str
    state: ArmState = ArmState.AWAY
    process: ProcessKey | None = None
    """The process that was found, once it is armed."""
    named: Process | None = None
    """The one that the target, a pidfile, was found to name: what is asked of the agent from then on, until that process has ended."""
    spans: int = 0
    """Open spans of processes that live: the process itself, and those it made, if followed."""
    absent: tuple[int, int] | None = None
    """(epoch, last position taken) of a client that comes back, until it is told from where on it is armed: nobody kept its place."""
    asks: Collection[Ask] = ()
    """Those that the agent has not answered yet: until then what an earlier answer says is not the last word."""

    def asked(self, ask: Ask) -> None:
        """The agent is to answer it."""
        if isinstance(self.asks, set):
            self.asks.add(ask)
        else:
            self.asks = {ask}

    def answered(self, ask: Ask) -> None:
        """It has, or cannot any more."""
        if isinstance(self.asks, set):
            self.asks.discard(ask)
            if not self.asks:
                self.asks = ()  # most arms are asked for once


@dataclass(eq=False, slots=True)
class Registration:
    """Lives from the first register request with its key until its mask is empty, or the stream ends."""

    session: object
    id: int
    """The id of the request that made it."""
    key: Key
    mask: int
    asked: bytes = b""
    """The kmonitor.v1.Target as it was asked for, unless it is a process: then the key says it all."""
    granted: bool = False
    """Whether any node has answered with anything but an error."""
    had_spans: bool = False
    """Whether there has been anything to deliver."""
    serial: int = 0
    """Under which it is remembered, where it is: clients may use an id again."""
    taken: bool = False
    """Another stream goes on with it."""
    brought: bool = False
    """A stream that has come back has brought it: its client may have had it before."""
    _found: dict[str, Process] | None = None
    _arms: Arm | dict[str, Arm] | None = None
    """Most have but one."""

    @property
    def target(self) -> monitor_pb2.Target:
        """As it was asked for."""
        target = self.key.target
        if isinstance(target, Process):
            process = monitor_pb2.ProcessTarget(pid=target.pid, start_time=target.start, boot_id=target.boot_id)
            return monitor_pb2.Target(process=process)
        return monitor_pb2.Target.FromString(self.asked)

    def message(self) -> monitor_pb2.Registration:
        """What makes its key again, with the mask that it has, or any if it has none."""
        key = self.key
        return monitor_pb2.Registration(
            nodes=monitor_pb2.NodeSelector(names=key.names, labels=dict(key.labels)),
            target=self.target,
            event_mask=self.mask or sum(EventType),
            follow=key.follow,
            filter=monitor_pb2.EventFilter(comms=key.filter.comms, uids=key.filter.uids, failures_only=key.filter.failures_only),
        )

    @property
    def arms(self) -> Collection[Arm]:
        """One for each node that it is, or was, about."""
        if isinstance(self._arms, dict):
            return self._arms.values()
        return () if self._arms is None else (self._arms,)

    def arm_on(self, node: str) -> Arm | None:
        """Its arm on a node; None if it has none."""
        if isinstance(self._arms, dict):
            return self._arms.get(node)
        return self._arms if self._arms is not None and self._arms.node == node else None

    def make_arm(self, node: str) -> Arm:
        """Its arm on a node, which it has from now on."""
        arm = self.arm_on(node)
        if arm is None:
            arm = Arm(self, node)
            if isinstance(self._arms, dict):
                self._arms[node] = arm
            else:
                self._arms = arm if self._arms is None else {self._arms.node: self._arms, node: arm}
        return arm

    def remove_arm(self, node: str) -> None:
        """It has none on this node any more."""
        if isinstance(self._arms, dict):
            self._arms.pop(node, None)
        elif self.arm_on(node) is not None:
            self._arms = None

    @property
    def found(self) -> Mapping[str, Process]:
        """Node -> the process that had the pid there, or that the pidfile named, as a client knows it from an earlier stream."""
        return self._found or _NOTHING

    def find(self, found: Mapping[str, Process]) -> None:
        """Put these into `found`."""
        if found:
            if self._found is None:
                self._found = {}
            self._found.update(found)

    def sought(self, node: str) -> Target:
        """What the node's agent is to be asked for."""
        arm = self.arm_on(node)
        return (arm and arm.named) or self.found.get(node) or self.key.target

    def of_another_boot(self, node: str, boot_id: str) -> bool:
        """Whether it is of a process of the node that was there in another boot than this one."""
        target = self.sought(node)
        return isinstance(target, Process) and target.boot_id not in {"", boot_id}

    def forget_named(self, node: str) -> None:
        """The process that had the pid, or that the pidfile named, has ended: who asks again means the one that is named then."""
        if self._found is not None:
            self._found.pop(node, None)
        arm = self.arm_on(node)
        if arm is not None:
            arm.named = None


_NOTHING: Mapping[str, Process] = {}


@dataclass(eq=False, slots=True)
class Request:
    """A register request: counts the answers that are still to come."""

    id: int
    outstanding: int


@dataclass(eq=False, slots=True)
class Ask:
    """What an agent was asked to arm."""

    arm: Arm
    request: Request | None
    """None if the broker asks for itself, after the node has come or returned."""
    mask: int
    """The bits that are to be delivered from the answer on."""
    target: Target
    child: bool = False
    """It is about a process that the registered one made."""
    known: bool = False
    """It is about a process that was told of as running, and whose end may lie in a ring that is gone."""


_SHARED_LENGTH = 8
"""Items of what is kept once for all that have the same."""


@functools.lru_cache(maxsize=1024)
def _one(value: T) -> T:
    """The same object for values that are equal: most registrations differ in their targets only."""
    return value


def make_registration(session: object, request_id: int, key: Key, message: monitor_pb2.Registration, mask: int = 0) -> Registration:
    """One that was asked for with this message, of which this is the key."""
    return Registration(session, request_id, key, mask, b"" if isinstance(key.target, Process) else message.target.SerializeToString())


def parse_key(message: monitor_pb2.Registration) -> Key:
    """Check a registration. Raises BadMaskError or BadSelectorError."""
    check_mask(message.event_mask)
    names, labels = message.nodes.names, message.nodes.labels
    for what, items in (("node names", names), ("labels", labels), ("comm globs", message.filter.comms), ("uids", message.filter.uids)):
        if len(items) > LIST_LIMIT:
            raise BadSelectorError(f"{len(items)} {what} in one registration: at most {LIST_LIMIT}")
    check_node_selector(names, labels)
    for glob in message.filter.comms:
        check_glob(glob, "comm")
    wanted = Filter(tuple(sorted(set(message.filter.comms))), tuple(sorted(set(message.filter.uids))), message.filter.failures_only)
    target = _target(message.target)
    # All that a group's or a node's processes fork is in the group, or on the node, already.
    follow = message.follow and isinstance(target, Process | Pidfile)
    key = Key(tuple(sorted(set(names))), tuple(sorted(labels.items())), target, follow, wanted or NO_FILTER)
    if max(map(len, (key.names, key.labels, wanted.comms, wanted.uids))) <= _SHARED_LENGTH:
        return Key(_one(key.names), _one(key.labels), target, follow, _one(key.filter))
    return key


def _target(message: monitor_pb2.Target) -> Target:
    kind = message.WhichOneof("kind")
    if kind == "process":
        return _process(message.process)
    if kind == "cgroup":
        return Group("cgroup", check_cgroup_path(message.cgroup))
    if kind == "unit":
        return Group("unit", check_unit_name(message.unit))
    if kind == "pidfile":
        return Pidfile(check_pidfile(message.pidfile))
    return None


def _process(message: monitor_pb2.ProcessTarget | monitor_pb2.RegisterRequest.FoundProcess) -> Process:
    pid, boot_id = check_pid(message.pid), message.boot_id
    if boot_id and not message.start_time:
        raise BadSelectorError("a boot id belongs to a start time: give both")
    return Process(pid, message.start_time, check_boot_id(boot_id) if boot_id else "")


def parse_found(messages: Iterable[monitor_pb2.RegisterRequest.FoundProcess], target: Target) -> dict[str, Process]:
    """Node -> process that the target is there, as the client knows. Raises BadSelectorError."""
    found = {item.node: process for item in messages if (process := _process(item)).start}
    if isinstance(target, Process):
        for node, process in found.items():
            if not process.may_be(target):
                raise BadSelectorError(f"the process found on {node!r} is not the one of the registration: leave it out")
    return found if isinstance(target, Process | Pidfile) else {}
