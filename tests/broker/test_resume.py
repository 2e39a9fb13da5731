# SPDX-License-Identifier: Apache-2.0
"""Streams that end and come back with a cursor: each event once, in order, and gaps where there is nothing to bring."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from kmonitor.broker.broker import Broker
from kmonitor.broker.log import EventLog
from kmonitor.broker.log.memory import MemoryLog
from kmonitor.broker.log.sqlite import SqliteLog
from kmonitor.broker.server import Server
from kmonitor.v1 import agent_pb2, events_pb2, monitor_pb2
from kmonitor.wire.record import F_INFERRED, F_MATCH_CGROUP, F_MATCH_NODE, F_MATCH_PROCESS, SLOT_SIZE
from tests.broker.records import EXEC, EXIT, FORK, Rec, rec
from tests.broker.test_server import EXITED, RUNNING, Agent, World, registration

OWN, WIDE = F_MATCH_PROCESS, F_MATCH_NODE
LOG = monitor_pb2.GAP_REASON_LOG
RING = monitor_pb2.GAP_REASON_RING


@dataclass
class Here(World):
    """A broker that may be another one by the time a monitor comes back."""

    log: EventLog
    path: Path | None = None
    restarts: str = ""

    @classmethod
    async def start(cls, log: EventLog, path: Path | None, restarts: str) -> Here:
        broker = Broker(log, lease=30.0, progress_interval=60.0)
        server = Server(broker)
        address = f"127.0.0.1:{await server.start('127.0.0.1:0')}"
        return cls(broker, server, address, grpc.aio.insecure_channel(address), log, path, restarts)

    async def stop(self) -> None:
        await self.channel.close()
        await self.server.stop(0)
        await self.log.close()

    async def between(self, agent: Served) -> None:
        """While the monitor is away the broker is started again, in order, or after a crash; or nothing happens."""
        if not self.restarts or self.path is None:
            return
        path = self.path
        if self.restarts == "crashed":
            # What a crash leaves: the files as they are now, of a broker that goes on, and that nobody reaches any more.
            path = path.with_name(f"{path.name}.crashed")
            for suffix in ("", "-wal"):
                shutil.copy(f"{self.path}{suffix}", f"{path}{suffix}")
        await self.stop()
        new = await Here.start(SqliteLog(path), path, self.restarts)
        self.__dict__.update(new.__dict__)
        agent.channel = self.channel
        assert agent.task is not None
        await agent.task
        await agent.serve()


HOW = ["memory", "file", "restarted", "crashed"]


@pytest.fixture(params=HOW)
async def here(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Here]:
    path = None if request.param == "memory" else tmp_path / "broker.sqlite"
    log = MemoryLog(64 << 20) if path is None else SqliteLog(path)
    made = await Here.start(log, path, request.param if request.param in HOW[2:] else "")
    yield made
    await made.stop()


@dataclass
class Taker:
    """A monitor that says the same at each of its streams, and keeps its cursor as a client is told to."""

    here: Here
    wanted: list[monitor_pb2.Registration]
    linger_ms: int | None = None
    names_stream: bool = True
    positions: dict[str, tuple[int, int]] = field(default_factory=dict)
    log_id: int = 0
    number: int = 0
    stream_id: int = 0
    events: list[tuple[str, int, int, int, int]] = field(default_factory=list)
    """(node, epoch, position, type, pid)."""
    gaps: list[monitor_pb2.Gap] = field(default_factory=list)
    states: list[int] = field(default_factory=list)
    call: Any = None

    async def open(self) -> None:
        self.call = self.here.monitor.Watch()
        for index, wanted in enumerate(self.wanted):
            request = monitor_pb2.WatchRequest(request_id=index, register=monitor_pb2.RegisterRequest(registration=wanted))
            if index == 0 and self.linger_ms is not None:
                request.linger_ms = self.linger_ms
            if index == 0 and (self.positions or self.stream_id):
                request.cursor.CopyFrom(self.cursor())
                request.resuming = len(self.wanted)
            await self.call.write(request)

    def cursor(self) -> monitor_pb2.Cursor:
        cursor = monitor_pb2.Cursor(log_id=self.log_id, number=self.number, stream_id=self.stream_id if self.names_stream else 0)
        for node, (epoch, position) in self.positions.items():
            cursor.positions.add(node=node, epoch=epoch, position=position)
        return cursor

    async def take(self) -> monitor_pb2.Notification:
        message = await self.call.read()
        if message is grpc.aio.EOF:
            raise EOFError(await self.call.code(), await self.call.details())
        kind = message.WhichOneof("kind")
        if kind == "events":
            for event in message.events.events:
                self.events.append((message.events.node, message.events.epoch, event.position, event.type, event.pid))
                self.positions[message.events.node] = (message.events.epoch, event.position)
        elif kind == "gap":
            self.gaps.append(message.gap)
            if message.gap.to_position:
                self.positions[message.gap.node] = (message.gap.epoch, message.gap.to_position - 1)
            if message.gap.number:
                self.log_id, self.number = message.gap.log_id, message.gap.number
        elif kind == "registered":
            self.states.append(message.registered.state)
            self.stream_id = message.registered.stream_id
            answer = message.registered
            if self.positions.get(answer.node, (0, 0))[0] != answer.epoch and answer.position:
                self.positions[answer.node] = (answer.epoch, answer.position - 1)
        elif kind == "progress":
            self.log_id, self.number = message.progress.log_id, message.progress.number
            for at in [at for at in message.progress.nodes if at.position]:
                self.positions[at.node] = (at.epoch, at.position - 1)
        assert isinstance(message, monitor_pb2.Notification)
        return message

    async def until(self, kind: str) -> Any:
        while True:
            message = await self.take()
            if message.WhichOneof("kind") == kind:
                return getattr(message, kind)

    async def until_events(self, count: int) -> None:
        while len(self.events) < count:
            await self.take()

    async def leave(self) -> None:
        """Without a word, as a process that was killed; until the broker knows."""
        self.call.cancel()
        for _ in range(10_000):
            if all(session.detached for session in self.here.broker.sessions):
                return
            await asyncio.sleep(0.001)
        raise TimeoutError


class OneByOne:
    """A call that several tasks write to: gRPC takes one message at a time."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._writing = asyncio.Lock()

    async def write(self, message: agent_pb2.AgentMessage) -> None:
        async with self._writing:
            await self._call.write(message)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)


class Served(Agent):
    """An agent that does what it is told: arms all that is not `gone`, and makes records of ends when it is asked for them."""

    gone: tuple[int, ...] = ()
    task: asyncio.Task[None] | None = None
    total = 0
    """Lost so far."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        super().__init__(channel)
        self.inferred: list[tuple[int, int]] = []
        self.mask = 0
        self.applied = False
        self.news = asyncio.Event()
        self.sent: list[tuple[int, list[Rec]]] = []

    async def serve(self) -> None:
        """Connect, and go on from there."""
        self.inferred, self.mask, self.applied = [], 0, False
        end, self.position = self.position, self.acked
        welcome = await self.connect(infers_exits=True)
        self.position, self.acked = end, max(self.acked, welcome.position)
        self.call = OneByOne(self.call)
        self.news = asyncio.Event()
        self.task = asyncio.create_task(self._serve())
        for position, records in self.sent:
            if position >= self.acked:
                await super().send(records, position=position)
        if self.total:
            await self.lose(0)

    async def _serve(self) -> None:
        with contextlib.suppress(EOFError, asyncio.CancelledError, grpc.aio.AioRpcError):
            while True:
                message = await self.read()
                kind = message.WhichOneof("kind")
                if kind == "interest":
                    await self.apply(message.interest, gone=self.gone, cgroups={"/a": [50]})
                    self.applied = True
                    self.mask = message.interest.node_mask
                elif kind == "ack":
                    self.acked = message.ack.position
                elif kind == "infer_exits":
                    for each in message.infer_exits.processes:
                        self.inferred.append((each.pid, each.start_time))
                        record = rec(EXIT, each.pid, flags=OWN | F_INFERRED, start_boottime_ns=each.start_time)
                        await self.send([record])
                self.news.set()

    async def send(self, records: list[Rec], *, position: int | None = None) -> None:
        """Records, which stay in the ring until they are acknowledged."""
        self.sent.append((self.position, records))
        await super().send(records, position=position)

    async def lose(self, count: int) -> None:
        """So many node-wide exits found no room."""
        self.total += count
        told = agent_pb2.Lost.Count(type=events_pb2.EVENT_TYPE_PROCESS_EXIT, total=self.total)
        message = agent_pb2.Lost(counts=[told], from_position=self.position, to_position=self.position)
        await self.call.write(agent_pb2.AgentMessage(lost=message))

    async def wait(self, what: Callable[[], bool]) -> None:
        """Until something is so after what the broker has said."""
        while not what():
            self.news.clear()
            await self.news.wait()

    async def acknowledged(self) -> None:
        """Until all that was sent is in the log."""
        await self.wait(lambda: self.acked == self.position)

    async def leave(self) -> None:
        """End the stream."""
        self.call.cancel()
        assert self.task is not None
        await self.task


async def start(here: Here, *wanted: monitor_pb2.Registration, **options: Any) -> tuple[Served, Taker]:
    """An agent and a monitor that is armed."""
    agent = Served(here.channel)
    await agent.serve()
    taker = Taker(here, list(wanted), **options)
    await taker.open()
    for _ in wanted:
        await taker.until("registered")
    await here.log.flush()  # a monitor that nobody has noted down yet, and a crash: it is told that nobody has kept its place
    return agent, taker


def slots(taker: Taker) -> list[int]:
    return [position // SLOT_SIZE for _, _, position, _, _ in taker.events]


@pytest.mark.parametrize("names_stream", [True, False])
async def test_everything(here: Here, names_stream: bool) -> None:
    agent, taker = await start(here, registration(0x48), names_stream=names_stream)
    await agent.send([rec(EXIT, 1), rec(EXEC, 2), rec(EXIT, 3)])
    await taker.until_events(2)
    await taker.leave()
    await agent.send([rec(EXIT, 4)])
    await agent.send([rec(EXIT, 5), rec(FORK, 6, child_tgid=7)])
    await here.between(agent)
    await taker.open()
    await agent.send([rec(EXIT, 8)])
    await taker.until_events(6)
    assert slots(taker) == [0, 2, 3, 4, 5, 6]
    assert taker.gaps == []


async def test_taken_in_the_middle_of_a_block(here: Here) -> None:
    """What was sent and not taken comes again; what was taken does not."""
    agent, taker = await start(here, registration(0x40))
    await agent.send([rec(EXIT, pid) for pid in range(1, 9)])
    await taker.until_events(8)
    taker.positions["a"] = (7, 2 * SLOT_SIZE)
    del taker.events[3:]
    await taker.leave()
    await here.between(agent)
    await taker.open()
    await agent.send([rec(EXIT, 20)])
    await taker.until_events(9)
    assert slots(taker) == list(range(9))
    assert taker.gaps == []


async def test_a_process_that_ended_meanwhile(here: Here) -> None:
    agent, taker = await start(here, registration(0x60, pid=100, node="a"))
    await agent.send([rec(EXEC, 100, flags=OWN)])
    await taker.until_events(1)
    await taker.leave()
    await agent.send([rec(EXIT, 100, flags=OWN)])
    await agent.acknowledged()
    await agent.send([rec(EXIT, 100, flags=OWN, start_boottime_ns=5)])  # somebody else's with the same pid
    agent.gone = (100,)
    await here.between(agent)
    await taker.open()
    await taker.until_events(2)
    assert (await taker.until("registered")).state == EXITED
    assert slots(taker) == [0, 1]
    assert taker.gaps == []


async def test_followed_children_of_meanwhile(here: Here) -> None:
    agent, taker = await start(here, registration(0x48, pid=100, follow=True))
    await agent.send([rec(FORK, 100, flags=OWN, child_tgid=101, child_start_boottime_ns=1010)])
    await taker.until_events(1)
    await taker.leave()
    await agent.send([rec(FORK, 101, flags=OWN, child_tgid=102, child_start_boottime_ns=1020)])
    await agent.send([rec(EXIT, 100, flags=OWN), rec(EXIT, 101, flags=OWN)])
    await agent.acknowledged()
    agent.gone = (100,)
    await here.between(agent)
    await taker.open()
    await agent.send([rec(FORK, 102, flags=OWN, child_tgid=103, child_start_boottime_ns=1030), rec(EXIT, 103, flags=OWN)])
    await taker.until_events(6)
    assert slots(taker) == list(range(6))
    assert taker.gaps == []


async def test_a_control_group(here: Here) -> None:
    agent, taker = await start(here, registration(0x40, cgroup="/a"))
    await agent.send([rec(EXIT, 1, flags=F_MATCH_CGROUP, match_cgroup_id=50)])
    await taker.until_events(1)
    await taker.leave()
    await agent.send([rec(EXIT, 2, flags=F_MATCH_CGROUP, match_cgroup_id=50)])
    await here.between(agent)
    await taker.open()
    await agent.send([rec(EXIT, 3, flags=F_MATCH_CGROUP, match_cgroup_id=50)])
    await taker.until_events(3)
    assert slots(taker) == [0, 1, 2]


async def test_several_registrations(here: Here) -> None:
    """Nothing is delivered before all were brought: what the first has no part in may be the second's."""
    agent, taker = await start(here, registration(0x40, pid=100), registration(0x40, pid=200))
    await taker.leave()
    await agent.send([rec(EXIT, 200, flags=OWN), rec(EXIT, 100, flags=OWN)])
    await agent.acknowledged()
    agent.gone = (100, 200)
    await here.between(agent)
    taker.call = here.monitor.Watch()
    first = monitor_pb2.WatchRequest(request_id=0, register=monitor_pb2.RegisterRequest(registration=taker.wanted[0]))
    first.cursor.CopyFrom(taker.cursor())
    first.resuming = 2
    await taker.call.write(first)
    await taker.call.write(monitor_pb2.WatchRequest(request_id=1, register=monitor_pb2.RegisterRequest(registration=taker.wanted[1])))
    await taker.until_events(2)
    assert slots(taker) == [0, 1]
    for _ in range(2):
        await taker.until("registered")
    assert taker.states[2:] == [EXITED, EXITED]


async def test_what_is_new_in_the_second_stream_comes_from_then_on(here: Here) -> None:
    agent, taker = await start(here, registration(0x40, pid=100))
    await taker.leave()
    await agent.send([rec(EXEC, 100, flags=OWN), rec(EXEC, 1), rec(EXIT, 100, flags=OWN)])
    await agent.acknowledged()
    taker.wanted.append(registration(0x20))
    agent.gone = (100,)
    await here.between(agent)
    await taker.open()
    await taker.until_events(1)
    assert slots(taker) == [2]
    while not taker.gaps:  # before or after that event, as the agent was there before the log was read or not
        await taker.take()
    assert [(gap.reason, gap.to_position) for gap in taker.gaps] == [(LOG, agent.position)], "for what nobody had asked for"
    await agent.send([rec(EXEC, 5)])
    await taker.until_events(2)
    assert slots(taker) == [2, 3]


async def test_a_stream_that_is_not_known_to_have_ended_is_taken_over(here: Here) -> None:
    agent, taker = await start(here, registration(0x40))
    await agent.send([rec(EXIT, 1)])
    await taker.until_events(1)
    old = taker.call
    await agent.send([rec(EXIT, 2)])
    await taker.open()
    await taker.until_events(2)
    assert slots(taker) == [0, 1]
    with contextlib.suppress(grpc.aio.AioRpcError):
        while await old.read() is not grpc.aio.EOF:
            pass
    assert await old.code() is grpc.StatusCode.ALREADY_EXISTS
    assert len([each for each in here.broker.sessions if not each.detached]) == 1


async def test_two_monitors_with_the_same_registration(here: Here) -> None:
    """Each gets its own back."""
    agent, first = await start(here, registration(0x40))
    second = Taker(here, [registration(0x40)])
    await second.open()
    await second.until("registered")
    await here.log.flush()
    await agent.send([rec(EXIT, 1)])
    await first.until_events(1)
    await second.until_events(1)
    first.call.cancel()
    await second.leave()
    await agent.send([rec(EXIT, 2)])
    await here.between(agent)
    await second.open()
    await first.open()
    await agent.send([rec(EXIT, 3)])
    for taker in (first, second):
        await taker.until_events(3)
        assert slots(taker) == [0, 1, 2]
        assert taker.gaps == []


async def test_too_late(here: Here) -> None:
    """When nobody has kept the place: a gap says from where to where, then what comes."""
    agent, taker = await start(here, registration(0x40), linger_ms=0)
    await agent.send([rec(EXIT, 1)])
    await taker.until_events(1)
    taker.call.cancel()
    await agent.wait(lambda: not agent.mask)  # a stream that does not linger is over with its end
    await agent.send([rec(EXIT, 2, flags=OWN)])
    await taker.open()
    gap = await taker.until("gap")
    assert (gap.reason, gap.from_position, gap.to_position) == (LOG, 1, agent.position)
    await agent.send([rec(EXIT, 3)])
    await taker.until_events(2)
    assert slots(taker) == [0, 2]


async def test_lingering_ends(here: Here) -> None:
    agent, taker = await start(here, registration(0x40), linger_ms=50)
    taker.call.cancel()
    await agent.wait(lambda: not agent.mask)
    assert not here.broker.sessions


async def test_closed(here: Here) -> None:
    """Who says that he is gone is gone at once."""
    agent, taker = await start(here, registration(0x40))
    await taker.call.write(monitor_pb2.WatchRequest(close=monitor_pb2.CloseRequest()))
    await agent.wait(lambda: not agent.mask)
    assert await taker.call.read() is grpc.aio.EOF
    assert await taker.call.code() is grpc.StatusCode.OK
    assert not here.broker.sessions


async def test_too_long(here: Here) -> None:
    call = here.monitor.Subscribe(monitor_pb2.SubscribeRequest(registrations=[registration(0x40)], linger_ms=3_600_001))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call.read()
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_losses_are_told_once(here: Here) -> None:
    """Those of before, that were taken; and those of meanwhile, in their place, though no position tells them apart."""
    agent, taker = await start(here, registration(0x40))
    await agent.send([rec(EXIT, 1)])
    await agent.lose(3)
    await taker.until("gap")
    await taker.leave()
    await agent.lose(2)
    await agent.send([rec(EXIT, 2)])
    await agent.lose(1)
    await agent.acknowledged()
    await here.between(agent)
    await taker.open()
    await taker.until("registered")
    assert slots(taker) == [0, 1]
    assert [[(each.type, each.count) for each in gap.lost] for gap in taker.gaps] == [[(EXIT, 3)], [(EXIT, 2)], [(EXIT, 1)]]
    assert all(gap.reason == RING and gap.log_id == here.broker.log.log_id for gap in taker.gaps)


async def test_a_reboot_meanwhile(here: Here) -> None:
    agent, taker = await start(here, registration(0x40, pid=100), registration(0x40))
    await agent.send([rec(EXIT, 1)])
    await taker.until_events(1)
    await taker.leave()
    await agent.send([rec(EXIT, 2)])
    await agent.acknowledged()
    await agent.leave()
    before = agent.position
    agent.boot_id, agent.epoch, agent.position, agent.acked, agent.sent = "boot-2", 8, 0, 0, []
    await agent.serve()
    await agent.wait(lambda: agent.mask != 0)
    await agent.send([rec(EXIT, 3)])
    await agent.acknowledged()
    await here.between(agent)
    await taker.open()
    await taker.until_events(4)
    assert taker.events == [
        ("a", 7, 0, EXIT, 1),
        ("a", 7, SLOT_SIZE, EXIT, 2),
        ("a", 7, before, EXIT, 100),
        ("a", 8, 0, EXIT, 3),
    ]
    assert [gap.reason for gap in taker.gaps] == [monitor_pb2.GAP_REASON_AGENT]


async def test_retention_takes_what_was_not_fetched() -> None:
    """What the log has dropped meanwhile is counted."""
    here = await Here.start(MemoryLog(40_000), None, "")
    try:
        agent, taker = await start(here, registration(0x60))
        await agent.send([rec(EXIT, 1), rec(EXIT, 2), rec(EXEC, 3)])
        await taker.until_events(3)
        taker.positions["a"] = (7, 0)
        await taker.leave()
        for pid in range(200):
            await agent.send([rec(EXIT, pid), rec(FORK, pid)])
        await agent.acknowledged()
        await here.between(agent)
        await taker.open()
        await taker.until("registered")
        (gap,) = taker.gaps
        counts = {int(each.type): each.count for each in gap.lost}
        assert gap.reason == LOG
        told = taker.events[3:]
        assert 0 < len(told) < 100
        assert len(told) + counts[EXIT] == 200 + 1, "and the second of the first block, which was sent and not taken"
        assert counts[EXEC] == 1
        assert gap.from_position == SLOT_SIZE
        assert told[0][2] == gap.to_position
    finally:
        await here.stop()


async def test_an_end_that_was_lost(here: Here) -> None:
    """A watched process that is gone, and whose end does not come: the agent is asked for a record of it, once."""
    agent, taker = await start(here, registration(0x40, pid=100), registration(0x40, pid=101))
    agent.gone = (100,)
    count = agent_pb2.Lost.Count(type=events_pb2.EVENT_TYPE_PROCESS_EXIT, watched=True, total=1)
    await agent.call.write(agent_pb2.AgentMessage(lost=agent_pb2.Lost(counts=[count])))
    assert (await taker.until("gap")).reason == RING
    await taker.until_events(1)
    assert agent.inferred == [(100, 1000)]
    assert taker.events == [("a", 7, 0, EXIT, 100)]
    assert taker.states == [RUNNING, RUNNING]


async def test_an_end_in_a_ring_that_is_gone(here: Here) -> None:
    """An agent without pins was started again: the same, at positions of the new ring."""
    agent, taker = await start(here, registration(0x40, pid=100), registration(0x40, pid=101))
    await agent.leave()
    await taker.until("node")
    agent.epoch, agent.position, agent.acked, agent.sent, agent.gone = 8, 0, 0, [], (100,)
    await agent.serve()
    await taker.until_events(1)
    assert agent.inferred == [(100, 1000)]
    await agent.send([rec(EXIT, 101, flags=OWN)])
    await taker.until_events(2)
    assert [event[4] for event in taker.events] == [100, 101]
    assert [gap.reason for gap in taker.gaps] == [monitor_pb2.GAP_REASON_AGENT]
    assert EXITED not in taker.states


async def test_removed_nodes(here: Here) -> None:
    agent, taker = await start(here, registration(0x40, node="a"), registration(0x40))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await here.monitor.RemoveNode(monitor_pb2.RemoveNodeRequest(node="a"))
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await here.monitor.RemoveNode(monitor_pb2.RemoveNodeRequest(node="b"))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    await agent.leave()
    assert (await taker.until("node")).state == monitor_pb2.NODE_STATE_UNREACHABLE
    await here.monitor.RemoveNode(monitor_pb2.RemoveNodeRequest(node="a"))
    gone = await taker.until("node")
    assert (gone.state, list(gone.registration_ids)) == (monitor_pb2.NODE_STATE_GONE, [0, 1])
    assert not (await here.monitor.ListNodes(monitor_pb2.ListNodesRequest())).nodes
    agent.epoch, agent.position = 9, 0
    await agent.serve()
    assert (await taker.until("node")).state == monitor_pb2.NODE_STATE_UP
    assert (await taker.until("registered")).registration_id == 1
