# SPDX-License-Identifier: Apache-2.0
"""A disk under the broker's log that does not answer, not even for reads: who is there is told, and no node is taken for gone."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from kmonitor.v1 import agent_pb2, monitor_pb2, monitor_pb2_grpc
from tests.broker.records import EXIT, rec
from tests.broker.test_server import Agent, next_of, registration
from tests.lab.requires import Lack, skip
from tests.lab.services import Lab
from tests.lab.slow_disk import SlowDisk, slow_disk

LIMIT_S = 30.0
BEFORE = 40_100
"""Ends, of which the log takes some 6 MB: more than the system reads ahead."""
DURING = 30
LEASE = ("--lease", "1s", "--linger", "60s", "--progress-interval", "100ms")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SlowDisk]:
    if os.geteuid() != 0 or not Path("/dev/fuse").exists() or not Path("/dev/loop-control").exists():
        skip(Lack.SLOW_DISK)
    with slow_disk(tmp_path) as made:
        yield made


class OneByOne:
    """An agent's stream that its heartbeats are written to beside what else it says."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._writing = asyncio.Lock()

    async def write(self, message: agent_pb2.AgentMessage) -> None:
        async with self._writing:
            await self._call.write(message)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)


async def beat(agent: Agent) -> None:
    """As agents do, and more often than the lease is long."""
    while True:
        heartbeat = agent_pb2.Heartbeat(position=agent.position, time_unix_nano=1)
        await agent.call.write(agent_pb2.AgentMessage(heartbeat=heartbeat))
        await asyncio.sleep(0.1)


async def obey(agent: Agent, acked: int = 1 << 62) -> None:
    """Do all that the broker asks for, until it has acknowledged so much."""
    while (message := await agent.read()).WhichOneof("kind") != "ack" or message.ack.position < acked:
        if message.WhichOneof("kind") == "interest":
            await agent.apply(message.interest)


async def send(agent: Agent, count: int, first: int) -> None:
    """Ends of so many processes, up to 20 a block; the pids count on."""
    for pid in range(first, first + count, 20):
        await agent.send([rec(EXIT, each) for each in range(pid, min(pid + 20, first + count))])


async def take(call: Any, count: int) -> list[int]:
    """The pids of so many events."""
    pids: list[int] = []
    async with asyncio.timeout(LIMIT_S):
        while len(pids) < count:
            pids += [event.pid for event in (await next_of(call, "events")).events]
    return pids


async def stopped(broker: Any) -> None:
    broker.send(signal.SIGTERM)
    assert await asyncio.to_thread(broker.wait, LIMIT_S) == 0


async def test_reading_and_writing(disk: SlowDisk, lab: Lab) -> None:
    log = ("--log", f"sqlite:{disk.folder}/log.db")
    broker = lab.broker(*log, *LEASE)
    everything = [registration(EXIT)]
    async with grpc.aio.insecure_channel(broker.address) as channel:
        agent = Agent(channel)
        await agent.connect(ring_bytes=8 << 20)
        agent.call = OneByOne(agent.call)
        assert (await agent.next_interest()).reset
        beating = asyncio.ensure_future(beat(agent))
        request = monitor_pb2.SubscribeRequest(registrations=everything, linger_ms=60_000)
        away = monitor_pb2_grpc.MonitorServiceStub(channel).Subscribe(request)
        await agent.apply(await agent.next_interest())
        armed = await next_of(away, "registered")
        await send(agent, 100, 1)
        assert await take(away, 100) == [*range(1, 101)]
        taken = agent.position - 128
        away.cancel()
        await send(agent, BEFORE - 100, 101)
        async with asyncio.timeout(LIMIT_S):
            await obey(agent, agent.position)
        beating.cancel()
        await stopped(broker)
    disk.forget()  # what the next broker reads of it is not in memory
    broker = lab.broker(*log, *LEASE, listen=broker.address)
    async with grpc.aio.insecure_channel(broker.address) as channel:
        stub = monitor_pb2_grpc.MonitorServiceStub(channel)
        agent = Agent(channel, position=agent.position)
        await agent.connect(ring_bytes=8 << 20)
        agent.call = OneByOne(agent.call)
        beside = [asyncio.ensure_future(beat(agent)), asyncio.ensure_future(obey(agent))]
        there = stub.Subscribe(monitor_pb2.SubscribeRequest(registrations=everything))
        assert (await next_of(there, "registered")).node == "a"
        cursor = monitor_pb2.Cursor(
            positions=[monitor_pb2.Cursor.Position(node="a", epoch=agent.epoch, position=taken)], stream_id=armed.stream_id
        )
        with disk.hangs():
            away = stub.Subscribe(monitor_pb2.SubscribeRequest(registrations=everything, cursor=cursor, linger_ms=60_000))
            coming = asyncio.ensure_future(take(away, BEFORE - 100 + DURING))
            for number in range(DURING):  # more than three leases
                await send(agent, 1, BEFORE + 1 + number)
                assert await take(there, 1) == [BEFORE + 1 + number]
                (node,) = (await stub.ListNodes(monitor_pb2.ListNodesRequest(), timeout=LIMIT_S)).nodes
                assert node.state == monitor_pb2.NODE_STATE_UP
                await asyncio.sleep(0.12)
            assert not coming.done()
        assert await coming == [*range(101, BEFORE + DURING + 1)]
        said = broker.stderr_text()
        assert "Traceback" not in said
        assert "unreachable" not in said
        for call in (there, away):
            call.cancel()
        for task in beside:
            task.cancel()
        await stopped(broker)
