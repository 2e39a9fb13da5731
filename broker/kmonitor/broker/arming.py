# SPDX-License-Identifier: Apache-2.0
"""From registrations to armed kernels: what is asked of the agents, and what their answers mean for the sessions."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from functools import partial
from typing import TypeAlias

from kmonitor.broker.errors import Code
from kmonitor.broker.interest import Group
from kmonitor.broker.log import EventLog
from kmonitor.broker.matching import Span
from kmonitor.broker.nodes import Node, Nodes
from kmonitor.broker.notices import gap, registered
from kmonitor.broker.registrations import Arm, ArmState, Ask, Pidfile, Process, Registration, Request
from kmonitor.broker.router import Router
from kmonitor.broker.sessions import Session
from kmonitor.v1 import agent_pb2, events_pb2, monitor_pb2

RUNNING = monitor_pb2.REGISTRATION_STATE_RUNNING
EXITED = monitor_pb2.REGISTRATION_STATE_EXITED
NOT_FOUND = monitor_pb2.REGISTRATION_STATE_NOT_FOUND
NODE_UNREACHABLE = monitor_pb2.REGISTRATION_STATE_NODE_UNREACHABLE
ARMED = monitor_pb2.REGISTRATION_STATE_ARMED
NO_NODE = monitor_pb2.REGISTRATION_STATE_NO_NODE
State: TypeAlias = "monitor_pb2.RegistrationState.ValueType"

_LOOK_AGAIN_SECONDS = 0.2
"""A ring that runs over does so many times a second: one question for all of them."""


class Arming:
    """Keeps interest and spans in step with the registrations."""

    def __init__(self, nodes: Nodes, router: Router, log: EventLog) -> None:
        self._nodes = nodes
        self._router = router
        self._log = log
        self._flushing: set[str] = set()
        self._looking: set[str] = set()

    # -- what sessions cause

    def arm(self, registration: Registration, name: str, request: Request, mask: int) -> None:
        """Arm a registration on a node, or note that it is to be armed when the node comes."""
        arm = registration.arms.setdefault(name, Arm(registration, name))
        if arm.state is ArmState.OVER:
            arm.process = None  # asked for anew
        node = self._nodes.get(name)
        if node is None or not node.up:
            if arm.state is not ArmState.ARMED:
                arm.state = ArmState.AWAY
            if node is not None:
                self._claim(node, Ask(arm, None, mask, registration.sought(name)), waits=False)
            self._tell(arm, request, NODE_UNREACHABLE, node)
            return
        if registration.of_another_boot(name, node.boot_id):
            self._tell_of_absence(node, _session(arm), node.position)
            self._tell(arm, request, EXITED, node, position=node.position)
            if not arm.spans:
                self._over(arm)
            return
        if arm.state is not ArmState.ARMED:
            arm.state = ArmState.ASKED
        self._claim(node, Ask(arm, request, mask, registration.sought(name)), waits=True)
        _session(arm).pends(1)
        self.flush_soon(node)

    def shrink(self, registration: Registration, bits: int) -> None:
        """Clear bits of a registration's mask: no event of them from now on. Without bits it is over."""
        registration.mask &= ~bits
        for arm in registration.arms.values():
            node = self._nodes.get(arm.node)
            if node is None:
                continue
            for span in self._spans(arm):
                left = span.mask & ~bits
                if left and not span.lingers:
                    # Before the old one ends: with its last span a registration's tree is forgotten.
                    first = max(span.first, node.position)
                    self._router.add(dataclasses.replace(span, mask=left, first=first, end=None))
                elif span.process and not span.lingers:
                    arm.spans -= 1
                self._router.end(span, node.position, self._log.end)
            if registration.mask:
                node.interest.remask(arm, registration.mask)
            else:
                node.interest.drop(arm)
                arm.state = ArmState.OVER
            self.flush_soon(node)

    def flush_soon(self, node: Node) -> None:
        """Send the agent what changed, once all that this turn of the event loop brings is in."""
        if node.up and node.name not in self._flushing:
            self._flushing.add(node.name)
            asyncio.get_running_loop().call_soon(self._flush, node)

    def _flush(self, node: Node) -> None:
        self._flushing.discard(node.name)
        if node.link is not None and node.interest.dirty:
            node.link.send(agent_pb2.BrokerMessage(interest=node.interest.delta()))
        if node.link is not None:
            for call in node.pidfiles.unsent():
                if node.hello.reads_pidfiles:
                    node.link.send(agent_pb2.BrokerMessage(read_pidfile=call))
                else:
                    why = f"cannot be read by this node's agent (version {node.hello.agent_version}): upgrade it"
                    self.pidfile_read(node, agent_pb2.PidfileRead(call_id=call.call_id, error=why))

    # -- what agents cause

    def reconnected(self, node: Node, *, sessions: list[Session], rebooted: bool, restarted: bool) -> agent_pb2.Interest:
        """The node is up: everything that is wanted of it, for its agent. `restarted`: positions start anew."""
        asks, reads = _abandon(node)
        living: dict[Arm, set[tuple[int, int]]] = {}
        for session in sessions:
            for span in session.matcher.spans(node.name):
                if span.process is not None and not span.lingers:
                    living.setdefault(span.arm, set()).add(span.process)
                if restarted:
                    self._router.end(span, node.position, self._log.end)
        if restarted:
            for arm in living:
                arm.spans = 0
        for session in sessions:
            for registration in list(session.registrations.values()):
                if node.name not in registration.arms and not registration.key.selects(node.name, node.labels):
                    continue
                arm = registration.arms.setdefault(node.name, Arm(registration, node.name))
                if arm.state is ArmState.OVER:
                    continue
                if (rebooted and arm.process is not None) or registration.of_another_boot(node.name, node.boot_id):
                    node.interest.drop(arm)
                    asks = [ask for ask in asks if ask.arm is not arm or self._no_more(ask, EXITED, node)]
                    self._tell(arm, None, EXITED, node)
                    self._over(arm)
                    continue
                if arm not in living and any(ask.arm is arm for ask in (*asks, *reads)):
                    continue  # the question that the last agent left open is asked again
                asks += self._asks_again(node, arm, living.get(arm, set()))
        for ask in asks:
            if ask.request is None and not ask.child:
                self._claim(node, ask, waits=False)
        for ask in (*reads, *(ask for ask in asks if isinstance(ask.target, Pidfile))):
            self._claim(node, ask, waits=True)
        self.flush_soon(node)  # behind the snapshot
        asks = [ask for ask in asks if not isinstance(ask.target, Pidfile)]
        for ask in asks:
            ask.arm.asks.add(ask)
        return node.interest.snapshot(asks)

    def _asks_again(self, node: Node, arm: Arm, living: set[tuple[int, int]]) -> list[Ask]:
        registration = arm.registration
        if not living:
            arm.state = ArmState.ASKED
            return [Ask(arm, None, registration.mask, registration.sought(node.name))]
        root = None if arm.process is None else (arm.process.pid, arm.process.start)
        asks = [Ask(arm, None, registration.mask, Process(*key), child=key != root) for key in sorted(living)]
        for ask in asks:
            if ask.child and isinstance(ask.target, Process):
                node.interest.learn_process(arm, ask.target.pid, ask.target.start, mask=registration.mask, follow=True)
        return asks

    def _no_more(self, ask: Ask, state: State, node: Node) -> bool:
        """Answer an ask without the agent. False, for use in a filter."""
        if ask.request is not None:
            _session(ask.arm).pends(-1)
            self._tell(ask.arm, ask.request, state, node)
        return False

    def disconnected(self, node: Node) -> None:
        """The node is not reachable: whoever waits for its answer is told."""
        asks, reads = _abandon(node)
        for ask in (*asks, *reads):
            arm = ask.arm
            if arm.state is ArmState.ASKED:
                arm.state = ArmState.AWAY
                if arm.named is not None:
                    # Nobody was told of the process yet: the file is read anew when the node comes back.
                    arm.named = None
                    node.interest.drop(arm)
            self._no_more(ask, NODE_UNREACHABLE, node)

    def ends_lost(self, node: Node) -> None:
        """Ends of watched processes are missing, and nobody can know whose: soon ask after all of them.

        Who is found gone is told so, as after a reconnect: else a registration would wait for ever for what was lost.
        """
        if node.name not in self._looking:
            self._looking.add(node.name)
            asyncio.get_running_loop().call_later(_LOOK_AGAIN_SECONDS, self._look_again, node)

    def _look_again(self, node: Node) -> None:
        self._looking.discard(node.name)
        if not node.up:
            return  # all will be asked for when it comes back
        for span in self._router.living(node.name):
            arm: Arm = span.arm
            registration = arm.registration
            if span.process is not None and arm.state is ArmState.ARMED:
                ask = Ask(arm, None, registration.mask, Process(*span.process), child=arm.process != Process(*span.process))
                follow, root = registration.key.follow, not ask.child
                node.interest.want_process(arm, *span.process, mask=registration.mask, follow=follow, ask=ask, root=root)
        self.flush_soon(node)

    def applied(self, node: Node, message: agent_pb2.InterestApplied) -> None:
        """The agent has done what an Interest said: answer those who wait for it."""
        processes = {(result.pid, result.start_time): result for result in message.processes}
        groups = {Group(kind, getattr(result, kind)): result for result in message.groups if (kind := result.WhichOneof("kind"))}
        for result in message.groups:
            if result.cgroup_ids:
                self._router.route_of(node.name).cgroup_tree.put(list(result.cgroup_ids))
        node.number = message.number
        for ask in node.interest.answered(message.version):
            arm = ask.arm
            arm.asks.discard(ask)
            if ask.request is not None:
                _session(arm).pends(-1)
            if not ask.mask & arm.registration.mask:
                self._withdrawn(ask, node)
                continue
            # Before the answer, and whatever it is: a process that ended in between may be the one that the client waits for.
            self._tell_of_absence(node, _session(arm), message.position)
            if isinstance(ask.target, Process):
                told = processes.get((ask.target.pid, ask.target.start))
                self._process_answer(node, (message.position, max(message.position, message.end_position)), ask, ask.target, told)
            elif isinstance(ask.target, Group):
                self._group_answer(node, message.position, ask, groups.get(ask.target))
            else:
                new = self._open(node, ask, message.position, None, None)
                if ask.request is not None or new:
                    self._tell(arm, ask.request, ARMED, node, position=message.position)

    def groups_changed(self, node: Node, message: agent_pb2.GroupsChanged) -> None:
        """Groups that are watched have gone, or were made anew under the same name: ask after them again."""
        for item in message.groups:
            kind = item.WhichOneof("kind")
            if kind is None:
                continue
            group = Group(kind, getattr(item, kind))
            for arm in node.interest.claims_of(group):
                assert isinstance(arm, Arm)
                self._claim(node, Ask(arm, None, arm.registration.mask, group), waits=True)
        self.flush_soon(node)

    def pidfile_read(self, node: Node, answer: agent_pb2.PidfileRead) -> None:
        """The agent has found out which process a file names: from here on the registration is of that one."""
        for ask in node.pidfiles.answered(answer.call_id):
            arm = ask.arm
            arm.asks.discard(ask)
            wanted = bool(ask.mask & arm.registration.mask)
            if wanted and answer.state == RUNNING and answer.process.start_time:
                arm.named = Process(answer.process.pid, answer.process.start_time)
                self._claim(node, dataclasses.replace(ask, target=arm.named), waits=True)
                continue
            if ask.request is not None:
                _session(arm).pends(-1)
            if not wanted:
                self._withdrawn(ask, node)
                continue
            self._tell_of_absence(node, _session(arm), node.position)
            if answer.state in {EXITED, NOT_FOUND}:
                self._tell(arm, ask.request, answer.state, node, position=node.position)
                if not arm.spans:
                    self._over(arm)
            else:
                what = answer.error or "was not understood by its agent"
                self._failed(arm, ask, f"pidfile {arm.registration.target.pidfile!r} {what}", node, Code.FAILED_PRECONDITION)
                self._refused(arm.registration, ask.request)
        self.flush_soon(node)

    def _withdrawn(self, ask: Ask, node: Node) -> None:
        """It was deregistered before the agent had answered. Who has asked waits for an answer all the same."""
        if ask.request is not None:
            error = monitor_pb2.RequestError(code=Code.ABORTED, message=f"deregistered before node {node.name} had answered")
            self._tell(ask.arm, ask.request, monitor_pb2.REGISTRATION_STATE_UNSPECIFIED, node, error=error)

    def _refused(self, registration: Registration, request: Request | None) -> None:
        """If no node has taken what was asked for, nothing is registered: nor on nodes that join later."""
        if request is None or request.outstanding or registration.granted:
            return
        if all(arm.state is ArmState.OVER for arm in registration.arms.values()):
            _remove(registration)

    def _process_answer(
        self, node: Node, positions: tuple[int, int], ask: Ask, target: Process, result: agent_pb2.InterestApplied.ProcessResult | None
    ) -> None:
        """`positions`: from where on a process that runs is delivered; before which the end of one that does not was recorded."""
        arm = ask.arm
        position, end = positions
        if result is None or result.error:
            _unclaim(node, arm, target)
            self._failed(arm, ask, result.error if result else "the agent gave no answer for the process", node)
        elif result.state == RUNNING:
            key = (target.pid, result.process.start_time or target.start)
            node.interest.settle_process(arm, target.pid, target.start, key[1])
            if not node.interest.claims(arm, *key):  # two asked for a pid, and it was given to another process in between
                self._claim(node, dataclasses.replace(ask, target=Process(*key)), waits=False)
                self.flush_soon(node)
            if not ask.child:
                arm.process = Process(*key)
                if isinstance(arm.registration.key.target, Pidfile):
                    arm.named = arm.process
            new = self._open(node, ask, position, key, None)
            if ask.request is not None or (new and not ask.child):
                self._tell(arm, ask.request, RUNNING, node, position=position, process=result.process)
        else:
            _unclaim(node, arm, target)
            _forget_named(arm, (target.pid, target.start))
            living = [
                span
                for span in self._spans(arm)
                if span.process and span.process[0] == target.pid and target.start in {0, span.process[1]} and not span.lingers
            ]
            state = NOT_FOUND if result.state == NOT_FOUND else EXITED
            if ask.request is not None or not living:
                if not ask.child:
                    self._tell(arm, ask.request, state, node, position=position)
                if not arm.spans:
                    self._over(arm)
            if living:
                # It ran when the broker last heard. Its exit may be among the records that are still to come: wait for them.
                node.when_reached(end, partial(self._gone, node, ask, end, living))

    def _gone(self, node: Node, ask: Ask, position: int, living: list[Span]) -> None:
        """All records up to `position` have come. Processes whose exit was not among them are gone all the same."""
        left = [span for span in living if span.end is None and not span.lingers]
        for span in left:
            self._router.end(span, position, self._log.end)
            if span.process is not None:
                node.interest.forget_process_claim(ask.arm, *span.process)
            ask.arm.spans -= 1
        if left and not ask.arm.spans:
            if ask.request is None:
                # Of a followed tree this is said once, of the last of it: EXITED means that nothing more will come.
                self._tell(ask.arm, None, EXITED, node, position=position)
            self._over(ask.arm)

    def _group_answer(self, node: Node, position: int, ask: Ask, result: agent_pb2.InterestApplied.GroupResult | None) -> None:
        arm = ask.arm
        if result is not None and not result.error and result.cgroup_ids:
            for span in self._spans(arm):
                if span.cgroup_id != result.cgroup_ids[0]:  # the unit was started anew
                    self._router.end(span, position, self._log.end)
            new = self._open(node, ask, position, None, result.cgroup_ids[0])
            if ask.request is not None or new:
                self._tell(arm, ask.request, ARMED, node, position=position)
            return
        was_there = bool(self._spans(arm))
        if not arm.asks:  # else the agent may be about to say that it has armed the group: it must not be told to undo that
            node.interest.drop(arm)
            self.flush_soon(node)
            for span in self._spans(arm):
                self._router.end(span, position, self._log.end)
        if result is not None and not result.error:
            # Who has watched it hears that it is over; who asks now, that there is none.
            self._tell(arm, ask.request, EXITED if was_there and ask.request is None else NOT_FOUND, node, position=position)
            self._over(arm)
        else:
            self._failed(arm, ask, result.error if result else "the agent gave no answer for the group", node)

    def _failed(self, arm: Arm, ask: Ask, why: str, node: Node, code: Code = Code.RESOURCE_EXHAUSTED) -> None:
        error = monitor_pb2.RequestError(code=code, message=f"node {node.name}: {why}")
        if not ask.child:
            self._tell(arm, ask.request, monitor_pb2.REGISTRATION_STATE_UNSPECIFIED, node, error=error)
        if not arm.spans:
            self._over(arm)

    # -- what the records cause

    def child_made(self, span: Span) -> None:
        """A followed process made a child, and the kernel has armed it."""
        node = self._nodes.get(span.node)
        arm: Arm = span.arm
        arm.spans += 1
        if node is not None and span.process is not None:
            node.interest.learn_process(arm, *span.process, mask=arm.registration.mask, follow=True)

    def orphan_found(self, span: Span) -> bool:
        """A process turned up that a followed one has forked, which was not told. False: its registration was made anew since."""
        arm: Arm = span.arm
        registration = arm.registration
        # A registration whose last known process ended a moment ago was not over.
        if _session(arm).registrations.setdefault(registration.key, registration) is not registration:
            return False
        span.mask &= registration.mask  # of a root that has ended: bits may have been deregistered since
        if not span.mask:
            return False
        if arm.state is ArmState.OVER:
            arm.state = ArmState.ARMED
        self.child_made(span)
        node = self._nodes.get(span.node)
        if node is not None:
            self.ends_lost(node)  # so may its end have been, or that of a child of its
        return True

    def process_ended(self, span: Span) -> None:
        """A registered process has ended, and the kernel has dropped its entry."""
        node = self._nodes.get(span.node)
        arm: Arm = span.arm
        arm.spans -= 1
        if node is not None and span.process is not None:
            node.interest.forget_process(*span.process)
        _forget_named(arm, span.process)
        if not arm.spans:
            self._over(arm)

    # -- the rest

    def _claim(self, node: Node, ask: Ask, *, waits: bool) -> None:
        """Put the whole mask of the registration into the node's interest. `waits`: the ask wants an answer to the next delta."""
        arm, mask = ask.arm, ask.arm.registration.mask
        waiting = ask if waits else None
        if waits:
            arm.asks.add(ask)
        if isinstance(ask.target, Process):
            follow = arm.registration.key.follow
            root = not ask.child
            node.interest.want_process(arm, ask.target.pid, ask.target.start, mask=mask, follow=follow, ask=waiting, root=root)
        elif isinstance(ask.target, Group):
            node.interest.want_group(arm, ask.target, mask, waiting)
        elif isinstance(ask.target, Pidfile):
            if waits:  # else it is read when the node comes
                node.pidfiles.want(ask, ask.target.path)
        else:
            node.interest.want_node(arm, mask, waiting)

    def _open(self, node: Node, ask: Ask, position: int, process: tuple[int, int] | None, cgroup_id: int | None) -> bool:
        """Deliver the asked bits from `position` on, unless that is so already. Whether anything is new."""
        arm, registration = ask.arm, ask.arm.registration
        arm.state = ArmState.ARMED
        covered = 0
        for span in self._spans(arm):
            if span.process == process and span.cgroup_id == cgroup_id and not span.lingers:
                covered |= span.mask
        mask = ask.mask & registration.mask & ~covered
        if not mask:
            return False
        key = registration.key
        self._router.add(
            Span(
                registration.session, arm, node.name, node.epoch, mask, position, process, cgroup_id,
                key.follow, key.filter, arm=arm, root=process is not None, since=node.number,
            )
        )  # fmt: skip
        if process is not None:
            arm.spans += 1
        return True

    def _tell_of_absence(self, node: Node, session: Session, position: int) -> None:
        """A client that comes back has missed what was between its cursor and now."""
        epoch, taken = session.cursor.pop(node.name, (node.epoch, position))
        first = taken + 1 if epoch == node.epoch else 0
        if first < position:
            missing = gap(
                node.name, monitor_pb2.GAP_REASON_LOG, node.epoch, positions=(first, position), times=(0, time.time_ns()), counts={}
            )
            session.tell(missing)

    def _spans(self, arm: Arm) -> list[Span]:
        return [span for span in _session(arm).matcher.spans(arm.node) if span.arm is arm]

    def _over(self, arm: Arm) -> None:
        """The registration is over on this node, unless a later request is still to be answered; and altogether, if it can have no
        other."""
        if arm.asks:
            arm.state, arm.process = ArmState.ASKED, None
            return
        arm.state = ArmState.OVER
        registration = arm.registration
        registration.forget_named(arm.node)
        arms = registration.arms
        if registration.key.exact and all(name in arms and arms[name].state is ArmState.OVER for name in registration.key.names):
            _remove(registration)

    def _tell(
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
        registration = arm.registration
        if request is not None:
            request.outstanding -= 1
            registration.granted |= error is None
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
        )
        _session(arm).tell(registered(message))


def _forget_named(arm: Arm, process: tuple[int, int] | None) -> None:
    sought = arm.registration.sought(arm.node)
    if isinstance(sought, Process) and sought.key == process:
        arm.registration.forget_named(arm.node)


def _abandon(node: Node) -> tuple[list[Ask], list[Ask]]:
    """What the node's agent was asked and has not answered: to arm, and to read."""
    asks, reads = node.interest.abandon(), node.pidfiles.abandon()
    for ask in (*asks, *reads):
        ask.arm.asks.discard(ask)
    return asks, reads


def _unclaim(node: Node, arm: Arm, target: Process) -> None:
    """The process was not armed: nobody wants it any more, unless a later request does."""
    if not any(isinstance(ask.target, Process) and ask.target.key == target.key for ask in arm.asks):
        node.interest.forget_process_claim(arm, target.pid, target.start)


def _remove(registration: Registration) -> None:
    session = registration.session
    assert isinstance(session, Session)
    session.registrations.pop(registration.key, None)


def _session(arm: Arm) -> Session:
    session = arm.registration.session
    assert isinstance(session, Session)
    return session
