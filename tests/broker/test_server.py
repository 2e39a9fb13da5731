# SPDX-License-Identifier: Apache-2.0
"""The broker over real gRPC: the test plays the agent and the monitors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import pytest

from kmonitor.broker.broker import Broker
from kmonitor.broker.log.memory import MemoryLog
from kmonitor.broker.server import Server
from kmonitor.v1 import agent_pb2, agent_pb2_grpc, events_pb2, monitor_pb2, monitor_pb2_grpc
from kmonitor.wire.record import F_MATCH_CGROUP, F_MATCH_NODE, F_MATCH_PROCESS, RECORD_SIZE, RECORD_VERSION, SLOT_SIZE
from tests.broker.records import EXEC, EXIT, FORK, Rec, build, rec

RUNNING = monitor_pb2.REGISTRATION_STATE_RUNNING
EXITED = monitor_pb2.REGISTRATION_STATE_EXITED
ARMED = monitor_pb2.REGISTRATION_STATE_ARMED
UNREACHABLE = monitor_pb2.REGISTRATION_STATE_NODE_UNREACHABLE


@dataclass
class Agent:
    """An agent as the test drives it."""

    channel: grpc.aio.Channel
    node: str = "a"
    boot_id: str = "boot-1"
    epoch: int = 7
    position: int = 0
    secret: bytes = b"it lies with the ring"
    call: Any = None
    interest: list[agent_pb2.Interest] = field(default_factory=list)
    acked: int = 0

    async def connect(self, **more: Any) -> agent_pb2.Welcome:
        self.call = agent_pb2_grpc.AgentServiceStub(self.channel).Connect()
        hello = agent_pb2.Hello(
            node=self.node, boot_id=self.boot_id, epoch=self.epoch, position=self.position, record_version=RECORD_VERSION,
            record_size=RECORD_SIZE, slot_size=SLOT_SIZE, secret=self.secret,
        )  # fmt: skip
        hello.MergeFrom(agent_pb2.Hello(**more))
        await self.call.write(agent_pb2.AgentMessage(hello=hello))
        first = await self.read()
        return first.welcome

    async def read(self) -> agent_pb2.BrokerMessage:
        message = await self.call.read()
        if message is grpc.aio.EOF:
            raise EOFError(await self.call.code(), await self.call.details())
        assert isinstance(message, agent_pb2.BrokerMessage)
        return message

    async def read_on(self) -> None:
        """Until the stream ends: raises AioRpcError with its status."""
        while True:
            await self.read()

    async def next_interest(self) -> agent_pb2.Interest:
        while True:
            message = await self.read()
            if message.WhichOneof("kind") == "interest":
                return message.interest

    async def ack_of(self, position: int) -> None:
        while True:
            message = await self.read()
            if message.WhichOneof("kind") == "ack" and message.ack.position >= position:
                return

    async def apply(self, interest: agent_pb2.Interest, *, gone: tuple[int, ...] = (), cgroups: dict[str, list[int]] | None = None) -> None:
        answer = agent_pb2.InterestApplied(version=interest.version, position=self.position)
        for item in interest.processes:
            if not item.look_up:
                continue
            if item.pid in gone:
                answer.processes.add(pid=item.pid, start_time=item.start_time, state=EXITED)
            else:
                start = item.start_time or item.pid * 10
                answer.processes.add(
                    pid=item.pid, start_time=item.start_time, state=RUNNING, process=events_pb2.Process(pid=item.pid, start_time=start)
                )
        for group in interest.groups:
            if group.event_mask:
                answer.groups.add(cgroup=group.cgroup, state=ARMED, cgroup_ids=(cgroups or {})[group.cgroup])
        await self.call.write(agent_pb2.AgentMessage(applied=answer))

    async def send(self, records: list[Rec], *, position: int | None = None) -> None:
        data = build(records)
        if position is None:
            position, self.position = self.position, self.position + len(data)
        await self.call.write(agent_pb2.AgentMessage(block=agent_pb2.Block(position=position, data=data, boottime_to_unix_ns=1_000_000)))


@dataclass
class World:
    """A broker, and a way to it."""

    broker: Broker
    server: Server
    address: str
    channel: grpc.aio.Channel

    @property
    def monitor(self) -> Any:
        return monitor_pb2_grpc.MonitorServiceStub(self.channel)


@asynccontextmanager
async def world(**options: Any) -> AsyncIterator[World]:
    broker = Broker(MemoryLog(options.pop("log_bytes", 64 << 20)), **{"lease": 30.0, "progress_interval": 60.0, "linger": 0.3, **options})
    server = Server(broker)
    port = await server.start("127.0.0.1:0")
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield World(broker, server, f"127.0.0.1:{port}", channel)
    finally:
        await server.stop(0)


@pytest.fixture
async def here() -> AsyncIterator[World]:
    async with world() as made:
        yield made


def registration(
    mask: int = 0x7F, *, pid: int = 0, cgroup: str = "", node: str = "", follow: bool = False, **filters: Any
) -> monitor_pb2.Registration:
    made = monitor_pb2.Registration(event_mask=mask, follow=follow, filter=monitor_pb2.EventFilter(**filters))
    if pid:
        made.target.process.pid = pid
    if cgroup:
        made.target.cgroup = cgroup
    if node:
        made.nodes.names.append(node)
    return made


def subscribe(here: World, *registrations: monitor_pb2.Registration) -> Any:
    return here.monitor.Subscribe(monitor_pb2.SubscribeRequest(registrations=registrations))


async def next_of(call: Any, kind: str) -> Any:
    """The next notification of a kind; others are passed over."""
    while True:
        message = await call.read()
        if message is grpc.aio.EOF:
            raise EOFError(await call.code(), await call.details())
        if message.WhichOneof("kind") == kind:
            return getattr(message, kind)


async def test_everything_of_a_node(here: World) -> None:
    agent = Agent(here.channel)
    welcome = await agent.connect()
    assert welcome.lease_ms == 30_000
    assert (await agent.next_interest()).reset
    call = subscribe(here, registration(0x48))
    interest = await agent.next_interest()
    assert interest.node_mask == 0x48
    assert not interest.reset
    await agent.apply(interest)
    answer = await next_of(call, "registered")
    assert (answer.state, answer.node, answer.epoch, answer.pending) == (ARMED, "a", 7, 0)
    await agent.send([rec(FORK, child_tgid=5, child_tid=5), rec(EXIT, status=9), rec(EXEC, flags=F_MATCH_PROCESS)])
    batch = await next_of(call, "events")
    assert (batch.node, batch.epoch) == ("a", 7)
    assert [event.type for event in batch.events] == [FORK, EXIT]
    assert batch.events[1].exit_signal == 9
    assert batch.events[0].time == 1_005_000
    await agent.ack_of(agent.position)


async def test_watch_register_and_deregister(here: World) -> None:
    agent = Agent(here.channel)
    await agent.connect()
    await agent.next_interest()
    call = here.monitor.Watch()
    wanted = registration(0x40, pid=100)
    await call.write(monitor_pb2.WatchRequest(request_id=3, register=monitor_pb2.RegisterRequest(registration=wanted)))
    interest = await agent.next_interest()
    assert [(item.pid, item.start_time, item.event_mask, item.look_up) for item in interest.processes] == [(100, 0, 0x40, True)]
    await agent.apply(interest)
    answer = await next_of(call, "registered")
    assert (answer.state, answer.request_id, answer.registration_id, answer.process.start_time) == (RUNNING, 3, 3, 1000)
    await agent.send([rec(EXIT, 100, flags=F_MATCH_PROCESS, start_boottime_ns=999), rec(EXEC, 100, flags=F_MATCH_PROCESS)])
    more = registration(0x20, pid=100)
    await call.write(monitor_pb2.WatchRequest(request_id=4, register=monitor_pb2.RegisterRequest(registration=more)))
    interest = await agent.next_interest()
    assert interest.processes[0].event_mask == 0x60
    await agent.apply(interest)
    answer = await next_of(call, "registered")
    assert (answer.request_id, answer.registration_id, answer.event_mask) == (4, 3, 0x60)
    await agent.send([rec(EXEC, 100, flags=F_MATCH_PROCESS)])
    batch = await next_of(call, "events")
    assert [event.position for event in batch.events] == [2 * SLOT_SIZE]
    both = registration(0x60, pid=100)
    await call.write(monitor_pb2.WatchRequest(request_id=5, deregister=monitor_pb2.DeregisterRequest(registration=both)))
    gone = await next_of(call, "deregistered")
    assert (gone.request_id, gone.registration_id, gone.event_mask, gone.error.code) == (5, 3, 0, 0)
    interest = await agent.next_interest()
    assert [(item.pid, item.start_time, item.event_mask) for item in interest.processes] == [(100, 1000, 0)]
    await call.write(monitor_pb2.WatchRequest(request_id=6, deregister=monitor_pb2.DeregisterRequest(registration=both)))
    gone = await next_of(call, "deregistered")
    assert gone.error.code == 5


async def test_the_streams_end_removes_its_interest(here: World) -> None:
    agent = Agent(here.channel)
    await agent.connect()
    await agent.next_interest()
    call = subscribe(here, registration(0x40))
    assert (await agent.next_interest()).node_mask == 0x40
    call.cancel()
    assert (await agent.next_interest()).node_mask == 0
    assert not here.broker.sessions


async def test_follow(here: World) -> None:
    agent = Agent(here.channel)
    await agent.connect()
    await agent.next_interest()
    call = subscribe(here, registration(0x40, pid=100, follow=True))
    interest = await agent.next_interest()
    assert (interest.processes[0].event_mask, interest.processes[0].follow) == (0x48, True)
    await agent.apply(interest)
    await next_of(call, "registered")
    own = F_MATCH_PROCESS
    await agent.send(
        [
            rec(FORK, 100, flags=own, child_tgid=101, child_tid=101, child_start_boottime_ns=1010),
            rec(FORK, 101, flags=own, child_tgid=102, child_tid=102, child_start_boottime_ns=1020),
            rec(EXIT, 102, flags=own),
            rec(EXIT, 103, flags=own),
            rec(EXIT, 100, flags=own),
        ]
    )
    batch = await next_of(call, "events")
    assert [event.pid for event in batch.events] == [102, 100]
    await agent.send([rec(EXIT, 101, flags=own)])
    batch = await next_of(call, "events")
    assert [event.pid for event in batch.events] == [101]
    node = here.broker.nodes.get("a")
    assert node is not None
    assert node.interest.watched_processes == 0


async def test_cgroups_nest(here: World) -> None:
    agent = Agent(here.channel)
    await agent.connect()
    await agent.next_interest()
    outer = subscribe(here, registration(0x40, cgroup="/outer"))
    interest = await agent.next_interest()
    await agent.apply(interest, cgroups={"/outer": [20, 1]})
    assert (await next_of(outer, "registered")).state == ARMED
    inner = subscribe(here, registration(0x40, cgroup="/outer/inner"))
    interest = await agent.next_interest()
    await agent.apply(interest, cgroups={"/outer/inner": [30, 20, 1]})
    assert (await next_of(inner, "registered")).state == ARMED
    inside = F_MATCH_CGROUP
    await agent.send([rec(EXIT, 5, flags=inside, match_cgroup_id=30), rec(EXIT, 6, flags=inside, match_cgroup_id=20)])
    assert [event.pid for event in (await next_of(outer, "events")).events] == [5, 6]
    assert [event.pid for event in (await next_of(inner, "events")).events] == [5]


async def test_reconnect_goes_on_without_a_seam(here: World) -> None:
    agent = Agent(here.channel)
    await agent.connect()
    await agent.next_interest()
    call = subscribe(here, registration(0x60, pid=100))
    await agent.apply(await agent.next_interest())
    await next_of(call, "registered")
    await agent.send([rec(EXEC, 100, flags=F_MATCH_PROCESS)])
    await next_of(call, "events")
    agent.call.cancel()
    change = await next_of(call, "node")
    assert (change.state, list(change.registration_ids)) == (monitor_pb2.NODE_STATE_UNREACHABLE, [0])
    welcome = await agent.connect()
    assert welcome.position == agent.position
    assert (await next_of(call, "node")).state == monitor_pb2.NODE_STATE_UP
    interest = await agent.next_interest()
    assert interest.reset
    assert [(item.pid, item.start_time, item.look_up) for item in interest.processes] == [(100, 1000, True)]
    # It ended while the agent looked, behind the position from which the answer speaks: what is in the ring is what is told.
    await agent.call.write(
        agent_pb2.AgentMessage(
            applied=agent_pb2.InterestApplied(
                version=interest.version,
                position=agent.position,
                end_position=agent.position + SLOT_SIZE,
                processes=[agent_pb2.InterestApplied.ProcessResult(pid=100, start_time=1000, state=EXITED)],
            )
        )
    )
    await agent.send([rec(EXEC, 100, flags=F_MATCH_PROCESS)], position=0)
    await agent.send([rec(EXIT, 100, flags=F_MATCH_PROCESS, status=0x300)])
    message = await call.read()
    assert [(event.type, event.exit_code) for event in message.events.events] == [(EXIT, 3)]


async def test_reconnect_tells_of_what_is_gone(here: World) -> None:
    agent = Agent(here.channel)
    await agent.connect()
    await agent.next_interest()
    call = subscribe(here, registration(0x40, pid=100))
    await agent.apply(await agent.next_interest())
    await next_of(call, "registered")
    agent.call.cancel()
    await next_of(call, "node")
    await agent.connect()
    await agent.apply(await agent.next_interest(), gone=(100,))
    answer = await next_of(call, "registered")
    assert (answer.state, answer.registration_id) == (EXITED, 0)


async def test_reboot(here: World) -> None:
    agent = Agent(here.channel)
    await agent.connect()
    await agent.next_interest()
    call = subscribe(here, registration(0x40, pid=100), registration(0x40))
    await agent.apply(await agent.next_interest())
    await next_of(call, "registered")
    await next_of(call, "registered")
    agent.call.cancel()
    await next_of(call, "node")
    agent.boot_id, agent.epoch, agent.position = "boot-2", 8, 0
    await agent.connect()
    assert (await next_of(call, "node")).state == monitor_pb2.NODE_STATE_REBOOTED
    events = await next_of(call, "events")
    assert (events.boot_id, events.epoch) == ("boot-1", 7)
    assert [(event.pid, event.inferred) for event in events.events] == [(100, True)]
    assert (await next_of(call, "gap")).reason == monitor_pb2.GAP_REASON_AGENT
    interest = await agent.next_interest()
    assert (len(interest.processes), interest.node_mask) == (0, 0x40)
    await agent.apply(interest)
    answer = await next_of(call, "registered")
    assert (answer.state, answer.epoch) == (ARMED, 8)
    await agent.send([rec(EXIT, 100, flags=F_MATCH_NODE)])
    assert (await next_of(call, "events")).epoch == 8


async def test_nodes_that_come_later(here: World) -> None:
    call = subscribe(here, registration(0x40))
    answer = await next_of(call, "registered")
    assert (answer.state, answer.node) == (monitor_pb2.REGISTRATION_STATE_NO_NODE, "")
    named = subscribe(here, registration(0x40, node="a"))
    assert (await next_of(named, "registered")).state == UNREACHABLE  # the broker has just started
    agent = Agent(here.channel)
    await agent.connect()
    interest = await agent.next_interest()
    assert interest.node_mask == 0x40
    await agent.apply(interest)
    assert (await next_of(call, "registered")).state == ARMED
    assert (await next_of(named, "registered")).state == ARMED


async def test_who_may_connect(here: World) -> None:
    agent = Agent(here.channel)
    await agent.connect()
    with pytest.raises(grpc.aio.AioRpcError, match="ALREADY_EXISTS"):
        await Agent(here.channel, epoch=9).connect()
    await Agent(here.channel).connect()
    with pytest.raises(grpc.aio.AioRpcError, match="took over"):
        await agent.read_on()
    with pytest.raises(grpc.aio.AioRpcError, match="FAILED_PRECONDITION"):
        await Agent(here.channel, node="b").connect(record_version=9)
    with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT"):
        await Agent(here.channel, node="*").connect()


async def test_a_bad_block_ends_the_stream(here: World) -> None:
    agent = Agent(here.channel)
    await agent.connect()
    await agent.call.write(agent_pb2.AgentMessage(block=agent_pb2.Block(position=0, data=b"x" * 100)))
    with pytest.raises(grpc.aio.AioRpcError, match="no whole number"):
        await agent.read_on()


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (None, "INVALID_ARGUMENT"),
        (registration(0), "INVALID_ARGUMENT"),
        (registration(0x80), "INVALID_ARGUMENT"),
        (registration(0x40, pid=-1), "INVALID_ARGUMENT"),
        (registration(0x40, comms=["[a"]), "INVALID_ARGUMENT"),
    ],
)
async def test_bad_requests(here: World, wrong: monitor_pb2.Registration | None, code: str) -> None:
    call = subscribe(here, *([wrong] if wrong else []))
    with pytest.raises(grpc.aio.AioRpcError, match=code):
        await next_of(call, "registered")


async def test_unknown_node() -> None:
    async with world(lease=0.25) as here:
        await Agent(here.channel).connect()
        loop = asyncio.get_running_loop()
        settled = asyncio.Event()
        loop.call_later(0.3, settled.set)
        await settled.wait()
        assert not here.broker.nodes.settling
        with pytest.raises(grpc.aio.AioRpcError, match=r"(?s)NOT_FOUND.*known nodes are a"):
            await next_of(subscribe(here, registration(0x40, node="nope")), "registered")


async def test_lease() -> None:
    async with world(lease=0.3) as here:
        agent = Agent(here.channel)
        await agent.connect()
        call = subscribe(here, registration(0x40, pid=100))
        change = await next_of(call, "node")
        assert change.state == monitor_pb2.NODE_STATE_UNREACHABLE
        answer = await next_of(call, "registered")
        assert answer.state == UNREACHABLE
        with pytest.raises(grpc.aio.AioRpcError, match="lease ran out"):
            await agent.read_on()


async def test_lost_and_hole(here: World) -> None:
    agent = Agent(here.channel)
    await agent.connect()
    await agent.next_interest()
    wide = subscribe(here, registration(0x40))
    await agent.apply(await agent.next_interest())
    await next_of(wide, "registered")
    own = subscribe(here, registration(0x40, pid=100))
    await agent.apply(await agent.next_interest())
    await next_of(own, "registered")

    def lost(total: int, *, watched: bool) -> agent_pb2.AgentMessage:
        count = agent_pb2.Lost.Count(type=events_pb2.EVENT_TYPE_PROCESS_EXIT, watched=watched, total=total)
        return agent_pb2.AgentMessage(lost=agent_pb2.Lost(counts=[count]))

    await agent.call.write(lost(3, watched=False))
    await agent.call.write(lost(3, watched=False))
    await agent.call.write(lost(1, watched=True))
    gap = await next_of(wide, "gap")
    assert [(item.type, item.count) for item in gap.lost] == [(EXIT, 3)]
    assert gap.reason == monitor_pb2.GAP_REASON_RING
    gap = await next_of(wide, "gap")
    assert [(item.type, item.count) for item in gap.lost] == [(EXIT, 1)]
    gap = await next_of(own, "gap")
    assert [(item.type, item.count) for item in gap.lost] == [(EXIT, 1)]
    agent.position = 10 * SLOT_SIZE
    await agent.send([rec(EXIT, 5)])
    gap = await next_of(wide, "gap")
    assert (gap.reason, gap.from_position, gap.to_position) == (monitor_pb2.GAP_REASON_AGENT, 0, 10 * SLOT_SIZE)


async def test_lists(here: World) -> None:
    agent = Agent(here.channel)
    await agent.connect(labels={"rack": "1"}, source="core")
    await agent.next_interest()
    nodes = (await here.monitor.ListNodes(monitor_pb2.ListNodesRequest())).nodes
    assert [(node.name, node.state, node.labels["rack"], node.source) for node in nodes] == [("a", monitor_pb2.NODE_STATE_UP, "1", "core")]

    async def answer() -> None:
        while (message := await agent.read()).WhichOneof("kind") != "list_processes":
            pass
        call_id = message.list_processes.call_id
        await agent.call.write(
            agent_pb2.AgentMessage(processes=agent_pb2.ProcessList(call_id=call_id, processes=[events_pb2.Process(pid=1, comm="init")]))
        )

    answering = asyncio.ensure_future(answer())
    found = await here.monitor.ListProcesses(monitor_pb2.ListProcessesRequest(node="a"))
    await answering
    assert [process.comm for process in found.processes] == ["init"]
    for name, code in (("", grpc.StatusCode.INVALID_ARGUMENT), ("zzz", grpc.StatusCode.NOT_FOUND)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await here.monitor.ListProcesses(monitor_pb2.ListProcessesRequest(node=name))
        assert caught.value.code() == code


async def test_lists_of_a_group(here: World) -> None:
    """The unit's name is made whole; an agent that cannot tell says so, and one that is older has not understood."""
    agent = Agent(here.channel)
    await agent.connect(source="core")
    await agent.next_interest()
    position = 7 * SLOT_SIZE
    answers = [
        agent_pb2.ProcessList(by_group=True, cgroup_ids=[5, 6], position=position, processes=[events_pb2.Process(pid=1, cgroup_id=6)]),
        agent_pb2.ProcessList(by_group=True, error="no cgroup2 is mounted"),
        agent_pb2.ProcessList(processes=[events_pb2.Process(pid=1)]),
    ]
    asked: list[monitor_pb2.ProcessFilter] = []

    async def answer() -> None:
        for each in answers:
            while (message := await agent.read()).WhichOneof("kind") != "list_processes":
                pass
            asked.append(message.list_processes.filter)
            each.call_id = message.list_processes.call_id
            await agent.call.write(agent_pb2.AgentMessage(processes=each))

    answering = asyncio.ensure_future(answer())
    request = monitor_pb2.ListProcessesRequest(node="a", filter=monitor_pb2.ProcessFilter(unit="x"))
    found = await here.monitor.ListProcesses(request)
    assert (list(found.cgroup_ids), found.position, found.epoch != 0) == ([5, 6], position, True)
    for words in ("node a: no cgroup2 is mounted", "cannot list a group: upgrade it"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await here.monitor.ListProcesses(request)
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert words in (caught.value.details() or "")
    await answering
    assert asked[0].unit == "x.service"


async def test_progress_and_stop() -> None:
    async with world(progress_interval=0.02) as here:
        agent = Agent(here.channel)
        await agent.connect()
        await agent.next_interest()
        call = subscribe(here, registration(0x40))
        await agent.apply(await agent.next_interest())
        await next_of(call, "registered")
        await agent.send([rec(EXIT)])
        await agent.call.write(agent_pb2.AgentMessage(heartbeat=agent_pb2.Heartbeat(position=agent.position, time_unix_nano=77_000_000)))
        while True:
            progress = await next_of(call, "progress")
            if progress.nodes and progress.nodes[0].time_unix_nano == 77_000_000:
                break
        assert (progress.nodes[0].node, progress.nodes[0].position) == ("a", SLOT_SIZE)
        await here.server.stop(1)
        with pytest.raises(grpc.aio.AioRpcError, match="broker is stopping"):
            await next_of(call, "registered")


async def test_a_cursor_is_answered_with_a_gap(here: World) -> None:
    agent = Agent(here.channel, position=40 * SLOT_SIZE)
    await agent.connect()
    await agent.next_interest()
    cursor = monitor_pb2.Cursor(positions=[monitor_pb2.Cursor.Position(node="a", epoch=7, position=9 * SLOT_SIZE)])
    call = here.monitor.Subscribe(monitor_pb2.SubscribeRequest(registrations=[registration(0x40)], cursor=cursor))
    await agent.apply(await agent.next_interest())
    gap = await next_of(call, "gap")
    assert (gap.reason, gap.from_position, gap.to_position) == (monitor_pb2.GAP_REASON_LOG, 9 * SLOT_SIZE + 1, 40 * SLOT_SIZE)


async def test_who_comes_back_for_a_process_that_is_gone_hears_of_the_gap(here: World) -> None:
    agent = Agent(here.channel, position=20 * SLOT_SIZE)
    await agent.connect()
    await agent.next_interest()
    cursor = monitor_pb2.Cursor(positions=[monitor_pb2.Cursor.Position(node="a", epoch=7, position=9 * SLOT_SIZE)])
    call = here.monitor.Subscribe(monitor_pb2.SubscribeRequest(registrations=[registration(0x40, pid=5)], cursor=cursor))
    await agent.apply(await agent.next_interest(), gone=(5,))
    first, second = await call.read(), await call.read()
    assert first.gap.reason == monitor_pb2.GAP_REASON_LOG
    assert (first.gap.from_position, first.gap.to_position) == (9 * SLOT_SIZE + 1, 20 * SLOT_SIZE)
    assert second.registered.state == EXITED


async def test_after_lost_ends_all_watched_processes_are_looked_up(here: World) -> None:
    """An end that the ring could not take is told as EXITED, once what came before was delivered; who lives hears nothing."""
    agent = Agent(here.channel)
    await agent.connect()
    await agent.next_interest()
    calls = {}
    for pid in (100, 200, 300):
        calls[pid] = subscribe(here, registration(0x40, pid=pid, follow=pid == 300))
        await agent.apply(await agent.next_interest())
        assert (await next_of(calls[pid], "registered")).state == RUNNING
    lost = agent_pb2.Lost(counts=[agent_pb2.Lost.Count(type=events_pb2.EVENT_TYPE_PROCESS_EXIT, watched=True, total=2)])
    await agent.call.write(agent_pb2.AgentMessage(lost=lost))
    again = await agent.next_interest()
    assert not again.reset
    assert {process.pid for process in again.processes if process.look_up} == {100, 200, 300}
    await agent.apply(again, gone=(100, 300))
    for pid in (100, 300):
        assert [(count.type, count.count) for count in (await calls[pid].read()).gap.lost] == [(EXIT, 2)]
        answer = (await calls[pid].read()).registered
        assert answer.state == EXITED
    await agent.send([rec(EXIT, 200, flags=F_MATCH_PROCESS, status=0x400)])
    assert (await calls[200].read()).HasField("gap")
    assert [event.exit_code for event in (await calls[200].read()).events.events] == [4]


async def test_a_child_that_could_not_be_followed_is_a_gap(here: World) -> None:
    agent = Agent(here.channel)
    await agent.connect()
    await agent.next_interest()
    follower = subscribe(here, registration(0x40, pid=5, follow=True))
    await agent.apply(await agent.next_interest())
    assert (await follower.read()).registered.state == RUNNING
    lost = agent_pb2.Lost(counts=[agent_pb2.Lost.Count(type=events_pb2.EVENT_TYPE_UNSPECIFIED, watched=True, total=3)])
    await agent.call.write(agent_pb2.AgentMessage(lost=lost))
    told = (await follower.read()).gap
    assert [(count.type, count.count) for count in told.lost] == [(0, 3)]
