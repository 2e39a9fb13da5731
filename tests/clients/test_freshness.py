# SPDX-License-Identifier: Apache-2.0
"""When what a monitor knows is old, and that it is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from kmonitor.clients import (
    Deregistered,
    Disconnected,
    Fresh,
    Monitor,
    NodeChange,
    NodeProgress,
    NodeState,
    Notification,
    Progress,
    Reconnected,
    Stale,
    UsageError,
    connect,
    sync,
)
from kmonitor.clients import RegistrationState as State
from kmonitor.clients.freshness import Freshness
from kmonitor.clients.notifications import Registered
from tests.clients.conftest import Kmon
from tests.clients.fake_broker import FakeBroker, Session, node_change, progress
from tests.clients.test_watch import next_line

SOON = 0.2


def at(**times: int) -> Progress:
    return Progress(tuple(NodeProgress(node, 7, 100, time) for node, time in times.items()))


def change(state: NodeState, node: str = "web1") -> NodeChange:
    return NodeChange(node, state, 1, "", "", ())


def test_a_node_that_does_not_move_on() -> None:
    known = Freshness(3.0)
    assert known.progress(10, at(web1=1, web2=1)) == []
    assert known.progress(12, at(web1=2, web2=1)) == []
    assert known.progress(13, at(web1=3, web2=1)) == [Stale("web2", 3.0)]
    assert known.progress(14, at(web1=3, web2=1)) == []  # once
    assert known.progress(15, at(web1=4, web2=2)) == [Fresh("web2", 5.0)]
    assert known.progress(15.5, at(web1=4, web2=1)) == []  # its clock was set back: it moves


def test_silence() -> None:
    known = Freshness(3.0)
    assert known.silent(100) == []  # before the first word nothing is expected
    known.progress(101, at(web1=1))
    assert known.silent(103.9) == []
    assert known.silent(104) == [Stale(None, 3.0)]
    assert known.silent(105) == []
    # Over; and that the node did not move on meanwhile is not to be seen.
    assert known.progress(106, at(web1=1)) == [Fresh(None, 5.0)]
    assert known.progress(108.9, at(web1=1)) == []
    assert known.progress(109, at(web1=1)) == [Stale("web1", 3.0)]


def test_who_does_not_listen_is_told_nothing() -> None:
    known = Freshness(3.0)
    known.progress(1, at(web1=1))
    known.not_listening(50)
    assert known.silent(52.9) == []
    assert known.progress(52.9, at(web1=1)) == []
    assert known.progress(53, at(web1=1)) == [Stale("web1", 3.0)]


def test_what_the_broker_knows_itself() -> None:
    known = Freshness(3.0)
    known.progress(1, at(web1=1, web2=1, web3=1))
    known.node_changed(2, change(NodeState.UNREACHABLE))
    known.registered(2, Registered(1, 1, "web2", State.NODE_UNREACHABLE, None, 0, 0, 0, 0x40, ""))
    assert known.progress(9, at(web1=1, web2=1)) == []  # and nothing of web3 is ours now
    known.node_changed(10, change(NodeState.UP))
    known.registered(10, Registered(1, 1, "web2", State.ARMED, None, 7, 100, 0, 0x40, ""))
    assert known.progress(12, at(web1=1, web2=1, web3=1)) == []
    assert known.progress(13, at(web1=1, web2=2)) == [Stale("web1", 3.0)]
    known.node_changed(14, change(NodeState.GONE))
    assert known.progress(15, at(web2=3)) == []


def test_on_another_connection() -> None:
    known = Freshness(3.0)
    known.progress(1, at(web1=1))
    known.progress(4, at(web1=1))
    assert known.silent(7) == [Stale(None, 3.0)]
    known.connected()
    assert known.silent(50) == []
    assert known.progress(60, at(web1=1)) == [Fresh(None, 56)]
    assert known.progress(61, at(web1=2)) == [Fresh("web1", 60)]


async def beating(session: Session, time: int | None = None) -> None:
    """Heartbeats of web1, whose own time moves on unless it is given."""
    for beat in range(1, 10_000):
        session.send(progress(100 + beat, time=beat if time is None else time))
        await asyncio.sleep(SOON / 10)


async def others(monitor: Monitor) -> AsyncIterator[Notification]:
    """Without the heartbeats."""
    async for item in monitor:
        if not isinstance(item, (Progress, Registered)):
            yield item


@pytest.fixture
async def monitor(broker: FakeBroker) -> AsyncIterator[Monitor]:
    async with connect(broker.address, stale_after=SOON) as found:
        yield found


async def test_it_is_told_in_the_stream(broker: FakeBroker, monitor: Monitor) -> None:
    await monitor.register(node="web1", events="exit")
    session = await broker.session()
    told = others(monitor)
    beats = asyncio.create_task(beating(session))
    assert (await session.asked(1))[0].HasField("register")
    async for item in monitor:
        if isinstance(item, Progress) and item.nodes[0].time_unix_nano > 20:
            break  # twice as long as it would take
        assert not isinstance(item, Stale)
    beats.cancel()
    silent = await anext(told)
    assert isinstance(silent, Stale)
    assert (silent.node, SOON <= silent.seconds < 10) == (None, True)
    beats = asyncio.create_task(beating(session, time=5))
    fresh, stuck = await anext(told), await anext(told)
    assert isinstance(fresh, Fresh)
    assert isinstance(stuck, Stale)
    assert (fresh.node, stuck.node, fresh.seconds > silent.seconds) == (None, "web1", True)
    beats.cancel()
    session.send(progress(999, time=6))
    fresh = await anext(told)
    assert isinstance(fresh, Fresh)
    assert (fresh.node, monitor.complete_until) == ("web1", {"web1": 6})
    session.send(node_change(4))
    assert isinstance(await anext(told), NodeChange)
    assert monitor.complete_until == {}


async def test_it_is_over_only_with_a_heartbeat(broker: FakeBroker, monitor: Monitor) -> None:
    """A connection alone is none."""
    await monitor.register(events="exit")
    session = await broker.session()
    session.send(progress(100))
    told = others(monitor)
    assert isinstance(await anext(told), Stale)
    session.end()
    assert isinstance(await anext(told), Disconnected)
    assert isinstance(await anext(told), Reconnected)
    (await broker.session(1)).send(progress(101))
    assert isinstance(await anext(told), Fresh)


async def test_nobody_expects_anything(broker: FakeBroker, monitor: Monitor) -> None:
    """Nothing is registered: nothing is stale."""
    made = await monitor.register(events="exit")
    session = await broker.session()
    session.send(progress(100))
    await monitor.deregister(made)
    reading = asyncio.ensure_future(anext(others(monitor)))
    deregistered = await reading
    assert isinstance(deregistered, Deregistered)
    reading = asyncio.ensure_future(anext(others(monitor)))
    assert await asyncio.wait([reading], timeout=SOON * 3) == (set(), {reading})
    reading.cancel()


async def test_without_iteration_it_is_not_the_broker_who_is_silent(broker: FakeBroker) -> None:
    async with connect(broker.address, stale_after=SOON, queue_events=0) as monitor:
        await monitor.register(events="exit")
        (await broker.session()).send(progress(100))
        await asyncio.sleep(SOON * 3)
        assert monitor._stream._freshness is not None
        assert not any(isinstance(item, Stale) for item in monitor._stream._queue)


async def test_a_program_that_was_held_up_itself(broker: FakeBroker, monitor: Monitor) -> None:
    await monitor.register(events="exit")
    session = await broker.session()
    session.send(progress(100))
    while not isinstance(await anext(monitor), Progress):
        pass
    session.send(progress(101))
    time.sleep(SOON * 3)  # noqa: ASYNC251 - that is the point
    assert isinstance(await anext(monitor), Progress)


async def test_never(broker: FakeBroker) -> None:
    async with connect(broker.address, stale_after=None) as monitor:
        await monitor.register(events="exit")
        (await broker.session()).send(progress(100), progress(101))
        got = [await anext(monitor) for _ in range(3)]
        assert [type(item) for item in got] == [Registered, Progress, Progress]
    for wrong in (0, -1, float("inf"), float("nan")):
        with pytest.raises(UsageError, match="stale_after"):
            connect(broker.address, stale_after=wrong)


async def test_the_synchronous_face(broker: FakeBroker) -> None:
    def user() -> list[Notification]:
        with sync.connect(broker.address, stale_after=SOON) as monitor:
            monitor.register_all([{"node": "web1", "events": "exit"}])
            got = [monitor.next(timeout=10) for _ in range(3)]
            assert monitor.complete_until == {"web1": 1}
            return got

    using = asyncio.create_task(asyncio.to_thread(user))
    (await broker.session()).send(progress(100))
    assert [type(item) for item in await using] == [Registered, Progress, Stale]


async def test_kmon_watch_shows_it(broker: FakeBroker, kmon: Kmon) -> None:
    watching = await kmon("watch", "--json")
    session = await broker.session()
    session.send(progress(100))
    assert (await next_line(watching))["kind"] == "registered"
    stale = await next_line(watching)
    assert (stale["kind"], stale["node"], 3 <= stale["seconds"] < 20) == ("stale", None, True)
    session.send(progress(101))
    fresh = await next_line(watching)
    assert (fresh["kind"], fresh["node"], fresh["seconds"] > stale["seconds"]) == ("fresh", None, True)


async def test_kmon_wait_says_it(broker: FakeBroker, kmon: Kmon) -> None:
    broker.processes = {("web1", 5): 5000}
    waiting = await kmon("wait", "--node", "web1", "--pid", "5")
    session = await broker.session()
    session.send(progress(100))
    assert waiting.stderr is not None
    assert b"kmon: STALE: nothing was heard of the broker for 3." in await waiting.stderr.readline()
    session.send(progress(101))
    assert b"kmon: the broker is heard again after 3." in await waiting.stderr.readline()
