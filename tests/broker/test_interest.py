# SPDX-License-Identifier: Apache-2.0
"""The union per node, and its deltas: an agent that applies them is to hold the union at every time."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kmonitor.broker.interest import Group, NodeInterest
from kmonitor.v1 import agent_pb2

PIDS = st.integers(1, 3)
CLAIMS = st.sampled_from("ABCD")
MASKS = st.integers(1, 0x7F)


class UnionMachine(RuleBasedStateMachine):
    """Processes with known start times, groups and the node, claimed and dropped at will."""

    def __init__(self) -> None:
        super().__init__()
        self.interest: NodeInterest[str] = NodeInterest()
        self.processes: dict[tuple[str, int], tuple[int, bool]] = {}
        self.groups: dict[tuple[str, str], int] = {}
        self.node: dict[str, int] = {}
        self.kernel: dict[int, tuple[int, bool]] = {}
        self.kernel_groups: dict[str, int] = {}
        self.kernel_node = 0

    @rule(claim=CLAIMS, pid=PIDS, mask=MASKS, follow=st.booleans())
    def want_process(self, claim: str, pid: int, mask: int, follow: bool) -> None:
        self.processes[claim, pid] = (mask, follow)
        self.interest.want_process(claim, pid, pid * 10, mask=mask, follow=follow, ask=None)

    @rule(claim=CLAIMS, name=st.sampled_from(["/x", "/y"]), mask=MASKS)
    def want_group(self, claim: str, name: str, mask: int) -> None:
        self.groups[claim, name] = mask
        self.interest.want_group(claim, Group("cgroup", name), mask, None)

    @rule(claim=CLAIMS, mask=MASKS)
    def want_node(self, claim: str, mask: int) -> None:
        self.node[claim] = mask
        self.interest.want_node(claim, mask, None)

    @rule(claim=CLAIMS)
    def drop(self, claim: str) -> None:
        self.processes = {key: value for key, value in self.processes.items() if key[0] != claim}
        self.groups = {key: value for key, value in self.groups.items() if key[0] != claim}
        self.node.pop(claim, None)
        self.interest.drop(claim)

    @rule(pid=PIDS)
    def ends(self, pid: int) -> None:
        self.processes = {key: value for key, value in self.processes.items() if key[1] != pid}
        self.kernel.pop(pid, None)
        self.interest.forget_process(pid, pid * 10)

    @rule(claim=CLAIMS, mask=MASKS)
    def remask(self, claim: str, mask: int) -> None:
        self.processes = {key: (mask, value[1]) if key[0] == claim else value for key, value in self.processes.items()}
        self.groups = {key: mask if key[0] == claim else value for key, value in self.groups.items()}
        if claim in self.node:
            self.node[claim] = mask
        self.interest.remask(claim, mask)

    @rule()
    def reconnects(self) -> None:
        self.apply(self.interest.snapshot([]))

    def apply(self, message: agent_pb2.Interest) -> None:
        if message.reset:
            self.kernel.clear()
            self.kernel_groups.clear()
        for item in message.processes:
            if item.event_mask:
                self.kernel[item.pid] = (item.event_mask, item.follow)
            else:
                self.kernel.pop(item.pid, None)
        for group in message.groups:
            if group.event_mask:
                self.kernel_groups[group.cgroup] = group.event_mask
            else:
                self.kernel_groups.pop(group.cgroup, None)
        self.kernel_node = message.node_mask

    @invariant()
    def kernel_holds_the_union(self) -> None:
        if self.interest.dirty:
            self.apply(self.interest.delta())
        expected: dict[int, tuple[int, bool]] = {}
        for (_, pid), (mask, follow) in self.processes.items():
            before, followed = expected.get(pid, (0, False))
            expected[pid] = (before | mask | 0x40 | (0x08 if follow else 0), followed or follow)
        assert self.kernel == expected
        groups: dict[str, int] = {}
        for (_, name), mask in self.groups.items():
            groups[name] = groups.get(name, 0) | mask
        assert self.kernel_groups == groups
        wide = 0
        for mask in self.node.values():
            wide |= mask
        assert self.kernel_node == wide == self.interest.node_mask
        assert self.interest.watched_processes == len(expected)


TestUnion = UnionMachine.TestCase


def test_a_second_claim_is_looked_up_and_settled() -> None:
    interest: NodeInterest[str] = NodeInterest()
    interest.want_process("A", 5, 0, mask=0x40, follow=False, ask="first")
    first = interest.delta()
    assert list(interest.answered(first.version)) == ["first"]
    interest.settle_process("A", 5, 0, 50)
    interest.want_process("B", 5, 0, mask=0x20, follow=False, ask="second")
    second = interest.delta()
    assert [(item.start_time, item.event_mask, item.look_up) for item in second.processes] == [(0, 0x60, True)]
    assert list(interest.answered(first.version)) == []
    assert list(interest.answered(second.version)) == ["second"]
    interest.settle_process("B", 5, 0, 50)
    assert interest.watched_processes == 1
    interest.drop("A")
    assert [(item.start_time, item.event_mask) for item in interest.delta().processes] == [(50, 0x60)] or not interest.dirty
    interest.drop("B")
    assert [(item.start_time, item.event_mask) for item in interest.delta().processes] == [(50, 0)]


def test_dropping_an_unanswered_claim_never_arms_another_process() -> None:
    interest: NodeInterest[str] = NodeInterest()
    interest.want_process("A", 5, 50, mask=0x40, follow=False, ask=None)
    interest.want_process("B", 5, 0, mask=0x20, follow=False, ask="b")
    interest.delta()
    interest.drop("B")
    assert [(item.start_time, item.event_mask) for item in interest.delta().processes] in ([(50, 0x40)], [])
