# SPDX-License-Identifier: Apache-2.0
"""What the broker does every second: a fault in it stops nothing else, and what is of no use any more goes."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kmonitor.broker.broker import Broker
from kmonitor.broker.log import EventLog
from kmonitor.broker.log.memory import MemoryLog
from kmonitor.broker.log.sqlite import SqliteLog
from kmonitor.broker.matching import Span
from kmonitor.broker.router import LATE_NS
from kmonitor.wire.record import F_MATCH_NODE, F_MATCH_PROCESS
from tests.broker.direct import DirectAgent, DirectMonitor, of_process
from tests.broker.records import EXEC, EXIT, rec

TICK_S = 0.01


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not what():  # noqa: ASYNC110 -- the broker has no event for it
            await asyncio.sleep(TICK_S)


def heartbeats(monitor: DirectMonitor) -> int:
    monitor.take()
    return sum(item.WhichOneof("kind") == "progress" for item in monitor.told)


async def test_a_fault_stops_no_heartbeat(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the others' nor, once it is over, that of the monitor that it is about. It is logged once."""
    broker = Broker(MemoryLog(), lease=1000, progress_interval=TICK_S)
    agent = DirectAgent(broker)
    agent.connect()
    faulty, well = DirectMonitor(broker, [of_process(EXIT, 100)]), DirectMonitor(broker, [of_process(EXIT, 100)])
    await agent.serve()

    def fail(nodes: Any) -> None:
        raise ValueError("nobody thought of that")

    with monkeypatch.context() as patch:
        patch.setattr(faulty.session, "progress", fail)
        before = heartbeats(well)
        await until(lambda: heartbeats(well) > before + 3)
    before = heartbeats(faulty)
    await until(lambda: heartbeats(faulty) > before + 3)
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [record.exc_info is not None for record in errors] == [True]
    broker.stop()


@pytest.mark.parametrize("on_disk", [False, True])
async def test_nothing_is_left_of_nodes_that_were_removed(tmp_path: Path, *, on_disk: bool) -> None:
    """Neither in memory nor in a log that is opened anew, once that has dropped what it had of them."""
    path = tmp_path / "log"
    log: EventLog = SqliteLog(path, max_bytes=100_000) if on_disk else MemoryLog(20_000)
    broker = Broker(log, lease=1000, progress_interval=TICK_S)
    for number in range(20):
        agent = DirectAgent(broker)
        agent.connect(node=f"n{number}")
        monitor = DirectMonitor(broker, [of_process(EXIT | EXEC, 100, node=f"n{number}")])
        await agent.serve()
        agent.record(rec(EXIT, 100, flags=F_MATCH_PROCESS))
        agent.send()
        assert monitor.events == [(EXIT, 100)]
        agent.disconnect()
        broker.close_session(monitor.session, for_good=True)
        broker.remove_node(f"n{number}")
    await until(lambda: list(broker.router) == [])
    agent = DirectAgent(broker)
    agent.connect()
    for _ in range(200):
        agent.record(*[rec(EXEC, 7, flags=F_MATCH_NODE)] * 20)
        agent.send()
    await until(lambda: log.nodes() == ["a"])
    broker.stop()
    await log.close()
    if on_disk:
        log = SqliteLog(path)
        assert log.nodes() == ["a"]
        await log.close()


async def test_no_span_is_left_of_monitors_and_processes_that_are_gone() -> None:
    """However many there were."""
    broker = Broker(MemoryLog(20_000), lease=1000, progress_interval=TICK_S)
    agent = DirectAgent(broker)
    agent.connect()
    stays = DirectMonitor(broker, [of_process(EXIT, 1)])
    for pid in range(2, 50):
        monitor = DirectMonitor(broker, [of_process(EXIT, pid)])
        await agent.serve()
        agent.record(rec(EXIT, pid, flags=F_MATCH_PROCESS))
        agent.send()
        assert monitor.events == [(EXIT, pid)]
        broker.close_session(monitor.session, for_good=True)
    del monitor
    agent.beat(1 << 40)
    assert LATE_NS < 1 << 40
    gc.collect()
    (span,) = [each for each in gc.get_objects() if isinstance(each, Span) and each.owner in broker.sessions]
    assert span.process == (1, 10)
    assert sum(isinstance(each, Span) for each in gc.get_objects()) == 1
    assert stays.events == []
    broker.stop()
