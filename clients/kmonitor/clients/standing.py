# SPDX-License-Identifier: Apache-2.0
"""The registrations that stand: what to bring again after a reconnect, and of which process each was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from kmonitor.clients import selection
from kmonitor.clients.identity import Identity
from kmonitor.clients.notifications import Registered, RegistrationState
from kmonitor.v1 import events_pb2, monitor_pb2
from kmonitor.wire.masks import EventType

_PROCESS_EXIT = int(EventType.PROCESS_EXIT)


@dataclass(slots=True, eq=False)
class Kept:
    """A registration that stands, to be brought again after a reconnect."""

    registration_id: int
    wanted: monitor_pb2.Registration  # as the caller asked for it, and as the broker has it
    # node -> the process that was found there: after a reconnect the pid, or what the pidfile names, may be another
    found: dict[str, Identity] = field(default_factory=dict)


class Standing:
    """Of one stream. Learns from what passes there; sends nothing itself."""

    def __init__(self) -> None:
        self._kept: dict[bytes, Kept] = {}  # by selection.key of what the caller asked for
        self._single: dict[tuple[str, int], set[bytes]] = {}  # (node, pid) -> keys of the registrations that end with that process
        self._ending: set[bytes] = set()  # keys of those of which nothing will come but what is in the log

    def __bool__(self) -> bool:
        return bool(self._kept)

    def bring(self) -> Iterable[tuple[int, monitor_pb2.RegisterRequest]]:
        """Registration ids, and what to request on a new connection."""
        for kept in list(self._kept.values()):
            request = monitor_pb2.RegisterRequest(registration=_copy(kept.wanted))
            add_found(request, kept.found)
            yield kept.registration_id, request

    def answered(self, answer: Registered, asked: monitor_pb2.RegisterRequest | None) -> Registered:
        """Take note of an answer; `asked` is None for one that nobody awaits. Returns it as the caller is to see it."""
        if asked is not None:
            key, kept = self._keep(answer, asked)
            return self._same_process(answer, key, kept, asked_now=not asked.found)
        for key, kept in self._kept.items():
            if kept.registration_id == answer.registration_id:
                return self._same_process(answer, key, kept, asked_now=False)
        return answer

    def refused(self, registration_id: int, node: str) -> None:
        """The broker, or this node, did not take it."""
        for key, kept in list(self._kept.items()):
            if kept.registration_id == registration_id and (not node or selection.names_one_node(kept.wanted)):
                self._forget(key)

    def cleared(self, wanted: monitor_pb2.Registration) -> None:
        """The broker has cleared these bits."""
        for key, kept in list(self._kept.items()):
            if key == selection.key(wanted):
                kept.wanted.event_mask &= ~wanted.event_mask
                if not kept.wanted.event_mask:
                    self._forget(key)

    def saw(self, node: str, boot_id: str, events: Sequence[events_pb2.Event]) -> None:
        """Registrations of processes that have ended are over."""
        if self._single:
            for event in events:
                if event.type == _PROCESS_EXIT:
                    self._ended(node, Identity(boot_id, event.pid, event.start_time))

    def progressed(self) -> None:
        """All up to now has come: of what had ended while the broker was away, too."""
        for key in self._ending:
            if key in self._kept:
                self._forget(key)
        self._ending.clear()

    def node_gone(self, node: str) -> None:
        """It was removed, and all registrations there with it."""
        for key, kept in list(self._kept.items()):
            if selection.names_one_node(kept.wanted) and kept.wanted.nodes.names[0] == node:
                self._forget(key)

    def _keep(self, answer: Registered, asked: monitor_pb2.RegisterRequest) -> tuple[bytes, Kept]:
        wanted = asked.registration
        key = selection.key(wanted)
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = Kept(answer.registration_id or answer.request_id, _copy(wanted))
        kept.wanted.event_mask |= wanted.event_mask
        for item in asked.found:
            kept.found.setdefault(item.node, Identity(item.boot_id, item.pid, item.start_time))
        return key, kept

    def _same_process(self, answer: Registered, key: bytes, kept: Kept, *, asked_now: bool) -> Registered:
        """The answer; EXITED if a process was found that is not the one of before: nobody is told of the wrong process.

        It is brought again with what was found on each node, so the broker sees to it. One that is older may not.
        """
        answer = replace(answer, registration=kept.wanted)
        if not selection.of_one_process(kept.wanted):
            return answer
        if answer.state is RegistrationState.NOT_FOUND and answer.node in kept.found and not asked_now:
            answer = replace(answer, state=RegistrationState.EXITED)  # it was there: a broker that is new cannot know
        one_node = selection.names_one_node(kept.wanted)
        if one_node and answer.state in (RegistrationState.EXITED, RegistrationState.NOT_FOUND):
            if asked_now:
                self._forget(key)
            elif not kept.wanted.follow:  # else what it has forked may live on
                self._ending.add(key)
        if answer.process is None:
            return answer
        found = Identity(answer.process.boot_id, answer.process.pid, answer.process.start_time)
        before = kept.found.setdefault(answer.node, found)
        if not before.may_be(found):
            if not asked_now:
                return replace(answer, state=RegistrationState.EXITED, process=None)
            self._unlist(answer.node, before, key)
        kept.found[answer.node] = found
        if selection.ends_with_process(kept.wanted) and kept.wanted.event_mask & _PROCESS_EXIT:
            self._single.setdefault((answer.node, found.pid), set()).add(key)
        return answer

    def _ended(self, node: str, process: Identity) -> None:
        for key in list(self._single.get((node, process.pid), ())):
            if self._kept[key].found[node].may_be(process):
                self._forget(key)

    def _forget(self, key: bytes) -> None:
        """A registration of one process is over with the process: a monitor that lives for months must not collect them."""
        kept = self._kept.pop(key)
        for node, found in kept.found.items():
            self._unlist(node, found, key)

    def _unlist(self, node: str, process: Identity, key: bytes) -> None:
        keys = self._single.get((node, process.pid), set())
        keys.discard(key)
        if not keys:
            self._single.pop((node, process.pid), None)


def add_found(request: monitor_pb2.RegisterRequest, found: Mapping[str, Identity]) -> None:
    """Say which process the registration is of, on each node."""
    for node, process in found.items():
        request.found.add(node=node, pid=process.pid, start_time=process.start_time, boot_id=process.boot_id)


def _copy(wanted: monitor_pb2.Registration) -> monitor_pb2.Registration:
    copy = monitor_pb2.Registration()
    copy.CopyFrom(wanted)
    return copy
