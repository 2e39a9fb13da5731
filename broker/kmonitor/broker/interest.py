# SPDX-License-Identifier: Apache-2.0
"""What a node's kernel is to let through: the union of all registrations there, told to the agent in versioned deltas."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kmonitor.v1 import agent_pb2
from kmonitor.wire.masks import EventType

Claim = Hashable
"""Who wants it: one registration of one session."""
Ask = TypeVar("Ask")

_ALWAYS = int(EventType.PROCESS_EXIT)  # so that the broker learns when the kernel drops its entry
_FOLLOWED = int(EventType.PROCESS_FORK)  # so that the broker learns of the children that the kernel armed


@dataclass(frozen=True, order=True, slots=True)
class Group:
    """A control group by path, or a systemd unit by name."""

    kind: str
    """"cgroup" or "unit"."""
    name: str


@dataclass(slots=True)
class _Process:
    """Who claims one (pid, start time); start time 0 is whichever process has the pid."""

    claims: dict[Claim, tuple[int, bool]] = field(default_factory=dict)
    sent: tuple[int, bool] = (0, False)
    roots: set[Claim] = field(default_factory=set)
    """Those of the claims that are of this very process, and follow."""


class NodeInterest(Generic[Ask]):
    """The claims on one node, and what its agent has not been told of yet.

    An *ask* is whatever the caller wants back when the agent has answered the version that it went out with.
    """

    def __init__(self) -> None:
        self.version = 0
        self._processes: dict[int, dict[int, _Process]] = {}
        """pid -> start time -> entry."""
        self._claimed: dict[Claim, set[tuple[int, int]]] = {}
        """The (pid, start time) of each claim's entries in `_processes`."""
        self._groups: dict[Group, dict[Claim, int]] = {}
        self._node: dict[Claim, int] = {}
        self._dirty_processes: dict[tuple[int, int], bool] = {}
        """(pid, start time) -> whether to look it up."""
        self._dirty_groups: dict[Group, None] = {}
        self._dirty_node = False
        self._asks: list[Ask] = []
        self._unanswered: deque[tuple[int, list[Ask]]] = deque()

    @property
    def node_mask(self) -> int:
        """The mask for every process of the node."""
        mask = 0
        for bits in self._node.values():
            mask |= bits
        return mask

    @property
    def watched_processes(self) -> int:
        """How many processes have an entry of their own."""
        return sum(map(len, self._processes.values()))

    @property
    def dirty(self) -> bool:
        """Whether there is anything to tell the agent."""
        return bool(self._dirty_processes or self._dirty_groups or self._dirty_node or self._asks)

    def want_process(self, claim: Claim, pid: int, start: int, *, mask: int, follow: bool, ask: Ask | None, root: bool = False) -> None:
        """Claim a process, with all of `mask` from now on. With an ask it is looked up, even if the kernel is armed for it.

        `root`: the registration is of this process, and not of one that has forked it.
        """
        entry = self._entry(pid, start)
        entry.claims[claim] = (mask, follow)
        if root and follow:
            entry.roots.add(claim)
        self._claimed.setdefault(claim, set()).add((pid, start))
        self._touch(pid, start, look_up=ask is not None)
        if ask is not None:
            self._asks.append(ask)

    def learn_process(self, claim: Claim, pid: int, start: int, *, mask: int, follow: bool) -> None:
        """Note a claim that the kernel has armed by itself: a followed child. Tells the agent nothing."""
        entry = self._entry(pid, start)
        entry.claims[claim] = (mask, follow)
        self._claimed.setdefault(claim, set()).add((pid, start))
        entry.sent = self._union(pid, start)

    def settle_process(self, claim: Claim, pid: int, asked: int, actual: int) -> None:
        """The agent has found out which process has the pid: the claim on (pid, asked) is one on (pid, actual)."""
        entry = self._processes.get(pid, {}).get(asked)
        if entry is None or claim not in entry.claims or asked == actual:
            return
        settled = self._entry(pid, actual)
        mask, follow = entry.claims.pop(claim)
        self._claimed[claim].discard((pid, asked))
        self._claimed[claim].add((pid, actual))
        before, followed = settled.claims.get(claim, (0, False))
        settled.claims[claim] = (mask | before, follow or followed)
        if claim in entry.roots:
            entry.roots.discard(claim)
            settled.roots.add(claim)
        settled.sent = (settled.sent[0] | entry.sent[0], settled.sent[1] or entry.sent[1])
        if not entry.claims:
            self._remove(pid, asked)

    def claims(self, claim: Claim, pid: int, start: int) -> bool:
        """Whether this process is claimed under this name."""
        return (pid, start) in self._claimed.get(claim, ())

    def remask(self, claim: Claim, mask: int) -> None:
        """Replace the mask of all that is claimed under this name."""
        for pid, start in self._claimed.get(claim, ()):
            claims = self._processes[pid][start].claims
            claims[claim] = (mask, claims[claim][1])
            self._touch(pid, start, look_up=False)
        for group, masks in self._groups.items():
            if claim in masks:
                masks[claim] = mask
                self._dirty_groups[group] = None
        if claim in self._node:
            self._node[claim] = mask
            self._dirty_node = True

    def drop(self, claim: Claim) -> None:
        """Withdraw all that is claimed under this name: the agent is told what is left."""
        for pid, start in list(self._claimed.get(claim, ())):
            self._withdraw(claim, pid, start)
            others = self._processes.get(pid, {})
            if start == 0 and others and 0 not in others:
                # Start time 0 would arm whichever process has the pid now with what was meant for others.
                self._dirty_processes.pop((pid, 0), None)
                for other in others:
                    self._touch(pid, other, look_up=False)
            else:
                self._touch(pid, start, look_up=False)
        for group in [group for group, masks in self._groups.items() if claim in masks]:
            self._drop_group(claim, group)
        if self._node.pop(claim, None) is not None:
            self._dirty_node = True

    def forget_process_claim(self, claim: Claim, pid: int, start: int) -> None:
        """Withdraw a claim on a process that the agent found gone: there is nothing to remove."""
        self._withdraw(claim, pid, start)

    def forget_process(self, pid: int, start: int) -> None:
        """The process has ended, and the kernel has removed its entry."""
        if start in self._processes.get(pid, {}):
            self._remove(pid, start)
            self._dirty_processes.pop((pid, start), None)

    def want_group(self, claim: Claim, group: Group, mask: int, ask: Ask | None) -> None:
        """Claim a group, with all of `mask` from now on."""
        self._groups.setdefault(group, {})[claim] = mask
        self._dirty_groups[group] = None
        if ask is not None:
            self._asks.append(ask)

    def claims_of(self, group: Group) -> list[Claim]:
        """Who claims a group."""
        return list(self._groups.get(group, ()))

    def want_node(self, claim: Claim, mask: int, ask: Ask | None) -> None:
        """Claim every process of the node, with all of `mask` from now on."""
        self._node[claim] = mask
        self._dirty_node = True
        if ask is not None:
            self._asks.append(ask)

    def delta(self) -> agent_pb2.Interest:
        """What changed since the last message, as the next version. The asks so far are waiting for its answer from now on."""
        message = self._next()
        for (pid, start), look_up in self._dirty_processes.items():
            union = self._union(pid, start)
            entry = self._processes.get(pid, {}).get(start)
            if entry is not None:
                if union == entry.sent and not look_up:
                    continue
                entry.sent = union
            mask, follow = union
            root = look_up and entry is not None and bool(entry.roots)
            message.processes.add(pid=pid, start_time=start, event_mask=mask, follow=follow, look_up=look_up, root=root)
        for group in self._dirty_groups:
            self._add_group(message, group)
        self._clean()
        return message

    def snapshot(self, asks: list[Ask]) -> agent_pb2.Interest:
        """Everything, for an agent that has just connected. Asks that no answer came to are forgotten; `asks` are waiting instead."""
        self._unanswered.clear()
        self._asks = list(asks)
        message = self._next()
        message.reset = True
        for pid, starts in self._processes.items():
            for start, entry in starts.items():
                entry.sent = self._union(pid, start)
                mask, follow = entry.sent
                root = bool(entry.roots)
                message.processes.add(pid=pid, start_time=start, event_mask=mask, follow=follow, look_up=True, root=root)
        for group in self._groups:
            self._add_group(message, group)
        self._clean()
        return message

    def answered(self, version: int) -> list[Ask]:
        """The asks that went out with this version, or with one before it."""
        asks: list[Ask] = []
        while self._unanswered and self._unanswered[0][0] <= version:
            asks += self._unanswered.popleft()[1]
        return asks

    def abandon(self) -> list[Ask]:
        """The agent is gone: all asks that no answer came to."""
        asks = [ask for _, waiting in self._unanswered for ask in waiting] + self._asks
        self._unanswered.clear()
        self._asks = []
        return asks

    def _next(self) -> agent_pb2.Interest:
        self.version += 1
        if self._asks:
            self._unanswered.append((self.version, self._asks))
            self._asks = []
        return agent_pb2.Interest(version=self.version, node_mask=self.node_mask)

    def _clean(self) -> None:
        self._dirty_processes.clear()
        self._dirty_groups.clear()
        self._dirty_node = False

    def _add_group(self, message: agent_pb2.Interest, group: Group) -> None:
        mask = 0
        for bits in self._groups.get(group, {}).values():
            mask |= bits
        if group.kind == "cgroup":
            message.groups.add(cgroup=group.name, event_mask=mask)
        else:
            message.groups.add(unit=group.name, event_mask=mask)

    def _entry(self, pid: int, start: int) -> _Process:
        return self._processes.setdefault(pid, {}).setdefault(start, _Process())

    def _touch(self, pid: int, start: int, *, look_up: bool) -> None:
        self._dirty_processes[pid, start] = look_up or self._dirty_processes.get((pid, start), False)

    def _drop_group(self, claim: Claim, group: Group) -> None:
        masks = self._groups[group]
        del masks[claim]
        self._dirty_groups[group] = None
        if not masks:
            del self._groups[group]

    def _withdraw(self, claim: Claim, pid: int, start: int) -> None:
        entry = self._processes.get(pid, {}).get(start)
        if entry is None or entry.claims.pop(claim, None) is None:
            return
        entry.roots.discard(claim)
        self._unclaim(claim, pid, start)
        if not entry.claims:
            self._remove(pid, start)

    def _remove(self, pid: int, start: int) -> None:
        starts = self._processes[pid]
        for claim in starts.pop(start).claims:
            self._unclaim(claim, pid, start)
        if not starts:
            del self._processes[pid]

    def _unclaim(self, claim: Claim, pid: int, start: int) -> None:
        claimed = self._claimed[claim]
        claimed.discard((pid, start))
        if not claimed:
            del self._claimed[claim]

    def _union(self, pid: int, start: int) -> tuple[int, bool]:
        """Of all claims that can mean this process. The kernel has one entry a pid."""
        mask, follow = 0, False
        for other, entry in self._processes.get(pid, {}).items():
            if start in {0, other} or other == 0:
                for bits, followed in entry.claims.values():
                    mask |= bits | _ALWAYS | (_FOLLOWED if followed else 0)
                    follow = follow or followed
        return mask, follow
