# SPDX-License-Identifier: Apache-2.0
"""What a monitor that comes back says to the broker, and what one that leaves says."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import grpc
import pytest

from kmonitor.clients import (
    ClosedError,
    Cursor,
    Disconnected,
    Event,
    Gap,
    Monitor,
    NodeChange,
    NodeGoneError,
    RegistrationState,
    UsageError,
    connect,
    sync,
)
from kmonitor.clients.stream import CLOSE_TIMEOUT_S
from kmonitor.v1 import monitor_pb2
from tests.clients.fake_broker import BOOT, EXIT, RUNNING, FakeBroker, batch, event, gap, node_change, process_of, progress, registered
from tests.clients.test_identity import cut, found_in
from tests.clients.test_pidfile import next_registered

HERE = Cursor({"web1": (7, 1000)}, log_id=9, number=40)


def brought(requests: list[monitor_pb2.WatchRequest]) -> list[tuple[bool, int]]:
    return [(request.HasField("cursor"), request.resuming) for request in requests]


async def test_a_first_register_brings_the_cursor(broker: FakeBroker) -> None:
    async with connect(broker.address, cursor=HERE) as monitor:
        await monitor.register(events="exit")
        await monitor.register(events="abort", node="web1")
        requests = await (await broker.session()).asked(2)
    assert brought(requests) == [(True, 1), (False, 0)]
    assert (requests[0].cursor.log_id, requests[0].cursor.number) == (9, 40)
    async with connect(broker.address) as monitor:
        await monitor.register(events="exit")
        assert brought((await broker.session(1)).requests) == [(False, 0)]


async def test_several_are_brought_together(broker: FakeBroker) -> None:
    broker.processes = {("web1", 5): 5000}
    async with connect(broker.address, cursor=HERE) as monitor:
        made = await monitor.register_all([{"pid": 5, "events": "exit"}, {"pid": 6, "events": "exit"}, {"unit": "a", "events": "exit"}])
        assert [list(each.states.values()) for each in made] == [
            [RegistrationState.RUNNING],
            [RegistrationState.NOT_FOUND],
            [RegistrationState.ARMED],
        ]
        assert [each.registration_id for each in made] == [1, 2, 3]
        await monitor.register(events="fork")
        requests = await (await broker.session()).asked(4)
        assert brought(requests) == [(True, 3), (False, 0), (False, 0), (False, 0)]
        # All of them stand; so does what was asked for and not answered.
        broker.answers = False
        asking = asyncio.create_task(monitor.register(events="exec", node="web1"))
        await broker.sessions[0].asked(5)
        broker.answers = True
        again = await cut(broker, 0)
        assert brought(await again.asked(5)) == [(True, 5), (False, 0), (False, 0), (False, 0), (False, 0)]
        assert (await asking).states == {"web1": RegistrationState.ARMED}


async def test_a_refusal_among_several(broker: FakeBroker) -> None:
    broker.pidfiles = {("web1", "/run/bad"): "is empty"}
    async with connect(broker.address) as monitor:
        with pytest.raises(UsageError, match="is empty"):
            await monitor.register_all([{"pidfile": "/run/bad"}, {"node": "web1"}])
        again = await cut(broker, 0)
        assert [request.request_id for request in again.requests] == [2]


async def test_the_number_comes_from_gaps_and_heartbeats(broker: FakeBroker) -> None:
    async with connect(broker.address) as monitor:
        await monitor.register(events="exit")
        session = await broker.session()
        session.send(gap(number=41, log_id=9), gap(to_position=600), progress(700, number=43, log_id=9))
        second = await cut(broker, 0)
        cursor = second.requests[0].cursor
        assert (cursor.log_id, cursor.number, second.cursor) == (9, 43, {"web1": (7, 699)})
        assert (monitor.cursor.log_id, monitor.cursor.number) == (0, 0)  # nothing was taken
        while not isinstance(item := await anext(monitor), Gap):
            pass
        assert (item.number, item.log_id, monitor.cursor.number, monitor.cursor.log_id) == (41, 9, 41, 9)
        # Another broker, with another log.
        second.send(progress(700, number=2, log_id=10))
        third = await cut(broker, 1)
        assert (third.requests[0].cursor.log_id, third.requests[0].cursor.number) == (10, 2)


async def test_nothing_is_brought_again(broker: FakeBroker) -> None:
    """What is registered then is new: no cursor, or it would get what came before."""
    async with connect(broker.address) as monitor:
        made = await monitor.register(events="exit")
        (await broker.session()).send(batch("web1", event(128, EXIT, 1)))
        await monitor.deregister(made)
        (await broker.session()).end()
        while not isinstance(await anext(monitor), Disconnected):
            pass
        await monitor.register(events="abort")
        assert brought((await broker.session(1)).requests) == [(False, 0)]
        broker.sessions[1].end()
        while not isinstance(await anext(monitor), Disconnected):
            pass
        await monitor.register(events="fork", node="web1")
        assert brought(await (await broker.session(2)).asked(2)) == [(True, 1), (False, 0)]


async def test_deregistering_comes_behind_what_is_resumed(broker: FakeBroker) -> None:
    broker.answers = False
    async with connect(broker.address, cursor=HERE) as monitor:
        asking = [
            asyncio.create_task(monitor.register(events="exit")),
            asyncio.create_task(monitor.deregister(events="exit")),
            asyncio.create_task(monitor.register(events="exit")),
        ]
        first = await broker.session()
        await first.asked(3)
        again = await cut(broker, 0)
        requests = await again.asked(3)
        assert [request.WhichOneof("kind") for request in requests] == ["register", "deregister", "register"]
        assert brought(requests) == [(True, 1), (False, 0), (False, 0)]
    for task in asking:
        with pytest.raises(ClosedError):
            await task


async def test_it_is_of_the_processes_of_before(broker: FakeBroker, tmp_path: Path) -> None:
    """Also in another program; for what was not asked for then it says nothing, and what is asked for later is asked anew."""
    broker.nodes = ["web1", "web2"]
    broker.processes = {("web1", 5): 5000, ("web2", 5): 5001, ("web1", 6): 6000}
    broker.pidfiles = {("web1", "/run/x.pid"): 6}
    path = tmp_path / "cursor"
    async with connect(broker.address) as monitor:
        await monitor.register_all([{"pid": 5, "events": "exit"}, {"node": "web1", "pidfile": "/run/x.pid", "events": "exit"}])
        for _ in range(3):
            await next_registered(monitor)
        monitor.cursor.save(path)
    broker.processes |= {("web2", 5): 7000, ("web1", 6): None, ("web1", 8): 8000}
    broker.pidfiles = {("web1", "/run/x.pid"): 8}
    async with connect(broker.address, cursor=Cursor.load(path)) as monitor:
        first, second, third = await monitor.register_all(
            [
                {"pid": 5, "events": "exit,abort"},
                {"node": "web1", "pidfile": "/run/x.pid", "events": "exit"},
                {"node": "web1", "pid": 5, "events": "exit"},
            ]
        )
        assert first.states == {"web1": RegistrationState.RUNNING, "web2": RegistrationState.EXITED}
        assert (second.states, third.states) == ({"web1": RegistrationState.EXITED}, {"web1": RegistrationState.RUNNING})
        session = await broker.session(1)
        assert [found_in(request) for request in await session.asked(3)] == [
            [("web1", 5, 5000, BOOT), ("web2", 5, 5001, BOOT)],
            [("web1", 6, 6000, BOOT)],
            [],
        ]
        session.send(progress(512))
        while not monitor.complete_until:
            await anext(monitor)
        anew = await monitor.register(node="web1", pidfile="/run/x.pid", events="exit")
        assert anew.states == {"web1": RegistrationState.RUNNING}
        # A connection later the first is of those processes still, and the one that was asked for anew of its own.
        again = await cut(broker, 1)
        assert {request.request_id: found_in(request) for request in await again.asked(3)} == {
            1: [("web1", 5, 5000, BOOT), ("web2", 5, 5001, BOOT)],
            3: [("web1", 5, 5000, BOOT)],
            4: [("web1", 8, 8000, BOOT)],
        }


async def test_an_older_broker_that_finds_another_process(broker: FakeBroker) -> None:
    """Nobody is told of the wrong one; through the next connection neither."""
    cursor = Cursor({"web1": (7, 1000)})
    broker.processes = {("web1", 5): 5000}
    async with connect(broker.address) as monitor:
        await monitor.register(node="web1", pid=5, events="exit")
        await next_registered(monitor)
        cursor = monitor.cursor
    broker.answers = False
    async with connect(broker.address, cursor=cursor) as monitor:
        asking = asyncio.create_task(monitor.register(node="web1", pid=5, events="exit"))
        session = await broker.session(1)
        session.send(registered(1, "web1", RUNNING, process=process_of(5, 6000)))
        answer = await asking
        assert (answer.states, answer.process()) == ({"web1": RegistrationState.EXITED}, None)


async def test_an_exit_may_still_be_in_the_log(broker: FakeBroker) -> None:
    """EXITED after a reconnect: until a heartbeat has come the registration is brought again, and its exit with it."""
    broker.processes = {("web1", 5): 5000}
    async with connect(broker.address) as monitor:
        await monitor.register(node="web1", pid=5, events="exit")
        broker.processes = {}
        second = await cut(broker, 0)
        await next_registered(monitor)
        assert (await next_registered(monitor)).state is RegistrationState.EXITED
        third = await cut(broker, 1)
        assert [found_in(request) for request in third.requests] == [[("web1", 5, 5000, BOOT)]]
        third.send(batch("web1", event(384, EXIT, 5, inferred=True)))
        while not isinstance(item := await anext(monitor), Event):
            pass
        assert (item.inferred, second.closed) == (True, False)
        third.end()
        await monitor.register(node="web1", events="fork")
        assert [request.request_id for request in (await broker.session(2 + 1)).requests] == [2]


async def test_what_a_process_has_forked_is_followed_on(broker: FakeBroker) -> None:
    broker.processes = {("web1", 5): 5000}
    async with connect(broker.address) as monitor:
        await monitor.register(node="web1", pid=5, events="exit", follow=True)
        broker.processes = {}
        (await cut(broker, 0)).send(progress(512))
        while not monitor.complete_until:
            await anext(monitor)
        assert [request.request_id for request in (await cut(broker, 1)).requests] == [1]


async def test_how_long_it_lingers(broker: FakeBroker) -> None:
    for number, (linger, sent) in enumerate(((None, None), (0, 0), (2.5, 2500), (3600, 3_600_000), (1e-9, 1))):
        async with connect(broker.address, linger=linger) as monitor:
            await monitor.register(events="exit")
            await monitor.register(events="fork")
            for again in range(2):
                session = await broker.session(2 * number + again)
                first, second = await session.asked(2) if again == 0 else ((await session.asked(1))[0], None)
                assert (first.linger_ms if first.HasField("linger_ms") else None) == sent
                assert second is None or not second.HasField("linger_ms")
                if again == 0:
                    session.end(grpc.StatusCode.UNAVAILABLE)
    for wrong in (-1, 3601, float("nan")):
        with pytest.raises(UsageError, match="cannot linger"):
            connect(broker.address, linger=wrong)


async def test_who_leaves_says_so(broker: FakeBroker) -> None:
    """Unless it means to come back."""
    for number, resumable in enumerate((False, True)):
        async with connect(broker.address, resumable=resumable) as monitor:
            await monitor.register(events="exit")
            session = await broker.session(number)
        async with asyncio.timeout(10):
            await session.over.wait()
        assert session.closed is not resumable
    broker.processes = {("web1", 5): 5000}
    async with connect(broker.address, resumable=True) as monitor:
        with pytest.raises(TimeoutError):
            await monitor.wait(node="web1", pid=5, timeout=0.05)
    assert broker.sessions[2].closed  # nobody has its cursor

    def synchronously() -> None:
        with sync.connect(broker.address) as monitor:
            monitor.register(events="exit")

    await asyncio.to_thread(synchronously)
    assert broker.sessions[3].closed


async def closing(monitor: Monitor) -> float:
    since = time.monotonic()
    await monitor.close()
    return time.monotonic() - since


async def test_leaving_never_hangs(broker: FakeBroker) -> None:
    broker.heeds_close = False
    async with connect(broker.address) as deaf:
        await deaf.register(events="exit")
        assert CLOSE_TIMEOUT_S * 0.9 <= await closing(deaf) < CLOSE_TIMEOUT_S * 5
    broker.heeds_close = None
    async with connect(broker.address) as older, connect(broker.address) as idle:
        await older.register(events="exit")
        assert await closing(older) < CLOSE_TIMEOUT_S * 0.9  # it answers that it does not know what is meant
        assert await closing(idle) < CLOSE_TIMEOUT_S * 0.9  # it has registered nothing
    broker.heeds_close = True
    async with connect(broker.address, queue_events=1) as full:  # nobody reads, and the stream stands
        await full.register(events="exit")
        session = await broker.session(2)
        session.send(*(batch("web1", event(100 + at, EXIT, 1, filename="x" * 4000)) for at in range(500)))
        assert await closing(full) < CLOSE_TIMEOUT_S * 5
        assert session.closed
    async with connect(broker.address) as away:
        await away.register(events="exit")
        await broker.stop()
        assert await closing(away) < CLOSE_TIMEOUT_S * 0.9


async def test_a_long_replay_is_read_no_faster_than_it_is_taken(broker: FakeBroker) -> None:
    """The answer stands behind it: who awaits that and does not iterate has it all read ahead."""
    broker.answers = False
    async with connect(broker.address, cursor=HERE, queue_events=10) as monitor:
        asking = asyncio.create_task(monitor.register(events="exit"))
        reading = asyncio.ensure_future(anext(monitor))
        session = await broker.session()
        session.send(*(batch("web1", event(1001 + at, EXIT, at + 1)) for at in range(1000)), *broker.answer(session.requests[0]))
        most = 0
        item = await reading
        for pid in range(1, 1001):
            assert isinstance(item, Event)
            assert item.pid == pid
            most = max(most, monitor._stream.waiting)
            item = await anext(monitor)
        assert (await asking).states == {"web1": RegistrationState.ARMED}
        assert most <= 20
    # One that has taken something, and then waits for the answer only, is not left waiting.
    async with connect(broker.address, cursor=HERE, queue_events=10) as monitor:
        asking = asyncio.create_task(monitor.register(events="exit"))
        reading = asyncio.ensure_future(anext(monitor))
        session = await broker.session(1)
        session.send(*(batch("web1", event(1001 + at, EXIT, at + 1)) for at in range(1000)), *broker.answer(session.requests[0]))
        await reading
        assert (await asking).states == {"web1": RegistrationState.ARMED}


async def test_a_node_that_was_removed(broker: FakeBroker) -> None:
    broker.nodes = ["web1", "web2"]
    broker.unreachable = {"web2"}
    async with connect(broker.address) as monitor:
        for node in ("web1", "web2"):
            await monitor.register(node=node, events="exit")
        waiting = asyncio.create_task(monitor.wait(node="web2", pid=5))
        wait = await broker.session(1)
        with pytest.raises(UsageError, match="there is no node db1"):
            await monitor.remove_node("db1")
        with pytest.raises(UsageError, match="node web1 is connected"):
            await monitor.remove_node("web1")
        await monitor.remove_node("web2")
        assert broker.removed == ["web2"]
        wait.send(node_change(4, "web1"), node_change(4, "web2", "removed"))
        with pytest.raises(NodeGoneError, match="web2 was removed: the end of process 5 there will not be told"):
            await waiting
        (await broker.session()).send(node_change(4, "web2", "removed"))
        while not isinstance(await anext(monitor), NodeChange):
            pass
        assert [request.request_id for request in (await cut(broker, 0)).requests] == [1]

    def synchronously() -> None:
        with sync.connect(broker.address) as monitor:
            monitor.remove_node("web2")

    with pytest.raises(UsageError, match="there is no node web2"):
        await asyncio.to_thread(synchronously)
