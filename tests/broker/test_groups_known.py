# SPDX-License-Identifier: Apache-2.0
"""Control groups within one another: a record names the nearest watched one, and the broker knows which lie above it, for as long as a
record that names it may come, or may be read."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kmonitor.broker.broker import Broker
from kmonitor.broker.log import EventLog
from kmonitor.broker.log.memory import MemoryLog
from kmonitor.broker.log.sqlite import SqliteLog
from kmonitor.broker.router import LATE_NS
from kmonitor.v1 import monitor_pb2
from kmonitor.wire.record import F_MATCH_CGROUP
from tests.broker.direct import DirectAgent, DirectMonitor, of_group, turn
from tests.broker.records import EXIT, Rec, rec

IDS = {"/a": [50], "/a/b": [51, 50]}
TICK_S = 0.01


def ended(pid: int, group: int) -> Rec:
    return rec(EXIT, pid, flags=F_MATCH_CGROUP, match_cgroup_id=group, boottime_ns=1)


def open_broker(log: EventLog) -> Broker:
    return Broker(log, lease=1000, progress_interval=TICK_S)


def pids(monitor: DirectMonitor) -> list[int]:
    return [pid for _, pid in monitor.events]


@pytest.mark.parametrize("inner_comes_back", [False, True])
async def test_what_happened_while_no_broker_ran(tmp_path: Path, *, inner_comes_back: bool) -> None:
    """The agent's ring holds ends within the inner group. It sends them before it answers what the new broker asks for."""
    log = SqliteLog(tmp_path / "log")
    broker = open_broker(log)
    agent = DirectAgent(broker, dict(IDS))
    agent.connect()
    outer, inner = DirectMonitor(broker, [of_group(EXIT, "/a")]), DirectMonitor(broker, [of_group(EXIT, "/a/b")])
    await agent.serve()
    agent.record(ended(100, 51))
    agent.send()
    await log.flush()
    assert (pids(outer), pids(inner)) == ([100], [100])
    cursors = [monitor.cursor() for monitor in (outer, inner)]
    await turn()
    agent.answer()
    agent.disconnect()
    agent.record(ended(200, 51))
    await log.flush()
    broker.stop()
    await log.close()

    log = SqliteLog(tmp_path / "log")
    broker = agent.broker = open_broker(log)
    outer = DirectMonitor(broker, [of_group(EXIT, "/a")], cursors[0])
    if inner_comes_back:
        inner = DirectMonitor(broker, [of_group(EXIT, "/a/b")], cursors[1])
    await turn()
    agent.connect()
    agent.send()
    agent.answer()
    agent.record(ended(300, 51))
    await agent.serve()
    await outer.until(2)
    assert pids(outer) == [200, 300]
    assert outer.gaps == []
    if inner_comes_back:
        await inner.until(2)
        assert pids(inner) == [200, 300]
    broker.stop()
    await log.close()


async def test_what_is_read_from_the_log_when_nobody_watches_the_inner_one_any_more() -> None:
    """It is known for as long as somebody above it may have to read of it."""
    log = MemoryLog(1 << 20)
    broker = open_broker(log)
    agent = DirectAgent(broker, dict(IDS))
    agent.connect()
    outer, inner = DirectMonitor(broker, [of_group(EXIT, "/a")]), DirectMonitor(broker, [of_group(EXIT, "/a/b")])
    await agent.serve()
    cursor = monitor_pb2.Cursor(stream_id=outer.session.stream_id, log_id=log.log_id)
    broker.close_session(outer.session)
    agent.record(ended(100, 51))
    agent.send()
    broker.close_session(inner.session, for_good=True)
    await agent.serve()
    agent.beat(1 + LATE_NS)
    await _ticks(5)
    outer = DirectMonitor(broker, [of_group(EXIT, "/a")], cursor)
    assert pids(outer) == [100]
    broker.stop()


async def _ticks(count: int) -> None:
    await asyncio.sleep(count * TICK_S)


async def _until_known(broker: Broker, most: int) -> None:
    async with asyncio.timeout(20):
        while len(broker.router.groups_of("a").above) > most:  # noqa: ASYNC110 -- the broker has no event for it
            await asyncio.sleep(TICK_S)


async def test_a_unit_that_is_started_again_and_again() -> None:
    """Each time it has another id: the ids of before are forgotten, at once if nobody watches anything above it, and else when the log
    has nothing of them any more."""
    log = MemoryLog(1 << 20)
    broker = open_broker(log)
    agent = DirectAgent(broker, {"/a": [50], "/a/u": [1000, 50]})
    agent.connect()
    unit = DirectMonitor(broker, [of_group(EXIT, "/a/u")])
    await agent.serve()

    async def restart(number: int) -> None:
        agent.cgroups["/a/u"] = [1000 + number, 50]
        agent.say(groups_changed={"groups": [{"cgroup": "/a/u"}]})
        await agent.serve()
        agent.record(ended(number, 1000 + number))
        await agent.serve()
        agent.beat(1 + LATE_NS)

    for number in range(1, 10):
        await restart(number)
    await _until_known(broker, 1)
    outer = DirectMonitor(broker, [of_group(EXIT, "/a")])
    await agent.serve()
    for number in range(10, 60):
        await restart(number)
    assert pids(outer) == list(range(10, 60))
    assert pids(unit) == list(range(1, 60))
    await _ticks(3)
    assert len(broker.router.groups_of("a").above) > 50, "records that name them are in the log, or could still come"
    log.max_bytes = 20_000
    for number in range(60, 90):
        await _ticks(2)
        await restart(number)
        agent.record(ended(number, 50))
        agent.send()
        if len(broker.router.groups_of("a").above) < 25:
            break
    assert len(broker.router.groups_of("a").above) < 50
    broker.close_session(outer.session, for_good=True)
    broker.close_session(unit.session, for_good=True)
    await _until_known(broker, 0)
    assert list(broker.router) == []
    broker.stop()


async def test_another_boot_has_other_ids() -> None:
    """What a number means in one boot says nothing of another."""
    log = MemoryLog(1 << 20)
    broker = open_broker(log)
    agent = DirectAgent(broker, dict(IDS))
    agent.connect()
    outer, inner = DirectMonitor(broker, [of_group(EXIT, "/a")]), DirectMonitor(broker, [of_group(EXIT, "/a/b")])
    await agent.serve()
    cursor = monitor_pb2.Cursor(stream_id=outer.session.stream_id, log_id=log.log_id)
    broker.close_session(outer.session)
    agent.record(ended(100, 51))
    await agent.serve()
    agent.disconnect()
    again = DirectAgent(broker, {"/a": [60], "/a/b": [51, 60]}, epoch=8)
    again.connect(boot_id="boot-2")
    await again.serve()
    await _ticks(3)
    again.record(ended(200, 51))
    await again.serve()
    outer = DirectMonitor(broker, [of_group(EXIT, "/a")], cursor)
    assert pids(outer) == [100, 200]
    assert pids(inner) == [100, 200]
    broker.stop()
