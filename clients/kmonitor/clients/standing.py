# SPDX-License-Identifier: Apache-2.0
"""The registrations that stand: what to bring again after a reconnect, and of which process each was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from kmonitor.clients import selection
from kmonitor.clients.notifications import Registered, RegistrationState
from kmonitor.v1 import events_pb2, monitor_pb2
from kmonitor.wire.masks import EventType

_PROCESS_EXIT = int(EventType.PROCESS_EXIT)


@dataclass(slots=True, eq=False)
class Kept:
    """A registration that stands, to be brought again after a reconnect."""

    registration_id: int
    wanted: monitor_pb2.Registration  # as it is to be brought next time: with the start time, once that is known
    sent: monitor_pb2.Registration  # as the broker has it on this connection
    # node -> (pid, start time) of the process that was found there: after a reconnect the pid, or the pidfile, may be another's
    found: dict[str, tuple[int, int]] = field(default_factory=dict)


class Standing:
    """Of one stream. Learns from what passes there; sends nothing itself."""

    def __init__(self) -> None:
        self._kept: dict[bytes, Kept] = {}  # by selection.key of what the caller asked for
        self._single: dict[tuple[str, int], bytes] = {}  # (node, pid) -> key of a registration that ends with that process

    def __bool__(self) -> bool:
        return bool(self._kept)

    def bring(self) -> Iterable[tuple[int, monitor_pb2.RegisterRequest]]:
        """Registration ids, and what to request on a new connection."""
        for kept in list(self._kept.values()):
            kept.sent = _copy(kept.wanted)
            request = monitor_pb2.RegisterRequest(registration=kept.sent)
            if kept.wanted.target.WhichOneof("kind") == "pidfile":
                for node, (pid, start_time) in kept.found.items():
                    request.found.add(node=node, pid=pid, start_time=start_time)
            yield kept.registration_id, request

    def as_sent(self, wanted: monitor_pb2.Registration) -> monitor_pb2.Registration:
        """The registration as the broker knows it: the same, but for a start time that was learnt."""
        kept = self._kept.get(selection.key(wanted))
        if kept is None:
            return wanted
        sent = _copy(kept.sent)
        sent.event_mask = wanted.event_mask
        return sent

    def answered(self, answer: Registered, wanted: monitor_pb2.Registration | None) -> Registered:
        """Take note of an answer; `wanted` is None for one that nobody awaits. Returns it as the caller is to see it."""
        if wanted is not None:
            key, kept = self._keep(answer, wanted)
            return self._same_process(answer, key, kept, asked_now=True)
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
            if selection.key(kept.sent) == selection.key(wanted):
                kept.wanted.event_mask &= ~wanted.event_mask
                if not kept.wanted.event_mask:
                    self._forget(key)

    def saw(self, node: str, events: Sequence[events_pb2.Event]) -> None:
        """Registrations of processes that have ended are over."""
        if self._single:
            for event in events:
                if event.type == _PROCESS_EXIT:
                    self._forget(self._single.get((node, event.pid)), event.start_time)

    def _keep(self, answer: Registered, wanted: monitor_pb2.Registration) -> tuple[bytes, Kept]:
        key = selection.key(wanted)
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = Kept(answer.registration_id or answer.request_id, _copy(wanted), _copy(wanted))
        kept.wanted.event_mask |= wanted.event_mask
        return key, kept

    def _same_process(self, answer: Registered, key: bytes, kept: Kept, *, asked_now: bool) -> Registered:
        """The answer; EXITED if a process was found that is not the one of before: nobody is told of the wrong process.

        A registration for one node is brought again with the start time, and one of a pidfile with what was found on each node: there
        the broker sees to it.
        """
        target = kept.wanted.target
        kind = target.WhichOneof("kind")
        if kind not in ("process", "pidfile"):
            return answer
        if answer.state is RegistrationState.NOT_FOUND and answer.node in kept.found and not asked_now:
            answer = replace(answer, state=RegistrationState.EXITED)  # it was there: a broker that is new cannot know
        one_node = selection.names_one_node(kept.wanted)
        if one_node and answer.state in (RegistrationState.EXITED, RegistrationState.NOT_FOUND):
            self._forget(key)
        if answer.process is None:
            return answer
        found = answer.process.pid, answer.process.start_time
        if asked_now:
            kept.found[answer.node] = found
        if kept.found.setdefault(answer.node, found) != found:
            return replace(answer, state=RegistrationState.EXITED, process=None)
        if one_node:
            if kind == "process":
                target.process.start_time = answer.process.start_time
            if not kept.wanted.follow and kept.wanted.event_mask & _PROCESS_EXIT:
                self._single[answer.node, answer.process.pid] = key
        return answer

    def _forget(self, key: bytes | None, start_time: int | None = None) -> None:
        """A registration of one process is over with the process: a monitor that lives for months must not collect them."""
        kept = None if key is None else self._kept.get(key)
        if key is None or kept is None:
            return
        if start_time is None or start_time in {started for _, started in kept.found.values()}:
            del self._kept[key]
            self._single = {place: other for place, other in self._single.items() if other != key}


def _copy(wanted: monitor_pb2.Registration) -> monitor_pb2.Registration:
    copy = monitor_pb2.Registration()
    copy.CopyFrom(wanted)
    return copy
