# SPDX-License-Identifier: Apache-2.0
"""A node that comes back answers thousands of registrations at once: no monitor that reads is ended for it, and nobody waits for it."""

from __future__ import annotations

import asyncio

import pytest

from kmonitor.broker import answers, outbox
from kmonitor.broker.broker import Broker
from kmonitor.broker.errors import Code
from kmonitor.broker.log.memory import MemoryLog
from kmonitor.broker.nodes import Link
from kmonitor.broker.sessions import Session
from kmonitor.v1 import agent_pb2, events_pb2, monitor_pb2
from kmonitor.wire.record import RECORD_SIZE, RECORD_VERSION, SLOT_SIZE

NODE = "web-frontend-17"
BOOT = "3f1c9c1e-8f7e-4f0a-9a52-0d8a0b6f0001"
COUNT = 3_000
RUNNING = monitor_pb2.REGISTRATION_STATE_RUNNING
LIMIT_S = 20.0


def hello(epoch: int) -> agent_pb2.Hello:
    return agent_pb2.Hello(
        node=NODE, boot_id=BOOT, epoch=epoch, record_version=RECORD_VERSION, record_size=RECORD_SIZE, slot_size=SLOT_SIZE,
        infers_exits=True,
    )  # fmt: skip


async def answer(broker: Broker, link: Link) -> None:
    """All that the agent was asked: every process runs. Until the broker has dealt with it."""
    for message in link.take():
        if message.WhichOneof("kind") == "interest":
            applied = agent_pb2.InterestApplied(version=message.interest.version)
            for item in message.interest.processes:
                if item.look_up:
                    start = item.start_time or item.pid * 10
                    process = events_pb2.Process(pid=item.pid, ppid=1, comm="postgres", start_time=start, cgroup_id=12345)
                    applied.processes.add(pid=item.pid, start_time=item.start_time, state=RUNNING, process=process)
            broker.agents.receive(link, agent_pb2.AgentMessage(applied=applied))
            async with asyncio.timeout(LIMIT_S):
                await link.ready.wait()


def take(session: Session) -> list[monitor_pb2.Notification]:
    """All that waits."""
    found = []
    while len(session.outbox):
        found += [monitor_pb2.Notification.FromString(message) for message in session.outbox.take()]
    return found


async def registered(broker: Broker) -> Session:
    """A session with so many registrations, all of them answered and taken."""
    link = broker.agents.connect(hello(7))
    session = broker.open_session()
    for number in range(COUNT):
        message = monitor_pb2.Registration(event_mask=0x40)
        message.target.process.pid = number + 1
        message.nodes.names.append(NODE)
        broker.register(session, number, message)
    await asyncio.sleep(0)
    await answer(broker, link)
    assert sum(each.HasField("registered") for each in take(session)) == COUNT
    broker.agents.disconnect(link, "it was killed")
    return session


async def test_a_monitor_that_reads_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MESSAGES_LIMIT", 100_000)
    broker = Broker(MemoryLog(1 << 20), lease=30)
    try:
        session = await registered(broker)
        await answer(broker, broker.agents.connect(hello(8)))
        assert session.failure is None
        assert session.outbox.messages_bytes > 300_000, "else this shows nothing"
        told = {item.registered.registration_id for item in take(session) if item.HasField("registered")}
        assert told == set(range(COUNT))
    finally:
        broker.stop()


async def test_one_that_does_not_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MESSAGES_LIMIT", 100_000)
    broker = Broker(MemoryLog(1 << 20), lease=30)
    try:
        session = await registered(broker)
        monkeypatch.setattr(outbox, "STALLED_S", 0.0)  # the UNREACHABLE lies there since it has read last
        await answer(broker, broker.agents.connect(hello(8)))
        assert session.failure is not None
        assert session.failure.code == Code.RESOURCE_EXHAUSTED
        assert not len(session.outbox)
    finally:
        broker.stop()


async def test_it_is_bounded_whoever_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MESSAGES_LIMIT", 1_000)
    broker = Broker(MemoryLog(1 << 20), lease=30)
    try:
        session = await registered(broker)
        held = session.outbox.messages_bytes
        message = bytes(1 << 20)
        while session.failure is None:
            session.tell(message)
            held = max(held, session.outbox.messages_bytes)
            assert held <= (32 << 20) + 1024 * COUNT
        assert held >= 32 << 20
    finally:
        broker.stop()


async def test_others_have_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_AT_A_TIME_S", 0.0)
    broker = Broker(MemoryLog(1 << 20), lease=30)
    try:
        session = await registered(broker)
        link = broker.agents.connect(hello(8))
        turns = 0

        def turn() -> None:
            nonlocal turns
            turns += 1
            if not link.ready.is_set():
                asyncio.get_running_loop().call_soon(turn)

        answering = asyncio.ensure_future(answer(broker, link))
        await asyncio.sleep(0)
        turn()
        await answering
        assert turns > COUNT // 2
        assert len(take(session)) >= COUNT
    finally:
        broker.stop()


async def test_an_agent_that_goes_away_before_all_is_dealt_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was asked, and its answer was not looked at, is asked of the next one."""
    monkeypatch.setattr(answers, "_AT_A_TIME_S", 0.0)
    broker = Broker(MemoryLog(1 << 20), lease=30)
    try:
        session = await registered(broker)
        link = broker.agents.connect(hello(8))
        answering = asyncio.ensure_future(answer(broker, link))
        for _ in range(COUNT // 3):
            await asyncio.sleep(0)
        assert not link.ready.is_set()
        broker.agents.disconnect(link, "it was killed")
        await answering
        await answer(broker, broker.agents.connect(hello(8)))
        told = [item.registered for item in take(session) if item.HasField("registered")]
        assert {item.registration_id for item in told if item.state == RUNNING} == set(range(COUNT))
    finally:
        broker.stop()
