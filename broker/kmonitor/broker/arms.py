# SPDX-License-Identifier: Apache-2.0
"""What registrations hold on nodes: claims in the nodes' interest, spans in the router, and what their monitors are told of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeAlias

from kmonitor.broker.errors import Code
from kmonitor.broker.interest import Group
from kmonitor.broker.keys import Pidfile, Process
from kmonitor.broker.log import EventLog
from kmonitor.broker.matching import Span
from kmonitor.broker.nodes import Node, Nodes
from kmonitor.broker.notices import gap, registered
from kmonitor.broker.registrations import Arm, ArmState, Ask, Registration, Request
from kmonitor.broker.router import Router
from kmonitor.broker.sessions import Session
from kmonitor.v1 import agent_pb2, events_pb2, monitor_pb2
from kmonitor.wire.masks import EventType
from kmonitor.wire.record import SLOT_SIZE

RUNNING = monitor_pb2.REGISTRATION_STATE_RUNNING
EXITED = monitor_pb2.REGISTRATION_STATE_EXITED
NOT_FOUND = monitor_pb2.REGISTRATION_STATE_NOT_FOUND
NODE_UNREACHABLE = monitor_pb2.REGISTRATION_STATE_NODE_UNREACHABLE
ARMED = monitor_pb2.REGISTRATION_STATE_ARMED
NO_NODE = monitor_pb2.REGISTRATION_STATE_NO_NODE
REFUSED = monitor_pb2.REGISTRATION_STATE_UNSPECIFIED
State: TypeAlias = "monitor_pb2.RegistrationState.ValueType"

_EXIT = int(EventType.PROCESS_EXIT)


class Arms:
    """The steps that arming, answers and reconciling are made of."""

    def __init__(self, nodes: Nodes, router: Router, log: EventLog) -> None:
        self.nodes = nodes
        self.router = router
        self.log = log
        self.on_unreadable: Callable[[Node, agent_pb2.PidfileRead], None] = lambda _node, _answer: None
        """Called instead of an agent that cannot read pidfiles."""
        self._flushing: set[str] = set()

    # -- towards the agents

    def flush_soon(self, node: Node) -> None:
        """Send the agent what changed, once all that this turn of the event loop brings is in."""
        if node.up and node.name not in self._flushing:
            self._flushing.add(node.name)
            asyncio.get_running_loop().call_soon(self._flush, node)

    def _flush(self, node: Node) -> None:
        self._flushing.discard(node.name)
        if node.link is None:
            return
        if node.interest.dirty:
            node.link.send_interest(node.interest.delta())
        for call in node.pidfiles.unsent():
            if node.hello.reads_pidfiles:
                node.link.send(agent_pb2.BrokerMessage(read_pidfile=call))
            else:
                why = f"cannot be read by this node's agent (version {node.hello.agent_version}): upgrade it"
                self.on_unreadable(node, agent_pb2.PidfileRead(call_id=call.call_id, error=why))

    def claim(self, node: Node, ask: Ask, *, waits: bool) -> None:
        """Put the whole mask of the registration into the node's interest. `waits`: the ask wants an answer to the next delta."""
        arm, mask = ask.arm, ask.arm.registration.mask
        waiting = ask if waits else None
        if waits:
            arm.asked(ask)
        if isinstance(ask.target, Process):
            follow = arm.registration.key.terms.follow
            root = not ask.child
            node.interest.want_process(arm, ask.target.pid, ask.target.start, mask=mask, follow=follow, ask=waiting, root=root)
        elif isinstance(ask.target, Group):
            node.interest.want_group(arm, ask.target, mask, waiting)
        elif isinstance(ask.target, Pidfile):
            if waits:  # else it is read when the node comes
                node.pidfiles.want(ask, ask.target.path)
        else:
            node.interest.want_node(arm, mask, waiting)

    # -- in the router

    def spans(self, arm: Arm) -> list[Span]:
        """The open ones."""
        return session_of(arm).matcher.spans_of(arm)

    def open(self, node: Node, ask: Ask, position: int, process: tuple[int, int] | None, cgroup_id: int | None) -> bool:
        """Deliver the asked bits from `position` on, unless that is so already. Whether anything is new."""
        arm, registration = ask.arm, ask.arm.registration
        registration.had_spans = True
        self.set_state(arm, ArmState.ARMED)
        covered = 0
        for span in self.spans(arm):
            if span.process == process and span.cgroup_id == cgroup_id and span.epoch == node.epoch and not span.lingers:
                covered |= span.mask
        mask = ask.mask & registration.mask & ~covered
        if not mask:
            return False
        terms = registration.key.terms
        self.router.add(
            Span(
                registration.session, arm, node.name, node.epoch, mask, position, process, cgroup_id,
                terms.follow, terms.filter, root=process is not None, since=node.number,
            )
        )  # fmt: skip
        if process is not None:
            arm.spans += 1
        return True

    def holds_from(self, node: Node, ask: Ask, position: int, process: tuple[int, int] | None, cgroup_id: int | None) -> int:
        """From which position on the asked bits are delivered, once `open` was called: `position`, or an earlier one if an earlier
        request or stream had asked for them; but none that the client's cursor is past, as it may go on with the place of somebody else.
        What an answer says, a client takes for its cursor; and it may overtake records."""
        held = [
            span
            for span in self.spans(ask.arm)
            if span.process == process and span.cgroup_id == cgroup_id and span.epoch == node.epoch and not span.lingers
        ]
        if all(span.first == position for span in held):
            return position
        bits = [1 << at for at in range(7) if ask.mask & ask.arm.registration.mask & 1 << at]
        first = max((min((span.first for span in held if span.mask & bit), default=position) for bit in bits), default=position)
        epoch, taken = session_of(ask.arm).matcher.taken.get(node.name, (0, 0))
        return max(first, (taken // SLOT_SIZE + 1) * SLOT_SIZE) if epoch == node.epoch else first

    def end(self, span: Span, position: int) -> None:
        """No event at or behind `position` is of this span, nor in blocks that are still to come."""
        self.router.end(span, position, self.log.end)

    # -- what becomes of a registration

    def set_state(self, arm: Arm, state: ArmState) -> None:
        """Where it stands on the node from now on."""
        arm.state = state
        self.note(arm.registration)

    def note(self, registration: Registration) -> None:
        """Something of it has changed that is to be remembered."""
        session = registration.session
        if isinstance(session, Session) and session.keeper is not None:
            session.keeper.registration_changed(registration)

    def over(self, arm: Arm) -> None:
        """The registration is over on this node, unless a later request is still to be answered; and altogether, if it can have no
        other."""
        if arm.asks:
            arm.process = None
            self.set_state(arm, ArmState.ASKED)
            return
        self.set_state(arm, ArmState.OVER)
        registration = arm.registration
        registration.forget_named(arm.node)
        if registration.key.terms.exact and all(_is_over(registration.arm_on(name)) for name in registration.key.terms.names):
            session_of(arm).over(registration)

    def refused(self, registration: Registration, request: Request | None) -> None:
        """If no node has taken what was asked for, nothing is registered: nor on nodes that join later."""
        if request is None or request.outstanding or registration.granted:
            return
        if all(arm.state is ArmState.OVER for arm in registration.arms):
            session = registration.session
            assert isinstance(session, Session)
            session.registrations.remove(registration)
            self.note(registration)

    def failed(self, arm: Arm, ask: Ask, why: str, node: Node, code: Code = Code.RESOURCE_EXHAUSTED) -> None:
        """The node could not do what was asked."""
        error = monitor_pb2.RequestError(code=code, message=f"node {node.name}: {why}")
        if not ask.child:
            self.tell(arm, ask.request, REFUSED, node, error=error)
        if not arm.spans:
            self.over(arm)

    def withdrawn(self, ask: Ask, node: Node) -> None:
        """It was deregistered before the agent had answered. Who has asked waits for an answer all the same."""
        if ask.request is not None:
            error = monitor_pb2.RequestError(code=Code.ABORTED, message=f"deregistered before node {node.name} had answered")
            self.tell(ask.arm, ask.request, REFUSED, node, error=error)

    # -- towards the monitors

    def tell(
        self,
        arm: Arm,
        request: Request | None,
        state: State,
        node: Node | None,
        *,
        position: int = 0,
        process: events_pb2.Process | None = None,
        error: monitor_pb2.RequestError | None = None,
    ) -> None:
        """How it stands with a registration on a node."""
        registration = arm.registration
        if request is not None:
            request.outstanding -= 1
            registration.granted |= error is None
        session = session_of(arm)
        message = monitor_pb2.Registered(
            request_id=registration.id if request is None else request.id,
            registration_id=registration.id,
            node=arm.node,
            state=state,
            process=process,
            epoch=node.epoch if node is not None else 0,
            boot_id=node.boot_id if node is not None else "",
            position=position,
            pending=0 if request is None else request.outstanding,
            event_mask=registration.mask,
            target=registration.target,
            error=error,
            stream_id=session.stream_id,
        )
        session.tell(registered(message))

    def tell_of_absence(self, node: Node, arm: Arm, position: int) -> None:
        """A client that comes back has missed what was between its cursor and now, if nobody has kept its place. And so has whoever was
        armed in a ring that is new to the broker, of what this has from before the answer: a broker that crashed had armed it there."""
        absent, unheard, session = arm.absent, arm.unheard, session_of(arm)
        if (absent is None and unheard is None) or session.detached:
            return  # a stream that comes back is told
        arm.absent = arm.unheard = None
        epoch, taken = absent or (0, 0)
        taken_epoch, taken_last = session.matcher.taken.get(node.name, (0, 0))
        first = taken + 1 if epoch == node.epoch else 0
        if absent is None and unheard is not None:
            first = max(unheard, taken_last + 1) if taken_epoch == node.epoch else unheard
        told_epoch, _, until = session.told_of_absence.get(node.name, (0, 0, 0))
        again = told_epoch == node.epoch
        if again:
            first = max(first, until)  # for another registration
        # Where nobody had asked for anything, positions stand still whatever happens: an empty range says that, too.
        if first < position or (epoch and not again):
            first = min(first, position)
            session.note_absence(node.name, node.epoch, first, position)
            times = (0, time.time_ns())
            message = gap(node.name, monitor_pb2.GAP_REASON_LOG, node.epoch, positions=(first, position), times=times, counts={})
            session.tell(message, absent=node.name)


def session_of(arm: Arm) -> Session:
    """Whose it is."""
    session = arm.registration.session
    assert isinstance(session, Session)
    return session


def _is_over(arm: Arm | None) -> bool:
    return arm is not None and arm.state is ArmState.OVER


def wants_exits(arm: Arm) -> bool:
    """Whether its monitor is told of ends by events."""
    return bool(arm.registration.mask & _EXIT)


def forget_named(arm: Arm, process: tuple[int, int] | None) -> None:
    """The process has ended: who asks again for the pid, or for the file, means whichever is there then."""
    sought = arm.registration.sought(arm.node)
    if isinstance(sought, Process) and sought.key == process:
        arm.registration.forget_named(arm.node)


def unclaim(node: Node, arm: Arm, target: Process) -> None:
    """The process was not armed: nobody wants it any more, unless a later request does."""
    if not any(isinstance(ask.target, Process) and ask.target.key == target.key for ask in arm.asks):
        node.interest.forget_process_claim(arm, target.pid, target.start)
