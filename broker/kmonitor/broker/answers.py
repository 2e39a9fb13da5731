# SPDX-License-Identifier: Apache-2.0
"""What agents answer, and what that means for those who have asked."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Iterator
from functools import partial

from kmonitor.broker.arms import ARMED, EXITED, NOT_FOUND, RUNNING, Arms, forget_named, session_of, unclaim, wants_exits
from kmonitor.broker.errors import Code, RefusedError
from kmonitor.broker.interest import Group
from kmonitor.broker.keys import Pidfile, Process
from kmonitor.broker.nodes import Link, Node
from kmonitor.broker.reconcile import Reconcile
from kmonitor.broker.registrations import Arm, Ask
from kmonitor.v1 import agent_pb2

Result = agent_pb2.InterestApplied.ProcessResult
GroupResult = agent_pb2.InterestApplied.GroupResult

LEVELS_MOST = 2048
"""Of control groups: no path of 4096 bytes has more."""


logger = logging.getLogger(__name__)

_AT_A_TIME_S = 0.01
"""Answers are dealt with for so long, seconds; then come others."""


class Answers:
    """Takes the answers of all agents."""

    def __init__(self, arms: Arms, reconcile: Reconcile) -> None:
        self._arms = arms
        self._router = arms.router
        self._reconcile = reconcile
        arms.on_unreadable = self.pidfile_read

    def applied(self, node: Node, message: agent_pb2.InterestApplied) -> None:
        """The agent has done what an Interest said: answer those who wait for it. If they are many, others have their turn in between, and
        the agent's next message waits: see `Link.ready`."""
        if node.link is not None:
            self._go_on(node.link, self._applied(node, message))

    def _go_on(self, link: Link, answering: Iterator[None]) -> None:
        loop = asyncio.get_running_loop()
        if link.node.link is not link:
            return  # what was not answered is asked again of the next agent
        until = loop.time() + _AT_A_TIME_S
        try:
            for _ in answering:
                if loop.time() > until:
                    link.ready.clear()
                    link.heard = loop.time()  # what it says meanwhile lies unread
                    loop.call_soon(self._go_on, link, answering)
                    return
        except Exception:
            logger.exception("node %s: its agent's answer could not be dealt with: please report it", link.node.name)
            link.close(RefusedError(Code.INTERNAL, "the answer could not be dealt with"))
        link.ready.set()

    def _applied(self, node: Node, message: agent_pb2.InterestApplied) -> Iterator[None]:
        processes = {(result.pid, result.start_time): result for result in message.processes}
        groups = {Group(kind, getattr(result, kind)): result for result in message.groups if (kind := result.WhichOneof("kind"))}
        for group, result in groups.items():
            # What nobody asked for is not kept: an agent could say any number of it.
            if 0 < len(result.cgroup_ids) <= LEVELS_MOST and node.interest.claims_of(group):
                self._router.learn_group(node.name, node.epoch, result.cgroup_ids)
        node.number = message.number
        node.applied = message.version, message.boottime_ns
        position = message.position
        nothing = message.error or "the agent gave no answer for it"
        for ask in node.interest.answered(message.version):
            yield
            arm = ask.arm
            arm.answered(ask)
            if ask.request is not None:
                session_of(arm).pends(-1)
            if not ask.mask & arm.registration.mask:
                self._arms.withdrawn(ask, node)
                continue
            # Before the answer, and whatever it is: a process that ended in between may be the one that the client waits for.
            self._arms.tell_of_absence(node, arm, position)
            if isinstance(ask.target, Process):
                told = processes.get((ask.target.pid, ask.target.start))
                self._process_answer(node, message, ask, ask.target, told or Result(error=nothing))
            elif isinstance(ask.target, Group):
                self._group_answer(node, message, ask, groups.get(ask.target) or GroupResult(error=nothing))
            elif message.error:
                self._give_up(node, message, arm)
                self._arms.failed(arm, ask, message.error, node)
            else:
                new = self._arms.open(node, ask, position, None, None)
                if ask.request is not None or new:
                    first = self._arms.holds_from(node, ask, position, None, None)
                    self._arms.tell(arm, ask.request, ARMED, node, position=first)

    def groups_changed(self, node: Node, message: agent_pb2.GroupsChanged) -> None:
        """Groups that are watched have gone, or were made anew under the same name: ask after them again."""
        for item in message.groups:
            kind = item.WhichOneof("kind")
            if kind is None:
                continue
            group = Group(kind, getattr(item, kind))
            for arm in node.interest.claims_of(group):
                assert isinstance(arm, Arm)
                self._arms.claim(node, Ask(arm, None, arm.registration.mask, group), waits=True)
        self._arms.flush_soon(node)

    def pidfile_read(self, node: Node, answer: agent_pb2.PidfileRead) -> None:
        """The agent has found out which process a file names: from here on the registration is of that one."""
        for ask in node.pidfiles.answered(answer.call_id):
            arm = ask.arm
            arm.answered(ask)
            wanted = bool(ask.mask & arm.registration.mask)
            if wanted and answer.state == RUNNING and answer.process.start_time:
                arm.named = Process(answer.process.pid, answer.process.start_time)
                self._arms.note(arm.registration)
                self._arms.claim(node, dataclasses.replace(ask, target=arm.named), waits=True)
                continue
            if ask.request is not None:
                session_of(arm).pends(-1)
            if not wanted:
                self._arms.withdrawn(ask, node)
                continue
            self._arms.tell_of_absence(node, arm, node.position)
            if answer.state in {EXITED, NOT_FOUND}:
                self._arms.tell(arm, ask.request, answer.state, node, position=node.position)
                if not arm.spans:
                    self._arms.over(arm)
            else:
                what = answer.error or "was not understood by its agent"
                self._arms.failed(arm, ask, f"pidfile {arm.registration.target.pidfile!r} {what}", node, Code.FAILED_PRECONDITION)
                self._arms.refused(arm.registration, ask.request)
        self._arms.flush_soon(node)

    def _process_answer(self, node: Node, message: agent_pb2.InterestApplied, ask: Ask, target: Process, result: Result) -> None:
        """`result`: what the message says of the process."""
        arm = ask.arm
        position, end = message.position, max(message.position, message.end_position)
        if result.error:
            unclaim(node, arm, target)
            self._arms.failed(arm, ask, result.error, node)
        elif result.state == RUNNING:
            self._runs(node, position, ask, target, result)
        else:
            unclaim(node, arm, target)
            living = [
                span
                for span in self._arms.spans(arm)
                if span.process and span.process[0] == target.pid and target.start in {0, span.process[1]} and not span.lingers
            ]
            if not living and ask.known and wants_exits(arm) and node.hello.infers_exits:
                # Its monitor was told that it runs, and where its end was recorded is gone: it is told by an event all the same.
                self._arms.open(node, ask, position, target.key, None)
                living = [span for span in self._arms.spans(arm) if span.process == target.key]
            if not living:
                forget_named(arm, target.key)
            state = NOT_FOUND if result.state == NOT_FOUND else EXITED
            if ask.request is not None or not living:
                if not ask.child:
                    self._arms.tell(arm, ask.request, state, node, position=position)
                if not arm.spans:
                    self._arms.over(arm)
            if living:
                # It ran when the broker last heard. Its exit may be among the records that are still to come: wait for them.
                node.when_reached(end, partial(self._reconcile.gone, node, ask, end, message.boottime_ns, living))

    def _runs(self, node: Node, position: int, ask: Ask, target: Process, result: Result) -> None:
        arm = ask.arm
        start = result.process.start_time or target.start
        key = node.interest.settle_process(arm, target.pid, target.start, start)
        if key is None:  # two asked for a pid, and it was given to another process in between
            key = target.pid, start
            self._arms.claim(node, dataclasses.replace(ask, target=Process(*key)), waits=False)
            self._arms.flush_soon(node)
        if not ask.child:
            arm.process = key
            if isinstance(arm.registration.key.target, Pidfile):
                arm.named = Process(*key)
        new = self._arms.open(node, ask, position, key, None)
        if ask.request is not None or (new and not ask.child):
            first = self._arms.holds_from(node, ask, position, key, None)
            self._arms.tell(arm, ask.request, RUNNING, node, position=first, process=result.process)

    def _group_answer(self, node: Node, message: agent_pb2.InterestApplied, ask: Ask, result: GroupResult) -> None:
        """What was recorded of a group that is gone, or could not be, may still be on its way: its spans stay for that."""
        arm, position = ask.arm, message.position
        before = [span for span in self._arms.spans(arm) if not span.lingers]
        if not result.error and result.cgroup_ids:
            for span in before:
                if span.cgroup_id != result.cgroup_ids[0]:  # the unit was started anew
                    self._router.linger(span, message.boottime_ns)
            new = self._arms.open(node, ask, position, None, result.cgroup_ids[0])
            if ask.request is not None or new:
                first = self._arms.holds_from(node, ask, position, None, result.cgroup_ids[0])
                self._arms.tell(arm, ask.request, ARMED, node, position=first)
            return
        self._give_up(node, message, arm)
        if result.error:
            self._arms.failed(arm, ask, result.error, node)
        else:
            # Who has watched it hears that it is over; who asks now, that there is none.
            self._arms.tell(arm, ask.request, EXITED if before and ask.request is None else NOT_FOUND, node, position=position)
            self._arms.over(arm)

    def _give_up(self, node: Node, message: agent_pb2.InterestApplied, arm: Arm) -> None:
        """A group, or the whole node, is not armed."""
        if arm.asks:
            return  # the agent may be about to say that it has armed it: it must not be told to undo that
        node.interest.drop(arm)
        self._arms.flush_soon(node)
        for span in self._arms.spans(arm):
            if not span.lingers:
                self._router.linger(span, message.boottime_ns)
