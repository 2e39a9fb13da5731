# SPDX-License-Identifier: Apache-2.0
"""A gap that says that nobody kept a monitor's place has no number in the log: one that was sent and not taken is told again."""

from __future__ import annotations

from pathlib import Path

import pytest

from kmonitor.broker.broker import Broker
from kmonitor.broker.log import EventLog
from kmonitor.broker.log.memory import MemoryLog
from kmonitor.broker.log.sqlite import SqliteLog
from kmonitor.v1 import monitor_pb2
from kmonitor.wire.record import F_MATCH_NODE, SLOT_SIZE
from tests.broker.direct import DirectAgent, DirectMonitor, turn
from tests.broker.records import EXIT, rec

LOG = monitor_pb2.GAP_REASON_LOG


def everything() -> monitor_pb2.Registration:
    return monitor_pb2.Registration(event_mask=EXIT)


def positions(monitor: DirectMonitor) -> list[tuple[int, int, int]]:
    return [(gap.epoch, gap.from_position, gap.to_position) for gap in monitor.gaps if gap.reason == LOG]


@pytest.mark.parametrize("epoch", [7, 8])
@pytest.mark.parametrize("restarts", [False, True])
async def test_sent_and_not_taken(tmp_path: Path, epoch: int, *, restarts: bool) -> None:
    """The broker has nothing of the stream that the cursor is of: the ring's epoch is that one, or a later one."""
    log: EventLog = SqliteLog(tmp_path / "log") if restarts else MemoryLog()
    broker = Broker(log, lease=1000)
    agent = DirectAgent(broker, epoch=epoch, position=10 * SLOT_SIZE)
    agent.connect(position=agent.position)
    cursor = monitor_pb2.Cursor(stream_id=77)
    cursor.positions.add(node="a", epoch=7, position=2 * SLOT_SIZE)
    first = DirectMonitor(broker, [everything()], cursor)
    await agent.serve()
    # Somebody else has taken it, and the monitor has not: its stream broke.
    told = [(7, 2 * SLOT_SIZE + 1, 10 * SLOT_SIZE)] if epoch == 7 else [(8, 0, 10 * SLOT_SIZE)]
    assert positions(first) == told
    agent.record(rec(EXIT, 1, flags=F_MATCH_NODE))
    await agent.serve()
    cursor.stream_id = first.session.stream_id
    broker.close_session(first.session)
    if restarts:
        await log.flush()
        broker.stop()
        await log.close()
        log = SqliteLog(tmp_path / "log")
        broker = agent.broker = Broker(log, lease=1000)
    second = DirectMonitor(broker, [everything()], cursor)
    await turn()
    await second.until(1)
    assert positions(second) == told
    assert [item.WhichOneof("kind") for item in second.told if item.WhichOneof("kind") in {"gap", "events"}] == ["gap", "events"]
    # That one has taken it.
    cursor.stream_id = second.session.stream_id
    del cursor.positions[:]
    cursor.positions.add(node="a", epoch=epoch, position=10 * SLOT_SIZE)
    broker.close_session(second.session)
    third = DirectMonitor(broker, [everything()], cursor)
    await turn()
    assert positions(third) == []
    assert third.events == []
    broker.stop()
    await log.close()
