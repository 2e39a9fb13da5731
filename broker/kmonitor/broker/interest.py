# SPDX-License-Identifier: Apache-2.0
"""What a node's kernel is to let through: the union of all registrations there, told to the agent in versioned deltas."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from kmonitor.broker.block import ProcessKey
from kmonitor.broker.claims import FOLLOWS, ROOT, Claim, ProcessClaims
from kmonitor.broker.multimap import Multimap
from kmonitor.v1 import agent_pb2
from kmonitor.wire.masks import EventType

Ask = TypeVar("Ask")

_ALWAYS = int(EventType.PROCESS_EXIT)  # so that the broker learns when the kernel drops its entry
_FOLLOWED = int(EventType.PROCESS_FORK)  # so that the broker learns of the children that the kernel armed


@dataclass(frozen=True, order=True, slots=True)
class Group:
    """A control group by path, or a systemd unit by name."""

    kind: str
    """"cgroup" or "unit"."""
    name: str


class NodeInterest(Generic[Ask]):
    """The claims on one node, and what its agent has not been told of yet.

    An *ask* is whatever the caller wants back when the agent has answered the version that it went out with.
    """

    def __init__(self) -> None:
        self.version = 0
        self._processes: Multimap[int, ProcessClaims] = Multimap()
        """By pid: one for each start time."""
        self._watched = 0
        """How many there are."""
        self._claimed: Multimap[Claim, ProcessClaims] = Multimap()
        """Those of each claim."""
        self._groups: dict[Group, dict[Claim, int]] = {}
        self._groups_of: Multimap[Claim, Group] = Multimap()
        self._node: dict[Claim, int] = {}
        self._dirty_processes: dict[ProcessKey, bool] = {}
        """(pid, start time) -> whether to look it up."""
        self._asking: Multimap[ProcessKey, Claim] = Multimap()
        """(pid, start time) -> claims with an ask that has not gone out yet."""
        self._dirty_groups: dict[Group, None] = {}
        self._dirty_node = False
        self._asks: list[Ask] = []
        self._unanswered: deque[tuple[int, deque[Ask]]] = deque()

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
        return self._watched

    @property
    def dirty(self) -> bool:
        """Whether there is anything to tell the agent."""
        return bool(self._dirty_processes or self._dirty_groups or self._dirty_node or self._asks)

    def want_process(self, claim: Claim, pid: int, start: int, *, mask: int, follow: bool, ask: Ask | None, root: bool = False) -> None:
        """Claim a process, with all of `mask` from now on. With an ask it is looked up, even if the kernel is armed for it.

        `root`: the registration is of this process, and not of one that has forked it.
        """
        entry = self._entry(pid, start)
        was_root = (entry.wanted(claim) or 0) & ROOT
        self._claim(entry, claim, mask | (FOLLOWS if follow else 0) | (ROOT if root and follow else was_root))
        self._touch(entry.key, look_up=ask is not None)
        if ask is not None:
            self._asks.append(ask)
            self._asking.add(entry.key, claim)

    def learn_process(self, claim: Claim, pid: int, start: int, *, mask: int, follow: bool) -> None:
        """Note a claim that the kernel has armed by itself: a followed child. Tells the agent nothing."""
        entry = self._entry(pid, start)
        was_root = (entry.wanted(claim) or 0) & ROOT
        self._claim(entry, claim, mask | (FOLLOWS if follow else 0) | was_root)
        entry.sent = self._union(pid, start)

    def settle_process(self, claim: Claim, pid: int, asked: int, actual: int) -> ProcessKey | None:
        """The agent has found out which process has the pid: the claim on (pid, asked) is one on (pid, actual), which is returned;
        None if there is neither."""
        entry = self._find(pid, asked)
        if entry is None or asked == actual or (wanted := entry.pop(claim)) is None:
            settled = self._find(pid, actual)
            return settled.key if settled is not None and settled.wanted(claim) is not None else None
        settled = self._entry(pid, actual)
        self._claimed.discard(claim, entry)
        self._claim(settled, claim, wanted | (settled.wanted(claim) or 0))
        settled.sent |= entry.sent
        if not entry.claims:
            self._take_out(entry)
        return settled.key

    def remask(self, claim: Claim, mask: int) -> None:
        """Replace the mask of all that is claimed under this name."""
        for entry in self._claimed.get(claim):
            entry.put(claim, mask | ((entry.wanted(claim) or 0) & (FOLLOWS | ROOT)))
            self._touch(entry.key, look_up=False)
        for group in self._groups_of.get(claim):
            self._groups[group][claim] = mask
            self._dirty_groups[group] = None
        if claim in self._node:
            self._node[claim] = mask
            self._dirty_node = True

    def drop(self, claim: Claim) -> None:
        """Withdraw all that is claimed under this name: the agent is told what is left."""
        for entry in list(self._claimed.get(claim)):
            pid, start = entry.key
            self._withdraw(claim, entry)
            others = self._processes.get(pid)
            if start == 0 and others and self._find(pid, 0) is None:
                # Start time 0 would arm whichever process has the pid now with what was meant for others.
                self._dirty_processes.pop((pid, 0), None)
                for other in others:
                    self._touch(other.key, look_up=False)
            else:
                self._touch(entry.key, look_up=False)
        for group in list(self._groups_of.get(claim)):
            self._drop_group(claim, group)
        if self._node.pop(claim, None) is not None:
            self._dirty_node = True

    def forget_process_claim(self, claim: Claim, pid: int, start: int) -> None:
        """Withdraw a claim on a process that the agent found gone: there is nothing to remove."""
        entry = self._find(pid, start)
        if entry is not None:
            self._withdraw(claim, entry)

    def forget_process(self, pid: int, start: int) -> None:
        """The process has ended, and the kernel has removed its entry. An ask that has not gone out yet goes out all the same."""
        entry = self._find(pid, start)
        if entry is None:
            return
        asking = {claim: wanted for claim in self._asking.get(entry.key) if (wanted := entry.wanted(claim)) is not None}
        self._remove(entry)
        self._dirty_processes.pop(entry.key, None)
        if asking:
            anew = self._entry(pid, start)
            for claim, wanted in asking.items():
                self._claim(anew, claim, wanted)
            self._touch(anew.key, look_up=True)

    def want_group(self, claim: Claim, group: Group, mask: int, ask: Ask | None) -> None:
        """Claim a group, with all of `mask` from now on."""
        self._groups.setdefault(group, {})[claim] = mask
        self._groups_of.add(claim, group)
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
            entry = self._find(pid, start)
            if entry is not None:
                if union == entry.sent and not look_up:
                    continue
                entry.sent = union
            root = look_up and entry is not None and bool(entry.union() & ROOT)
            _add_process(message, (pid, start), union, look_up=look_up, root=root)
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
        for entry in self._processes.values():
            entry.sent = self._union(*entry.key)
            _add_process(message, entry.key, entry.sent, look_up=True, root=bool(entry.union() & ROOT))
        for group in self._groups:
            self._add_group(message, group)
        self._clean()
        return message

    def answered(self, version: int) -> Iterator[Ask]:
        """The asks that went out with this version, or with one before it. What is not taken of it is unanswered still."""
        while self._unanswered and self._unanswered[0][0] <= version:
            asks = self._unanswered[0][1]
            if asks:
                yield asks.popleft()
            else:
                self._unanswered.popleft()

    def abandon(self) -> list[Ask]:
        """The agent is gone: all asks that no answer came to."""
        asks = [ask for _, waiting in self._unanswered for ask in waiting] + self._asks
        self._unanswered.clear()
        self._asks = []
        return asks

    def _next(self) -> agent_pb2.Interest:
        self.version += 1
        if self._asks:
            self._unanswered.append((self.version, deque(self._asks)))
            self._asks = []
        return agent_pb2.Interest(version=self.version, node_mask=self.node_mask)

    def _clean(self) -> None:
        self._dirty_processes.clear()
        self._asking.clear()
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

    def _find(self, pid: int, start: int) -> ProcessClaims | None:
        for entry in self._processes.get(pid):
            if entry.key[1] == start:
                return entry
        return None

    def _entry(self, pid: int, start: int) -> ProcessClaims:
        entry = self._find(pid, start)
        if entry is None:
            entry = ProcessClaims((pid, start))
            self._processes.add(pid, entry)
            self._watched += 1
        return entry

    def _claim(self, entry: ProcessClaims, claim: Claim, wanted: int) -> None:
        entry.put(claim, wanted)
        self._claimed.add(claim, entry)

    def _touch(self, key: ProcessKey, *, look_up: bool) -> None:
        self._dirty_processes[key] = look_up or self._dirty_processes.get(key, False)

    def _drop_group(self, claim: Claim, group: Group) -> None:
        masks = self._groups[group]
        del masks[claim]
        self._groups_of.discard(claim, group)
        self._dirty_groups[group] = None
        if not masks:
            del self._groups[group]

    def _withdraw(self, claim: Claim, entry: ProcessClaims) -> None:
        if entry.pop(claim) is None:
            return
        self._claimed.discard(claim, entry)
        if not entry.claims:
            self._take_out(entry)

    def _remove(self, entry: ProcessClaims) -> None:
        self._take_out(entry)
        for claim in entry.claims:
            self._claimed.discard(claim, entry)

    def _take_out(self, entry: ProcessClaims) -> None:
        self._processes.discard(entry.key[0], entry)
        self._watched -= 1

    def _union(self, pid: int, start: int) -> int:
        """Of all claims that can mean this process: a mask, and FOLLOWS. The kernel has one entry a pid."""
        found = 0
        for entry in self._processes.get(pid):
            if start in {0, entry.key[1]} or entry.key[1] == 0:
                found |= entry.union()
        if not found:
            return 0
        return found & ~ROOT | _ALWAYS | (_FOLLOWED if found & FOLLOWS else 0)


def _add_process(message: agent_pb2.Interest, key: ProcessKey, union: int, *, look_up: bool, root: bool) -> None:
    pid, start = key
    mask, follow = union & ~FOLLOWS, bool(union & FOLLOWS)
    message.processes.add(pid=pid, start_time=start, event_mask=mask, follow=follow, look_up=look_up, root=root)
