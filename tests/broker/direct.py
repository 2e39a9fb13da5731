# SPDX-License-Identifier: Apache-2.0
"""A broker without a transport: an agent says what a test has it say, in the order of a real one, and monitors take all there is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from kmonitor.broker.broker import Broker
from kmonitor.broker.nodes import Link
from kmonitor.broker.sessions import Session
from kmonitor.v1 import agent_pb2, events_pb2, monitor_pb2
from kmonitor.wire.record import RECORD_SIZE, RECORD_VERSION, SLOT_SIZE
from tests.broker.records import Rec, build

RUNNING = monitor_pb2.REGISTRATION_STATE_RUNNING
EXITED = monitor_pb2.REGISTRATION_STATE_EXITED
NOT_FOUND = monitor_pb2.REGISTRATION_STATE_NOT_FOUND
ARMED = monitor_pb2.REGISTRATION_STATE_ARMED


async def turn() -> None:
    """All that the broker does at the end of a turn of the event loop is done."""
    for _ in range(5):
        await asyncio.sleep(0)


@dataclass
class DirectAgent:
    """What is in its ring it sends before it answers anything."""

    broker: Broker
    cgroups: dict[str, list[int]] = field(default_factory=dict)
    """Path -> id of the group, then of those above it."""
    gone: set[int] = field(default_factory=set)
    """Pids without a process."""
    epoch: int = 7
    position: int = 0
    """Of the next record."""
    inferred: list[tuple[int, int]] = field(default_factory=list)
    link: Link = field(init=False)
    ring: list[tuple[int, bytes]] = field(default_factory=list)
    """Position and bytes of what was not acknowledged."""
    _sent: int = 0
    _unread: list[agent_pb2.BrokerMessage] = field(default_factory=list)
    _acked: int = 0

    def connect(self, **more: Any) -> None:
        """Say hello, and read what comes first."""
        hello = agent_pb2.Hello(
            node="a", boot_id="boot-1", epoch=self.epoch, position=self._acked, record_version=RECORD_VERSION,
            record_size=RECORD_SIZE, slot_size=SLOT_SIZE, infers_exits=True,
        )  # fmt: skip
        hello.MergeFrom(agent_pb2.Hello(**more))
        self.link = self.broker.agents.connect(hello)
        welcome, *self._unread = self.link.take()
        self._sent = max(self._acked, welcome.welcome.position)

    def disconnect(self) -> None:
        """The stream breaks."""
        self.broker.agents.disconnect(self.link, "it broke")

    def record(self, *records: Rec) -> None:
        """Into the ring."""
        data = build(list(records))
        self.ring.append((self.position, data))
        self.position += len(data)

    def send(self) -> None:
        """All that is in the ring and was not sent."""
        for position, data in self.ring:
            if position >= self._sent:
                self.say(block=agent_pb2.Block(position=position, data=data, boottime_to_unix_ns=1_000_000))
                self._sent = position + len(data)

    def answer(self) -> None:
        """Do what the broker has said so far."""
        messages, self._unread = [*self._unread, *self.link.take()], []
        for message in messages:
            kind = message.WhichOneof("kind")
            if kind == "ack":
                self._acked = max(self._acked, message.ack.position)
                self.ring = [item for item in self.ring if item[0] >= self._acked]
            elif kind == "infer_exits":
                self.inferred += [(each.pid, each.start_time) for each in message.infer_exits.processes]
            elif kind == "interest":
                self._apply(message.interest)

    def _apply(self, interest: agent_pb2.Interest) -> None:
        answer = agent_pb2.InterestApplied(version=interest.version, position=self.position, end_position=self.position, boottime_ns=1)
        for item in interest.processes:
            if item.look_up and item.pid in self.gone:
                answer.processes.add(pid=item.pid, start_time=item.start_time, state=EXITED)
            elif item.look_up:
                found = events_pb2.Process(pid=item.pid, start_time=item.start_time or item.pid * 10)
                answer.processes.add(pid=item.pid, start_time=item.start_time, state=RUNNING, process=found)
        for group in interest.groups:
            if group.event_mask:
                ids = self.cgroups.get(group.cgroup, [])
                answer.groups.add(cgroup=group.cgroup, state=ARMED if ids else NOT_FOUND, cgroup_ids=ids)
        self.say(applied=answer)

    def lose(self, kind: int, total: int, *, watched: bool = True) -> None:
        """So many events of a type have found no room so far, the last of them just now."""
        self.say(lost=self.lost(kind, total, watched=watched))

    def lost(self, kind: int, total: int, *, watched: bool = True) -> agent_pb2.Lost:
        """The same, as a hello says it."""
        lost = agent_pb2.Lost(from_position=self._acked, to_position=self.position)
        lost.counts.add(type=kind, watched=watched, total=total)
        return lost

    def beat(self, boottime_ns: int, *, position: int | None = None) -> None:
        """All made before this time has been sent."""
        beat = agent_pb2.Heartbeat(position=self._sent if position is None else position, time_unix_nano=1, boottime_ns=boottime_ns)
        self.say(heartbeat=beat)

    def say(self, **message: Any) -> None:
        """Any message."""
        self.broker.agents.receive(self.link, agent_pb2.AgentMessage(**message))

    async def serve(self) -> None:
        """Until there is nothing more to do: what is in the ring goes first."""
        for _ in range(4):
            await turn()
            self.send()
            self.answer()


class DirectMonitor:
    """Registers, and takes."""

    def __init__(self, broker: Broker, wanted: Iterable[monitor_pb2.Registration], cursor: monitor_pb2.Cursor | None = None) -> None:
        """`cursor`: of an earlier stream."""
        self.broker = broker
        self.session: Session = broker.open_session()
        self.told: list[monitor_pb2.Notification] = []
        registrations = list(wanted)
        if cursor is not None:
            broker.resume(self.session, cursor, len(registrations))
        for number, registration in enumerate(registrations, 1):
            broker.register(self.session, number, registration)
            broker.resumed(self.session)

    def take(self) -> list[monitor_pb2.Notification]:
        """All that waits, and was not taken before."""
        new: list[monitor_pb2.Notification] = []
        while self.session.outbox.filled.is_set() and self.session.failure is None:
            new += [monitor_pb2.Notification.FromString(raw) for raw in self.session.outbox.take()]
        self.told += new
        return new

    @property
    def events(self) -> list[tuple[int, int]]:
        """(type, pid) of all so far."""
        self.take()
        return [(event.type, event.pid) for item in self.told for event in item.events.events]

    async def until(self, count: int) -> None:
        """Until it has so many events: a log on a disk is read by a thread."""
        async with asyncio.timeout(20):
            while len(self.events) < count:  # noqa: ASYNC110 -- the outbox has no event for it that takes nothing
                await asyncio.sleep(0.001)

    @property
    def gaps(self) -> list[monitor_pb2.Gap]:
        """All so far."""
        self.take()
        return [item.gap for item in self.told if item.WhichOneof("kind") == "gap"]

    @property
    def states(self) -> list[int]:
        """What was said of registrations so far."""
        self.take()
        return [item.registered.state for item in self.told if item.WhichOneof("kind") == "registered"]

    def cursor(self) -> monitor_pb2.Cursor:
        """Of what it has taken: events alone."""
        cursor = monitor_pb2.Cursor(stream_id=self.session.stream_id, log_id=self.broker.log.log_id, number=self.broker.log.end)
        for item in self.told:
            for event in item.events.events:
                del cursor.positions[:]
                cursor.positions.add(node=item.events.node, epoch=item.events.epoch, position=event.position)
        return cursor


def of_process(mask: int, pid: int, *, follow: bool = False, node: str = "a") -> monitor_pb2.Registration:
    """A registration of one process of one node."""
    made = monitor_pb2.Registration(event_mask=mask, follow=follow)
    made.nodes.names.append(node)
    made.target.process.pid = pid
    return made


def of_group(mask: int, path: str) -> monitor_pb2.Registration:
    """A registration of a control group on every node."""
    made = monitor_pb2.Registration(event_mask=mask)
    made.target.cgroup = path
    return made
