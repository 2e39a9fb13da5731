# SPDX-License-Identifier: Apache-2.0
"""What the machine of test_resume_model.py has found, each as the shortest story that shows it."""

from __future__ import annotations

from kmonitor.broker.log.memory import MemoryLog
from kmonitor.v1 import monitor_pb2
from kmonitor.wire.record import F_MATCH_CGROUP, F_MATCH_NODE, SLOT_SIZE
from tests.broker.records import EXEC, EXIT, rec
from tests.broker.test_resume import Here, Taker, start
from tests.broker.test_server import registration

LOG = monitor_pb2.GAP_REASON_LOG
RING = monitor_pb2.GAP_REASON_RING


async def test_what_retention_took_is_told_once_to_a_stream_with_several_registrations() -> None:
    """And not once for each of them."""
    here = await Here.start(MemoryLog(40_000), None, "")
    try:
        agent, taker = await start(here, registration(0x60), registration(0x60, cgroup="/a"))
        await agent.send([rec(EXIT, 1)])
        await taker.until_events(1)
        await taker.leave()
        await agent.lose(3)
        for pid in range(200):
            await agent.send([rec(EXIT, pid), rec(EXEC, pid, flags=F_MATCH_NODE | F_MATCH_CGROUP, match_cgroup_id=50)])
        await agent.acknowledged()
        await taker.open()
        await taker.until("registered")
        assert [gap.reason for gap in taker.gaps] == [RING, LOG], "in the order in which they came"
        dropped = sum(each.count for each in taker.gaps[1].lost)
        assert dropped + len(taker.events) - 1 == 400
    finally:
        await here.stop()


async def test_an_answer_that_overtakes_records_does_not_move_the_cursor_past_them() -> None:
    """Of a stream that comes back: the registration holds from before these records on, and the answer must say so."""
    here = await Here.start(MemoryLog(64 << 20), None, "")
    try:
        agent, taker = await start(here, registration(0x40))
        await taker.leave()
        records, agent.position = [rec(EXIT, 1)], SLOT_SIZE  # in the ring, and not sent yet
        await taker.open()
        assert (await taker.until("registered")).position == 0
        await taker.leave()
        await taker.open()
        await taker.until("registered")
        await agent.send(records, position=0)
        await taker.until_events(1)
        assert not taker.gaps
    finally:
        await here.stop()


async def test_absence_is_told_to_a_stream_that_comes_back_twice_before_its_node_does() -> None:
    """Nobody has kept its place; when that can be told the stream is another one already."""
    here = await Here.start(MemoryLog(64 << 20), None, "")
    try:
        agent, taker = await start(here, registration(0x40))
        await agent.send([rec(EXIT, 1)])
        await taker.until_events(1)
        await taker.leave()
        for session in list(here.broker.lingering):
            here.broker.lingering.drop(session)
        await agent.send([rec(EXIT, 2)])
        await agent.acknowledged()
        await agent.leave()
        for _ in range(2):
            await taker.open()
            await taker.until("registered")
            await taker.leave()
        await taker.open()
        await taker.until("registered")
        await agent.serve()
        gap = await taker.until("gap")
        assert (gap.reason, gap.from_position, gap.to_position) == (LOG, 1, agent.position)
    finally:
        await here.stop()


async def test_absence_is_told_where_another_stream_with_the_same_registration_is_not_armed_either() -> None:
    """A cursor that names no stream: what it goes on with may have nothing to give."""
    here = await Here.start(MemoryLog(64 << 20), None, "")
    try:
        agent, taker = await start(here, registration(0x40), names_stream=False)
        await agent.send([rec(EXIT, 1)])
        await taker.until_events(1)
        await taker.leave()
        for session in list(here.broker.lingering):
            here.broker.lingering.drop(session)
        await agent.send([rec(EXIT, 2)])
        await agent.acknowledged()
        await agent.leave()
        other = Taker(here, [registration(0x40)])
        await other.open()
        await other.until("registered")
        await taker.open()
        await taker.until("registered")
        await agent.serve()
        gap = await taker.until("gap")
        assert (gap.reason, gap.from_position, gap.to_position) == (LOG, 1, agent.position)
        assert not other.gaps
    finally:
        await here.stop()


async def test_absence_is_told_of_a_node_that_comes_later_than_the_monitor_to_a_new_broker() -> None:
    """Its log was in memory: the monitor's cursor knows a node that the broker does not know yet."""
    here = await Here.start(MemoryLog(64 << 20), None, "")
    try:
        agent, taker = await start(here, registration(0x40))
        await agent.send([rec(EXIT, 1)])
        await taker.until_events(1)
        await taker.leave()
        await agent.send([rec(EXIT, 2)])
        await agent.acknowledged()
        await here.stop()
        here = await Here.start(MemoryLog(64 << 20), None, "")
        taker.here, agent.channel = here, here.channel
        await taker.open()
        await taker.until("registered")
        await agent.serve()
        gap = await taker.until("gap")
        assert (gap.reason, gap.from_position, gap.to_position) == (LOG, 1, agent.position)
    finally:
        await here.stop()


async def test_absence_is_told_where_positions_have_not_moved() -> None:
    """They do not when nobody has asked for anything: which does not mean that nothing happened."""
    here = await Here.start(MemoryLog(64 << 20), None, "")
    try:
        agent, taker = await start(here, registration(0x40))
        await agent.send([rec(EXIT, 1)])
        await taker.until_events(1)
        await agent.acknowledged()
        for node in here.broker.nodes:
            node.complete = node.position, 1
        here.broker._tick()
        await taker.until("progress")
        await taker.leave()
        for session in list(here.broker.lingering):
            here.broker.lingering.drop(session)
        await agent.wait(lambda: not agent.mask)
        await taker.open()
        gap = await taker.until("gap")
        assert (gap.reason, gap.from_position, gap.to_position) == (LOG, SLOT_SIZE, SLOT_SIZE)
    finally:
        await here.stop()
