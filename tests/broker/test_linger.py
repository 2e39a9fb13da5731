# SPDX-License-Identifier: Apache-2.0
"""For how long a session outlives its stream: not by the clock alone, since whoever it waits for may have come, and wait for his turn."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest

from kmonitor.broker import resume
from kmonitor.broker.broker import Broker
from kmonitor.broker.errors import RefusedError
from kmonitor.broker.idle import IdleLoop
from kmonitor.broker.log.memory import MemoryLog
from kmonitor.v1 import monitor_pb2
from kmonitor.wire.record import F_MATCH_PROCESS
from tests.broker.direct import DirectAgent, DirectMonitor, of_process
from tests.broker.records import EXEC, EXIT, rec
from tests.broker.test_server import registration, world

LINGER_S = 0.1
WANTED = [of_process(EXIT | EXEC, 100), of_process(EXIT | EXEC, 200)]


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not what():  # noqa: ASYNC110 -- the broker has no event for it
            await asyncio.sleep(LINGER_S / 10)


async def two_away(broker: Broker, agent: DirectAgent) -> tuple[DirectMonitor, DirectMonitor]:
    """Two monitors whose streams have broken, after which something has happened."""
    monitors = DirectMonitor(broker, WANTED), DirectMonitor(broker, WANTED)
    await agent.serve()
    agent.record(rec(EXEC, 100, flags=F_MATCH_PROCESS), rec(EXEC, 200, flags=F_MATCH_PROCESS))
    await agent.serve()
    assert [monitor.events for monitor in monitors] == [[(EXEC, 100), (EXEC, 200)]] * 2
    for monitor in monitors:
        broker.close_session(monitor.session)
    agent.record(rec(EXEC, 100, flags=F_MATCH_PROCESS), rec(EXEC, 200, flags=F_MATCH_PROCESS))
    await agent.serve()
    return monitors


@pytest.mark.parametrize("waits", ["for its first turn", "for its second turn"])
async def test_who_has_come_is_waited_for(waits: str) -> None:
    """However long it takes until all that it brings is dealt with; who has not come is waited for no longer than he has asked for."""
    broker = Broker(MemoryLog(), lease=1000, linger=LINGER_S)
    agent = DirectAgent(broker)
    agent.connect()
    comes, stays = await two_away(broker, agent)
    cursor = comes.cursor()
    back = DirectMonitor(broker, [])
    await broker.locate(back.session, cursor)

    def begin() -> None:
        broker.resume(back.session, cursor, len(WANTED))
        broker.register(back.session, 1, WANTED[0])
        broker.resumed(back.session)

    if waits == "for its second turn":
        begin()
    await until(lambda: stays.session not in broker.sessions)
    await asyncio.sleep(2 * LINGER_S)  # and more than that
    if waits == "for its first turn":
        begin()
    broker.register(back.session, 2, WANTED[1])
    broker.resumed(back.session)
    await agent.serve()
    assert (back.events, back.gaps) == ([(EXEC, 100), (EXEC, 200)], [])
    assert comes.session not in broker.sessions
    broker.stop()


@pytest.mark.parametrize("how", ["breaks", "is refused"])
async def test_who_has_come_and_gone_is_waited_for_once_more(how: str) -> None:
    broker = Broker(MemoryLog(), lease=1000, linger=LINGER_S)
    agent = DirectAgent(broker)
    agent.connect()
    comes, stays = await two_away(broker, agent)
    back = DirectMonitor(broker, [])
    await broker.locate(back.session, comes.cursor())
    await until(lambda: stays.session not in broker.sessions)
    if how == "breaks":
        broker.close_session(back.session)
    else:
        cursor = comes.cursor()
        cursor.positions[0].position = 1 << 40
        with pytest.raises(RefusedError):
            broker.resume(back.session, cursor, len(WANTED))
    assert comes.session in broker.sessions
    await until(lambda: comes.session not in broker.sessions)
    broker.stop()


async def in_a_busy_loop(*, ends: bool) -> None:
    """Something is always there, as where hundreds of streams wait: until it `ends`, or for ever."""
    broker = Broker(MemoryLog(), lease=1000, linger=LINGER_S)
    agent = DirectAgent(broker)
    agent.connect()
    one, _ = await two_away(broker, agent)
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"x")
        loop.add_reader(ours, lambda: None)  # it is never read
        if ends:
            clock = loop.time
            enough = clock() + 6 * LINGER_S
            await until(lambda: clock() > enough)
            assert one.session in broker.sessions
            loop.remove_reader(ours)
        await until(lambda: one.session not in broker.sessions)
        loop.remove_reader(ours)
    broker.stop()


@pytest.mark.parametrize("ends", [True, False])
def test_a_busy_loop(monkeypatch: pytest.MonkeyPatch, *, ends: bool) -> None:
    monkeypatch.setattr(resume, "LINGERS_MOST", 1000 if ends else 3)
    with asyncio.Runner(loop_factory=IdleLoop) as runner:
        runner.run(in_a_busy_loop(ends=ends))


async def test_no_heartbeat_overtakes_what_the_stream_goes_on_with() -> None:
    """It would say that all is told, in another stream's name: whoever loses the stream then has lost his place."""
    async with world(progress_interval=0.01) as here:
        early, late = here.monitor.Watch(), here.monitor.Watch()
        first = monitor_pb2.WatchRequest(request_id=1, register=monitor_pb2.RegisterRequest(registration=registration(EXIT)))
        async with asyncio.timeout(20):
            await until(lambda: not early.done() and len(here.broker.sessions) == 2)
            await late.write(first)
            for _ in range(5):
                while (await late.read()).WhichOneof("kind") != "progress":
                    pass
            await early.write(first)
            assert (await early.read()).WhichOneof("kind") == "registered"
            while (await early.read()).WhichOneof("kind") != "progress":
                pass
        for call in (early, late):
            call.cancel()
