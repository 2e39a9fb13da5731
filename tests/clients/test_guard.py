# SPDX-License-Identifier: Apache-2.0
"""The guard around its subjects: who is added and removed, who asks the broker what and when, and what comes out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from kmonitor.clients import (
    BadSelectorError,
    Blindness,
    BrokerError,
    ClosedError,
    Life,
    Monitor,
    NoSuchRegistrationError,
    ProcessGuard,
    Subject,
    UsageError,
    connect,
)
from tests.clients.fake_broker import EXIT, FakeBroker, batch, event, gap, node_change, progress, refused
from tests.clients.guards import until

PATH = "/run/x.pid"
UP, UNREACHABLE = 1, 2


@pytest.fixture
async def monitor(broker: FakeBroker) -> AsyncIterator[Monitor]:
    broker.processes = {("web1", 11): 11000, ("web1", 12): 12000}
    async with connect(broker.address) as made:
        yield made


@pytest.fixture
async def guard(monitor: Monitor) -> AsyncIterator[ProcessGuard]:
    async with ProcessGuard(monitor, look_again=0.01) as made:
        yield made


async def test_what_cannot_be_guarded(guard: ProcessGuard, broker: FakeBroker) -> None:
    await guard.add(Subject("a", "web1", pid=11))
    wrong = [
        (UsageError, "'a' is guarded already", Subject("a", "web1", pid=12)),
        (BadSelectorError, "give one of pid, pidfile, unit and cgroup", Subject("b", "web1")),
        (BadSelectorError, "give one of pid, pidfile, unit and cgroup", Subject("b", "web1", pid=1, unit="x")),
        (BadSelectorError, "start_time and boot_id belong to a pid", Subject("b", "web1", unit="x", start_time=3)),
        (BadSelectorError, "comms belong to a unit or cgroup", Subject("b", "web1", pid=12, comms=("x",))),
        (BadSelectorError, "comm 'elasticsearch-main' matches nothing", Subject("b", "web1", unit="x", comms=("elasticsearch-main",))),
        (BadSelectorError, "unit", Subject("b", "web1", unit="no such/unit")),
    ]
    for kind, words, subject in wrong:
        with pytest.raises(kind, match=words):
            await guard.add(Subject("fine", "web1", pid=12), subject)
    assert set(guard.verdicts) == {"a"}
    with pytest.raises(UsageError, match="look_again=0"):
        ProcessGuard(guard._monitor, look_again=0)
    with pytest.raises(UsageError, match="cannot list a group: upgrade it"):
        await guard.add(Subject("older", "web1", unit="x.service"))
    assert set(guard.verdicts) == {"a"}
    await guard.add()


async def test_of_several_one_is_refused(guard: ProcessGuard, broker: FakeBroker) -> None:
    broker.answers = False
    adding = asyncio.create_task(guard.add(Subject("a", "web1", pid=11), Subject("b", "web1", pid=12)))
    session = await broker.session()
    for round_ in range(2):
        requests = await session.asked(2 * round_ + 2)
        session.send(*broker.answer(requests[2 * round_]), refused(requests[2 * round_ + 1].request_id, 5, "no such node"))
    with pytest.raises(NoSuchRegistrationError, match="no such node"):
        await adding
    assert guard.verdicts == {}
    # What was registered is not any more.
    requests = await session.asked(6)
    assert [request.WhichOneof("kind") for request in requests[4:]] == ["deregister"] * 2


async def test_a_pidfile_is_read_again_until_there_is_one(guard: ProcessGuard, broker: FakeBroker) -> None:
    broker.pidfiles = {("web1", PATH): "pidfile '/run/x.pid' is empty"}
    await guard.add(Subject("a", "web1", pidfile=PATH), Subject("b", "web1", pidfile="/run/none"))
    assert guard.verdict("a").reason == "node web1: pidfile '/run/x.pid' is empty"
    assert guard.verdict("b").reason == "there is no such pidfile"
    session = await broker.session()
    broker.pidfiles["web1", PATH] = 11
    for turn in range(50):
        *_, alive = await until(guard, lambda verdict: verdict.life is Life.ALIVE)
        assert alive.process is not None
        pid, start = alive.process.pid, alive.process.start_time
        session.send(batch("web1", event(200 + turn, EXIT, pid, start_time=start)))
        await until(guard, lambda verdict: verdict.life is Life.DEAD)
        if turn == 10:
            broker.processes["web1", pid] = None  # the file names the dead one for a while
            count = len(session.requests)
            await session.asked(count + 3)
        broker.pidfiles["web1", PATH] = 23 - pid
        broker.processes["web1", 23 - pid] = 100_000 + turn
    # Nothing of all these is left behind.
    assert len(guard._routes) == 1
    assert len(guard._queue) == 0
    assert len(guard._monitor._stream.standing._kept) <= 2
    assert len(guard._monitor.cursor.found()) <= 1


async def test_sight_is_asked_for(guard: ProcessGuard, broker: FakeBroker) -> None:
    """After a gap, and when a node is back: only an answer says that all is as before."""
    await guard.add(Subject("a", "web1", pid=11))
    session = await broker.session()
    session.send(gap("web1"), progress(1000))
    told = await until(guard, lambda verdict: verdict.blind is None and verdict.number > 1)
    assert [verdict.blind for verdict in told] == [None, Blindness.GAP, None]
    assert len(session.requests) == 2
    broker.answers = False
    session.send(node_change(UNREACHABLE, reason="lease"), node_change(UP), progress(1001))
    [_, _, again] = await session.asked(3)
    assert guard.verdict("a").reason == "lease"
    session.send(*broker.answer(again))
    await until(guard, lambda verdict: verdict.blind is None)


async def test_a_broker_that_comes_back_without_the_node(guard: ProcessGuard, broker: FakeBroker) -> None:
    await guard.add(Subject("a", "web1", pid=11))
    broker.answers = False
    (await broker.session()).end()
    again = await broker.session(1)
    again.send(refused(1, 5, "unknown node 'web1'"))
    await until(guard, lambda verdict: verdict.blind is Blindness.UNREACHABLE)
    assert (guard.verdict("a").life, guard.verdict("a").reason) == (Life.ALIVE, "unknown node 'web1'")
    broker.answers = True
    again.send(refused((await again.asked(2))[1].request_id, 5, "unknown node 'web1'"))
    *_, seen = await until(guard, lambda verdict: verdict.blind is None)
    assert seen.life is Life.ALIVE


async def test_two_subjects_of_one_process(guard: ProcessGuard, broker: FakeBroker) -> None:
    await guard.add(Subject("a", "web1", pid=11), Subject("b", "web1", pid=11))
    await guard.remove("a")
    session = await broker.session()
    assert all(request.WhichOneof("kind") == "register" for request in session.requests)  # the other one still wants it
    session.send(batch("web1", event(200, EXIT, 11, exit_code=3)))
    told = await until(guard, lambda verdict: verdict.life is Life.DEAD)
    assert {verdict.subject.name for verdict in told} == {"b"}
    with pytest.raises(KeyError):
        await guard.remove("a")
    with pytest.raises(KeyError):
        guard.verdict("a")
    await guard.add(Subject("c", "web1", pid=12))
    await guard.remove("c")
    assert session.requests[-1].WhichOneof("kind") == "deregister"


async def test_blind_already_when_it_is_added(guard: ProcessGuard, broker: FakeBroker) -> None:
    await guard.add(Subject("a", "web1", pid=11))
    await broker.stop()
    await until(guard, lambda verdict: verdict.blind is Blindness.DISCONNECTED)
    adding = asyncio.create_task(guard.add(Subject("b", "web1", pid=12)))
    await asyncio.sleep(0)
    assert guard.verdict("b").blind is Blindness.DISCONNECTED
    await asyncio.wait_for(guard.remove("a"), 5)
    await broker.start()
    await adding
    assert (guard.verdict("b").life, guard.verdict("b").blind) == (Life.ALIVE, None)


async def test_the_end(guard: ProcessGuard, broker: FakeBroker, monitor: Monitor) -> None:
    await guard.add(Subject("a", "web1", pid=11))
    session = await broker.session()
    session.send(batch("web1", event(200, EXIT, 11)))
    session.end(grpc.StatusCode.INTERNAL)
    assert [(await anext(guard)).life for _ in range(2)] == [Life.ALIVE, Life.DEAD]
    for _ in range(2):
        with pytest.raises(BrokerError):
            await anext(guard)
    with pytest.raises(BrokerError):
        await guard.add(Subject("b", "web1", pid=12))
    await guard.close()
    assert [verdict async for verdict in guard] == []
    with pytest.raises(BrokerError):
        await guard.add(Subject("b", "web1", pid=12))


async def test_closed(guard: ProcessGuard, monitor: Monitor) -> None:
    await guard.add(Subject("a", "web1", pid=11))
    waiting = asyncio.create_task(until(guard, lambda _: False))
    await asyncio.sleep(0)
    await guard.close()
    await guard.close()
    await waiting
    with pytest.raises(ClosedError, match="the guard is closed"):
        await guard.add(Subject("b", "web1", pid=12))
    assert (await monitor.register(node="web1", pid=12, events="exit")).states  # the monitor is its owner's
