# SPDX-License-Identifier: Apache-2.0
"""Agents that say what cannot be: it is their own loss, not that of monitors, of the log, or of the next agent of their node."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from kmonitor.broker.hello import POSITION_MOST
from kmonitor.broker.log import Entry
from kmonitor.broker.log.memory import MemoryLog
from kmonitor.broker.log.sqlite import SqliteLog
from kmonitor.broker.sessions import Session
from kmonitor.v1 import agent_pb2, monitor_pb2
from kmonitor.wire.record import SLOT_SIZE
from tests.broker.records import EXIT, rec
from tests.broker.test_resume import Here, Served, Taker, slots, start
from tests.broker.test_resume_seams import lost, tick
from tests.broker.test_server import Agent, registration

pytestmark = pytest.mark.timeout(15)

UNKNOWN = 65
"""No event type: the bits of two."""
MOST = (1 << 64) - 1


@pytest.fixture
async def here() -> AsyncIterator[Here]:
    made = await Here.start(MemoryLog(64 << 20), None, "")
    yield made
    await made.stop()


def losses(*counts: tuple[int, int, bool]) -> agent_pb2.Lost:
    """(type, total, whether of watched processes)."""
    message = agent_pb2.Lost()
    for kind, total, watched in counts:
        message.counts.add(type=kind, total=total, watched=watched)
    return message


async def tell(agent: Served, message: agent_pb2.Lost) -> None:
    await agent.call.write(agent_pb2.AgentMessage(lost=message))


async def test_losses_of_no_known_type(here: Here) -> None:
    """They are passed over, and those beside them are told."""
    agent, taker = await start(here, registration(0x40))
    await tell(agent, losses((UNKNOWN, 5, False), (EXIT, 3, False)))
    await taker.until("gap")
    await agent.send([rec(EXIT, 1)])
    await taker.until_events(1)
    assert lost(taker) == {EXIT: 3}


async def test_losses_of_no_known_type_while_the_monitor_is_away(here: Here) -> None:
    """They are not in the log, where every stream that comes back would stumble over them."""
    agent, taker = await start(here, registration(0x40))
    await taker.leave()
    await tell(agent, losses((UNKNOWN, 5, False), (EXIT, 3, False)))
    await agent.send([rec(EXIT, 1)])
    await agent.acknowledged()
    await taker.open()
    await taker.until("registered")
    assert lost(taker) == {EXIT: 3}
    assert slots(taker) == [0]


async def test_more_losses_than_a_gap_can_say(here: Here) -> None:
    """Two totals that are each the most that can be written."""
    agent, taker = await start(here, registration(0x40))
    await tell(agent, losses((EXIT, MOST, False), (EXIT, MOST, True)))
    await taker.until("gap")
    await agent.send([rec(EXIT, 1)])
    await taker.until_events(1)
    assert lost(taker) == {EXIT: MOST}


async def test_a_hello_with_losses_of_no_known_type(here: Here) -> None:
    """It comes back with more lost than before."""
    agent, taker = await start(here, registration(0x40))
    await agent.leave()
    await taker.until("node")
    await Agent(here.channel).connect(lost=losses((UNKNOWN, 5, False), (EXIT, 3, False)))
    await taker.until("gap")
    assert lost(taker) == {EXIT: 3}


@pytest.mark.parametrize("draining", [False, True])
async def test_a_hello_that_nobody_thought_of(here: Here, monkeypatch: pytest.MonkeyPatch, draining: bool) -> None:
    """Whatever fails in taking it: the next agent of the node is taken."""
    agent, taker = await start(here, registration(0x40))
    await agent.leave()
    await taker.until("node")

    def fail(_: object) -> None:
        raise RuntimeError

    with monkeypatch.context() as broken:
        broken.setattr(here.broker, "remember_node", fail)
        with pytest.raises(grpc.aio.AioRpcError):
            await Agent(here.channel).connect(draining=draining)
    await agent.serve()
    await agent.send([rec(EXIT, 1)])
    await taker.until_events(1)


async def test_positions_at_their_end(here: Here) -> None:
    """A ring that is as far as one can be; at a reboot the end of a watched process has a position all the same. The next boot is taken."""
    agent = Served(here.channel)
    agent.acked = agent.position = POSITION_MOST - SLOT_SIZE
    await agent.serve()
    taker = Taker(here, [registration(0x40, pid=100), registration(0x40)])
    await taker.open()
    for _ in taker.wanted:
        await taker.until("registered")
    await agent.leave()
    await taker.until("node")
    agent.boot_id, agent.epoch, agent.position, agent.acked = "boot-2", 8, 0, 0
    await agent.serve()
    assert (await taker.until("node")).state == monitor_pb2.NODE_STATE_REBOOTED
    await agent.wait(lambda: agent.mask != 0)
    await agent.send([rec(EXIT, 1)])
    await taker.until_events(2)
    inferred = ("a", 7, POSITION_MOST - SLOT_SIZE, EXIT, 100)
    assert taker.events == [inferred, ("a", 8, 0, EXIT, 1)]


async def test_times_that_are_none(here: Here) -> None:
    """A clock at its end: events come, and so do progress and gaps, which would say later than can be written."""
    agent, taker = await start(here, registration(0x40))
    await agent.send([rec(EXIT, 1, boottime_ns=MOST)])
    await taker.until_events(1)
    tick(here.broker)
    await taker.until("progress")
    agent.position += 10 * SLOT_SIZE
    await agent.send([rec(EXIT, 2)])
    await taker.until_events(2)
    assert slots(taker) == [0, 11]
    assert [(gap.from_position, gap.to_position) for gap in taker.gaps] == [(SLOT_SIZE, 11 * SLOT_SIZE)]
    tick(here.broker)
    await taker.until("progress")


@pytest.mark.parametrize("kind", ["memory", "file"])
async def test_the_log_goes_on_when_counting_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """What is dropped is counted for a monitor that is away. Whatever fails there: all that agents send gets into the log."""

    def fail(_: Session, __: Entry) -> None:
        raise RuntimeError("it was not thought of")

    monkeypatch.setattr(Session, "evicting", fail)
    here = await Here.start(MemoryLog(1 << 20) if kind == "memory" else SqliteLog(tmp_path / "log", max_bytes=1 << 20), None, "")
    try:
        agent, taker = await start(here, registration(0x40))
        await taker.leave()
        for _ in range(30):
            await agent.send([rec(EXIT, pid) for pid in range(500)])
            await agent.acknowledged()
        assert here.log.oldest > 0
        assert here.log.committed == here.log.end
        assert "counting what the log drops failed" in caplog.text
    finally:
        await here.stop()


async def test_a_drain_that_takes_the_place_of_a_live_agent(here: Here) -> None:
    """Who drains brings no live events: the node is unreachable from then on, until an agent comes."""
    agent, taker = await start(here, registration(0x40))
    drain = Agent(here.channel)
    await drain.connect(draining=True)
    assert (await taker.until("node")).state == monitor_pb2.NODE_STATE_UNREACHABLE
    (node,) = (await here.monitor.ListNodes(monitor_pb2.ListNodesRequest())).nodes
    assert node.state == monitor_pb2.NODE_STATE_UNREACHABLE
    drain.call.cancel()
    with contextlib.suppress(EOFError, grpc.aio.AioRpcError):
        await agent.read_on()
    await agent.serve()
    assert (await taker.until("node")).state == monitor_pb2.NODE_STATE_UP
    await agent.send([rec(EXIT, 1)])
    await taker.until_events(1)


async def test_nodes_are_listed_with_more_losses_than_can_be_said(here: Here) -> None:
    """Two totals, each the largest there is."""
    agent, taker = await start(here, registration(0x40))
    await tell(agent, losses((EXIT, MOST, False), (EXIT, MOST, True)))
    await taker.until("gap")
    (node,) = (await here.monitor.ListNodes(monitor_pb2.ListNodesRequest())).nodes
    assert node.lost == MOST


async def test_a_takeover_that_fails_is_told(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node has no agent then, and monitors hear of it."""
    _, taker = await start(here, registration(0x40))

    def fail(_: object) -> None:
        raise RuntimeError

    with monkeypatch.context() as broken:
        broken.setattr(here.broker, "remember_node", fail)
        with pytest.raises((EOFError, grpc.aio.AioRpcError)):
            await Agent(here.channel).connect()
    assert (await taker.until("node")).state == monitor_pb2.NODE_STATE_UNREACHABLE
