# SPDX-License-Identifier: Apache-2.0
"""What sessions and records cause: registrations are armed and withdrawn, followed processes come and go."""

from __future__ import annotations

import dataclasses

from kmonitor.broker.arms import EXITED, NODE_UNREACHABLE, Arms, forget_named, session_of
from kmonitor.broker.matching import Span
from kmonitor.broker.nodes import Node
from kmonitor.broker.reconcile import Reconcile
from kmonitor.broker.registrations import Arm, ArmState, Ask, Registration, Request


class Arming:
    """Keeps interest and spans in step with the registrations."""

    def __init__(self, arms: Arms, reconcile: Reconcile) -> None:
        self._arms = arms
        self._nodes = arms.nodes
        self._router = arms.router
        self._reconcile = reconcile

    def arm(self, registration: Registration, name: str, request: Request, mask: int) -> None:
        """Arm a registration on a node, or note that it is to be armed when the node comes."""
        arm = registration.make_arm(name)
        if arm.state is ArmState.OVER:
            arm.process = None  # asked for anew
        node = self._nodes.get(name)
        if node is None or not node.up:
            if arm.state is not ArmState.ARMED:
                self._arms.set_state(arm, ArmState.AWAY)
            if node is not None:
                self._arms.claim(node, Ask(arm, None, mask, registration.sought(name)), waits=False)
            self._arms.tell(arm, request, NODE_UNREACHABLE, node)
            return
        if registration.of_another_boot(name, node.boot_id):
            self._arms.tell_of_absence(node, arm, node.position)
            self._arms.tell(arm, request, EXITED, node, position=node.position)
            if not arm.spans:
                self._arms.over(arm)
            return
        if arm.state is not ArmState.ARMED:
            self._arms.set_state(arm, ArmState.ASKED)
        self._arms.claim(node, Ask(arm, request, mask, registration.sought(name)), waits=True)
        session_of(arm).pends(1)
        self._arms.flush_soon(node)

    def shrink(self, registration: Registration, bits: int) -> None:
        """Clear bits of a registration's mask: no event of them from now on. Without bits it is over."""
        registration.mask &= ~bits
        for arm in registration.arms:
            node = self._nodes.get(arm.node)
            if node is None:
                continue
            for span in self._arms.spans(arm):
                left = span.mask & ~bits
                if left and not span.lingers:
                    # Before the old one ends: with its last span a registration's tree is forgotten.
                    first = max(span.first, node.position)
                    self._router.add(dataclasses.replace(span, mask=left, first=first, end=None, id=0))
                elif span.process and not span.lingers:
                    arm.spans -= 1
                self._arms.end(span, node.position)
            if registration.mask:
                node.interest.remask(arm, registration.mask)
            else:
                node.interest.drop(arm)
                self._arms.set_state(arm, ArmState.OVER)
            self._arms.flush_soon(node)
        self._arms.note(registration)

    def remove_node(self, node: Node, registrations: list[Registration]) -> None:
        """The node will not come back: registrations are over there; for those that may select it again it is as if it had never been."""
        for registration in registrations:
            arm = registration.arm_on(node.name)
            if arm is None:
                continue
            for span in self._arms.spans(arm):
                self._arms.end(span, node.position)
            arm.spans = 0
            node.interest.drop(arm)
            if arm.state is not ArmState.OVER:
                self._arms.over(arm)
            if not registration.key.terms.exact:
                registration.remove_arm(node.name)
            self._arms.note(registration)

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
        session = session_of(arm)
        # A registration whose last known process ended a moment ago was not over.
        if not session.registrations.add(registration):
            return False
        session.past.pop(registration.key, None)
        span.mask &= registration.mask  # of a root that has ended: bits may have been deregistered since
        if not span.mask:
            return False
        if arm.state is ArmState.OVER:
            self._arms.set_state(arm, ArmState.ARMED)
        self.child_made(span)
        node = self._nodes.get(span.node)
        if node is not None:
            self._reconcile.ends_lost(node)  # so may its end have been, or that of a child of its
        return True

    def process_ended(self, span: Span) -> None:
        """A registered process has ended, and the kernel has dropped its entry."""
        node = self._nodes.get(span.node)
        arm: Arm = span.arm
        arm.spans -= 1
        if node is not None and span.process is not None:
            node.interest.forget_process(*span.process)
            node.inferring.discard(span.process)
        forget_named(arm, span.process)
        if not arm.spans:
            self._arms.over(arm)
