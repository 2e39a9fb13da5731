# SPDX-License-Identifier: Apache-2.0
"""A monitor that comes back, whose own place is gone, takes up what somebody else has registered: only as far as that is its own."""

from __future__ import annotations

import pytest

from kmonitor.broker.broker import Broker
from kmonitor.broker.log.memory import MemoryLog
from kmonitor.v1 import monitor_pb2
from kmonitor.wire.record import F_MATCH_NODE, F_MATCH_PROCESS, SLOT_SIZE
from tests.broker.direct import ARMED, RUNNING, DirectAgent, DirectMonitor, of_process
from tests.broker.records import EXIT, FORK, Rec, rec

LOG = monitor_pb2.GAP_REASON_LOG


def everything(mask: int) -> monitor_pb2.Registration:
    return monitor_pb2.Registration(event_mask=mask)


def of_node(kind: int, pid: int) -> Rec:
    return rec(kind, pid, flags=F_MATCH_NODE)


@pytest.mark.parametrize("later", [False, True])
async def test_what_they_had_not_asked_for_is_a_gap(*, later: bool) -> None:
    """They want ends alone, or wanted forks only `later` than the monitor had gone."""
    broker = Broker(MemoryLog(), lease=1000)
    agent = DirectAgent(broker)
    agent.connect()
    mine, theirs = DirectMonitor(broker, [everything(EXIT | FORK)]), DirectMonitor(broker, [everything(EXIT)])
    await agent.serve()
    agent.record(of_node(EXIT, 1))
    await agent.serve()
    assert mine.events == [(EXIT, 1)]
    cursor = monitor_pb2.Cursor()
    cursor.positions.add(node="a", epoch=7, position=0)
    broker.close_session(mine.session, for_good=True)
    agent.record(of_node(FORK, 2), of_node(EXIT, 2))
    await agent.serve()
    if later:
        broker.register(theirs.session, 2, everything(FORK))
        await agent.serve()
    mine = DirectMonitor(broker, [everything(EXIT | FORK)], cursor)
    await agent.serve()
    agent.record(of_node(FORK, 3), of_node(EXIT, 3))
    await agent.serve()
    assert mine.events == [(EXIT, 2), (FORK, 3), (EXIT, 3)]
    assert [(gap.reason, gap.from_position, gap.to_position) for gap in mine.gaps] == [(LOG, 1, 3 * SLOT_SIZE)]
    assert theirs.gaps == []
    broker.stop()


async def test_a_pid_that_was_somebody_elses() -> None:
    """They registered a process that has ended; the monitor means the one that has its pid now, and was never told which that is."""
    broker = Broker(MemoryLog(), lease=1000)
    agent = DirectAgent(broker)
    agent.connect()
    theirs = DirectMonitor(broker, [of_process(EXIT, 100)])
    await agent.serve()
    agent.record(rec(EXIT, 100, flags=F_MATCH_PROCESS))
    await agent.serve()
    assert theirs.events == [(EXIT, 100)]
    mine = DirectMonitor(broker, [of_process(EXIT, 100)], monitor_pb2.Cursor(stream_id=12345))
    await agent.serve()
    assert (mine.events, mine.states) == ([], [RUNNING])
    broker.stop()


async def test_what_the_cursor_is_past_is_not_promised() -> None:
    """They have registered before; who comes back is told from where on events come to it, and not from where on they came to them."""
    broker = Broker(MemoryLog(), lease=1000)
    agent = DirectAgent(broker)
    agent.connect()
    DirectMonitor(broker, [everything(EXIT)])
    await agent.serve()
    agent.record(of_node(EXIT, 1), of_node(EXIT, 2))
    await agent.serve()
    cursor = monitor_pb2.Cursor()
    cursor.positions.add(node="a", epoch=7, position=0)
    mine = DirectMonitor(broker, [everything(EXIT)], cursor)
    await agent.serve()
    assert mine.events == [(EXIT, 2)]
    [answer] = [item.registered for item in mine.told if item.WhichOneof("kind") == "registered"]
    assert (answer.state, answer.position) == (ARMED, SLOT_SIZE)
    broker.stop()
