# SPDX-License-Identifier: Apache-2.0
"""A cursor in a ring that the log does not know: the broker crashed after it had told of that, and before it was on its disk."""

from __future__ import annotations

from kmonitor.broker.broker import Broker
from kmonitor.broker.log.memory import MemoryLog
from kmonitor.v1 import monitor_pb2
from kmonitor.wire.record import F_MATCH_NODE, SLOT_SIZE
from tests.broker.direct import DirectAgent, DirectMonitor
from tests.broker.records import EXIT, rec


async def test_what_it_had_passed_before_does_not_come_again() -> None:
    """The log has the ring of before, all of which the monitor has taken, as its cursor's number says."""
    log = MemoryLog()
    broker = Broker(log, lease=1000)
    agent = DirectAgent(broker)
    agent.connect()
    everything = monitor_pb2.Registration(event_mask=EXIT)
    stays = DirectMonitor(broker, [everything])
    await agent.serve()
    for pid in (1, 2):
        agent.record(rec(EXIT, pid, flags=F_MATCH_NODE))
        await agent.serve()
    assert stays.events == [(EXIT, 1), (EXIT, 2)]
    # What comes from here on it was told by a broker that has crashed: position 0 of ring 8.
    cursor = monitor_pb2.Cursor(stream_id=stays.session.stream_id, log_id=log.log_id, number=log.end)
    cursor.positions.add(node="a", epoch=8, position=0)
    broker.close_session(stays.session)
    agent.disconnect()
    again = DirectMonitor(broker, [everything], cursor)
    ring = DirectAgent(broker, epoch=8)
    for pid in (3, 4):
        ring.record(rec(EXIT, pid, flags=F_MATCH_NODE))
    ring.connect()
    await ring.serve()
    ring.record(rec(EXIT, 5, flags=F_MATCH_NODE))
    await ring.serve()
    assert again.events == [(EXIT, 5)]
    # Of what had not been answered yet it is said that it may be missing: the broker that had it asked for is no more.
    assert [(gap.epoch, gap.from_position, gap.to_position) for gap in again.gaps if gap.reason == monitor_pb2.GAP_REASON_LOG] == [
        (8, 1, 2 * SLOT_SIZE)
    ]
    broker.stop()
