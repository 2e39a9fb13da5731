# SPDX-License-Identifier: Apache-2.0
"""What retention has taken of several rings of a node is told ring by ring: a cursor does not go back."""

from __future__ import annotations

from kmonitor.broker.broker import Broker
from kmonitor.broker.log.memory import MemoryLog
from kmonitor.v1 import monitor_pb2
from kmonitor.wire.record import F_MATCH_NODE
from tests.broker.direct import DirectAgent, DirectMonitor
from tests.broker.records import EXIT, rec


async def test_a_loss_of_the_ring_before() -> None:
    log = MemoryLog(20_000)
    broker = Broker(log, lease=1000)
    agent = DirectAgent(broker)
    agent.connect()
    everything = monitor_pb2.Registration(event_mask=EXIT)
    monitor = DirectMonitor(broker, [everything])
    await agent.serve()
    agent.record(rec(EXIT, 1, flags=F_MATCH_NODE))
    await agent.serve()
    assert monitor.events == [(EXIT, 1)]
    cursor = monitor.cursor()
    broker.close_session(monitor.session)
    agent.record(rec(EXIT, 2, flags=F_MATCH_NODE))
    agent.send()
    agent.lose(EXIT, 3, watched=False)
    agent.disconnect()
    agent = DirectAgent(broker, epoch=8)
    agent.connect()
    await agent.serve()
    for pid in range(100):
        agent.record(rec(EXIT, pid, flags=F_MATCH_NODE))
        await agent.serve()
    assert log.read(0, 1)[0].epoch == 8
    monitor = DirectMonitor(broker, [everything], cursor)
    await agent.serve()
    told = [gap.epoch for gap in monitor.gaps]
    assert told == sorted(told)
    assert told.count(7) >= 2, "for what it missed of that ring, and for what found no room there"
    assert 8 in told
    broker.stop()
