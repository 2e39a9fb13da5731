# SPDX-License-Identifier: Apache-2.0
"""A registration, and what became of it on each node. There may be very many: see docs/decisions/0019."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from kmonitor.broker.block import ProcessKey
from kmonitor.broker.keys import Key, Process, Target
from kmonitor.v1 import monitor_pb2
from kmonitor.wire.masks import EventType


class ArmState(enum.StrEnum):
    """Where a registration stands on one node."""

    AWAY = "AWAY"
    """The node is not connected; to be armed when it returns."""
    ASKED = "ASKED"
    """The agent has not answered yet."""
    ARMED = "ARMED"
    OVER = "OVER"
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
    unheard: int | None = None
    """The node came with another ring, and where that begins: what is between there and the answer is this arm's, and nobody has heard it.
    None when its monitor has been told."""
    _asks: Ask | dict[Ask, None] | None = None
    """Most have but one."""

    @property
    def asks(self) -> Collection[Ask]:
        """Those that the agent has not answered yet: until then what an earlier answer says is not the last word."""
        if isinstance(self._asks, dict):
            return self._asks.keys()
        return () if self._asks is None else (self._asks,)

    def asked(self, ask: Ask) -> None:
        """The agent is to answer it."""
        if isinstance(self._asks, dict):
            self._asks[ask] = None
        else:
            self._asks = ask if self._asks in {None, ask} else {self._asks: None, ask: None}

    def answered(self, ask: Ask) -> None:
        """It has, or cannot any more."""
        if isinstance(self._asks, dict):
            self._asks.pop(ask, None)
        elif self._asks is ask:
            self._asks = None


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
    """The monitor's next stream goes on with it."""
    lent: bool = False
    """So does one of which it is not known whether it is that monitor's."""
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
        terms = self.key.terms
        return monitor_pb2.Registration(
            nodes=monitor_pb2.NodeSelector(names=terms.names, labels=dict(terms.labels)),
            target=self.target,
            event_mask=self.mask or sum(EventType),
            follow=terms.follow,
            filter=monitor_pb2.EventFilter(comms=terms.filter.comms, uids=terms.filter.uids, failures_only=terms.filter.failures_only),
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


def make_registration(session: object, request_id: int, key: Key, message: monitor_pb2.Registration, mask: int = 0) -> Registration:
    """One that was asked for with this message, of which this is the key."""
    return Registration(session, request_id, key, mask, b"" if isinstance(key.target, Process) else message.target.SerializeToString())
