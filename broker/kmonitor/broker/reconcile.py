# SPDX-License-Identifier: Apache-2.0
"""After a node was away, was started anew, or its ring ran over: who is still there, and who has ended unheard.

A process that a monitor was told of as running, and that is found gone without its end among the records, is told by a record
that its agent makes: PROCESS_EXIT, inferred. After a reboot, when no agent of that boot is left to make it, the broker does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import numpy as np

from kmonitor.broker.arms import EXITED, NODE_UNREACHABLE, Arms, session_of, wants_exits
from kmonitor.broker.block import Block, ProcessKey
from kmonitor.broker.keys import Pidfile, Process
from kmonitor.broker.matching import Span
from kmonitor.broker.nodes import Node
from kmonitor.broker.registrations import Arm, ArmState, Ask
from kmonitor.broker.sessions import Session
from kmonitor.v1 import agent_pb2
from kmonitor.wire.errors import BadRecordError
from kmonitor.wire.masks import EventType
from kmonitor.wire.record import F_INFERRED, F_MATCH_PROCESS, RECORD_SIZE, RECORD_VERSION, SLOT_DTYPE, SLOT_SIZE

_LOOK_AGAIN_SECONDS = 0.2
"""A ring that runs over does so many times a second: one question for all of them."""


class Reconcile:
    """Asks again for what monitors were told, and settles what does not come."""

    def __init__(self, arms: Arms) -> None:
        self._arms = arms
        self._router = arms.router
        self._looking: set[str] = set()

    def rebooted(self, node: Node, sessions: Iterable[Session]) -> Block | None:
        """The ends of all processes that were watched in the boot before, where its records ended; None if there were none.

        Called before the node takes on its new boot. Those whose monitors want no exits are told as EXITED when it has.
        """
        living: dict[ProcessKey, None] = {}
        for session in sessions:
            for span in session.matcher.spans(node.name):
                if span.process is not None and not span.lingers and span.epoch == node.epoch and wants_exits(span.arm):
                    living[span.process] = None
        if not living:
            return None
        records = np.zeros(len(living), dtype=SLOT_DTYPE)
        records["ring_length"] = RECORD_SIZE
        records["version"] = RECORD_VERSION
        records["type"] = int(EventType.PROCESS_EXIT)
        records["flags"] = F_MATCH_PROCESS | F_INFERRED
        pids, starts = zip(*living, strict=True)
        records["tgid"], records["tid"], records["start_boottime_ns"] = pids, pids, starts
        assert records.itemsize == SLOT_SIZE
        try:
            return Block(node.name, node.epoch, node.expected, records.tobytes(), time.time_ns(), node.boot_id)
        except BadRecordError:
            return None  # its agent's positions were no positions

    def restarted(self, node: Node, sessions: Iterable[Session]) -> None:
        """The node has come with another ring. What the one before may have had for arms that nobody has heard of yet is gone with it."""
        for session in sessions:
            for registration in session.registrations.about(node.name):
                arm = registration.arm_on(node.name)
                if arm is not None and arm.unheard is not None:
                    arm.unheard = 0

    def reconnected(self, node: Node, *, sessions: list[Session], rebooted: bool, epoch: int) -> agent_pb2.Interest:
        """The node is up: everything that is wanted of it, for its agent. `epoch`: that of its ring now."""
        asks, reads = _abandon(node)
        left_open: dict[Arm, list[Ask]] = {}
        for ask in asks:
            left_open.setdefault(ask.arm, []).append(ask)
        reading = {ask.arm for ask in reads}
        no_more: set[Arm] = set()
        anew: list[Ask] = []
        node.inferring.clear()
        living = self._living(node, sessions, epoch)
        for session in sessions:
            for registration in session.registrations.about(node.name):
                if registration.arm_on(node.name) is None and not registration.key.terms.selects(node.name, node.labels):
                    continue
                arm = registration.arm_on(node.name)
                if arm is None:
                    arm = registration.make_arm(node.name)
                    if registration.brought and session.cursor is not None:
                        # A broker that does not know the node has kept nothing of it for a client that does.
                        arm.absent = session.cursor.positions.get(node.name)
                if arm.state is ArmState.OVER:
                    continue
                if (rebooted and arm.process is not None) or registration.of_another_boot(node.name, node.boot_id):
                    node.interest.drop(arm)
                    no_more.add(arm)
                    for ask in left_open.get(arm, ()):
                        self._no_more(ask, node)
                    self._arms.tell_of_absence(node, arm, node.position)
                    self._arms.tell(arm, None, EXITED, node)
                    self._arms.over(arm)
                    continue
                if arm not in living and (arm in left_open or arm in reading):
                    continue  # the question that the last agent left open is asked again
                anew += self._asks_again(node, arm, living.get(arm, {}))
        asks = [ask for ask in asks if ask.arm not in no_more] + anew
        for ask in asks:
            if ask.request is None and not ask.child:
                self._arms.claim(node, ask, waits=False)
        for ask in (*reads, *(ask for ask in asks if isinstance(ask.target, Pidfile))):
            self._arms.claim(node, ask, waits=True)
        self._arms.flush_soon(node)  # behind the snapshot
        asks = [ask for ask in asks if not isinstance(ask.target, Pidfile)]
        for ask in asks:
            ask.arm.asked(ask)
        return node.interest.snapshot(asks)

    def disconnected(self, node: Node) -> None:
        """The node is not reachable: whoever waits for its answer is told."""
        asks, reads = _abandon(node)
        node.inferring.clear()
        for ask in (*asks, *reads):
            arm = ask.arm
            if arm.state is ArmState.ASKED:
                self._arms.set_state(arm, ArmState.AWAY)
                if arm.named is not None:
                    # Nobody was told of the process yet: the file is read anew when the node comes back.
                    arm.named = None
                    node.interest.drop(arm)
            if ask.request is not None:
                session_of(arm).pends(-1)
                self._arms.tell(arm, ask.request, NODE_UNREACHABLE, node)

    def ends_lost(self, node: Node) -> None:
        """Ends of watched processes are missing, and nobody can know whose: soon ask after all of them.

        Who is found gone is told so, as after a reconnect: else a registration would wait for ever for what was lost.
        """
        if node.name not in self._looking:
            self._looking.add(node.name)
            asyncio.get_running_loop().call_later(_LOOK_AGAIN_SECONDS, self._look_again, node)

    def gone(self, node: Node, ask: Ask, position: int, boottime_ns: int, living: list[Span]) -> None:
        """All records up to `position` have come. Processes whose exit was not among them are gone all the same, since `boottime_ns`."""
        arm = ask.arm
        left = [span for span in living if span.end is None and not span.lingers]
        if not left:
            return
        if wants_exits(arm) and node.hello.infers_exits and node.link is not None:
            processes = {span.process: None for span in left if span.process is not None and span.process not in node.inferring}
            if processes:
                message = agent_pb2.InferExits()
                for pid, start in processes:
                    message.processes.add(pid=pid, start_time=start)
                node.inferring.update(processes)
                node.link.send(agent_pb2.BrokerMessage(infer_exits=message))
            return
        for span in left:
            self._router.linger(span, boottime_ns)
            if span.process is not None:
                node.interest.forget_process_claim(arm, *span.process)
            arm.spans -= 1
        if not arm.spans:
            if ask.request is None:
                # Of a followed tree this is said once, of the last of it: EXITED means that nothing more will come.
                self._arms.tell(arm, None, EXITED, node, position=position)
            self._arms.over(arm)

    def _living(self, node: Node, sessions: list[Session], epoch: int) -> dict[Arm, dict[ProcessKey, bool]]:
        """The processes that monitors were told of, as far as their ends have not come; and whether the ring that they were told from
        is gone. Spans of such a ring end; what the new one may have for them already is noted down as unheard."""
        living: dict[Arm, dict[ProcessKey, bool]] = {}
        ends = self._arms.log.ends(node.name)
        for session in sessions:
            for span in session.matcher.spans(node.name):
                of_old_ring = span.epoch != epoch
                if of_old_ring and not span.lingers and span.end is None and span.arm.unheard is None:
                    span.arm.unheard = node.expected
                    self._arms.note(span.arm.registration)
                if span.process is not None and not span.lingers:
                    living.setdefault(span.arm, {})[span.process] = of_old_ring
                    if of_old_ring:
                        span.arm.spans -= 1
                if of_old_ring:
                    known = ends.get(span.epoch)
                    self._arms.end(span, known.position if known is not None else span.first)
        return living

    def _asks_again(self, node: Node, arm: Arm, living: dict[ProcessKey, bool]) -> list[Ask]:
        registration = arm.registration
        if not living:
            self._arms.set_state(arm, ArmState.ASKED)
            return [Ask(arm, None, registration.mask, registration.sought(node.name))]
        root = arm.process
        asks = [Ask(arm, None, registration.mask, Process(*key), child=key != root, known=gone) for key, gone in sorted(living.items())]
        for ask in asks:
            if ask.child and isinstance(ask.target, Process):
                node.interest.learn_process(arm, ask.target.pid, ask.target.start, mask=registration.mask, follow=True)
        return asks

    def _no_more(self, ask: Ask, node: Node) -> None:
        """Answer an ask without the agent: the process was one of another boot."""
        if ask.request is not None:
            session_of(ask.arm).pends(-1)
            self._arms.tell(ask.arm, ask.request, EXITED, node)

    def _look_again(self, node: Node) -> None:
        self._looking.discard(node.name)
        if not node.up:
            return  # all will be asked for when it comes back
        for span in self._router.living(node.name):
            arm: Arm = span.arm
            registration = arm.registration
            if span.process is not None and arm.state is ArmState.ARMED:
                target = Process(*span.process)
                ask = Ask(arm, None, registration.mask, target, child=arm.process != target.key)
                follow, root = registration.key.terms.follow, not ask.child
                node.interest.want_process(arm, *span.process, mask=registration.mask, follow=follow, ask=ask, root=root)
        self._arms.flush_soon(node)


def _abandon(node: Node) -> tuple[list[Ask], list[Ask]]:
    """What the node's agent was asked and has not answered: to arm, and to read."""
    asks, reads = node.interest.abandon(), node.pidfiles.abandon()
    for ask in (*asks, *reads):
        ask.arm.answered(ask)
    return asks, reads
