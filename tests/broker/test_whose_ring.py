# SPDX-License-Identifier: Apache-2.0
"""Who may be a node's agent: who shows the secret of its ring, and whose ring is the one that the log knows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from kmonitor.broker.log.memory import MemoryLog
from kmonitor.broker.log.sqlite import SqliteLog
from kmonitor.v1 import agent_pb2, monitor_pb2
from kmonitor.wire.record import SLOT_SIZE
from tests.broker.records import EXEC, EXIT, Rec, build, rec
from tests.broker.test_resume import Here, Served, Taker, slots, start
from tests.broker.test_server import Agent, registration

pytestmark = pytest.mark.timeout(30)

RING = 1 << 16
ANOTHER = b"whatever somebody made up"
DENIED, IN_USE, WENT_BACK = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.DATA_LOSS


@pytest.fixture(params=["memory", "restarted", "crashed"])
async def here(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Here]:
    """A broker; with its log in a file, it is started again whenever `between` is called."""
    path = None if request.param == "memory" else tmp_path / "log"
    made = await Here.start(MemoryLog(1 << 20) if path is None else SqliteLog(path), path, request.param)
    yield made
    await made.stop()


@pytest.fixture
async def once() -> AsyncIterator[Here]:
    """A broker with its log in memory."""
    made = await Here.start(MemoryLog(1 << 20), None, "")
    yield made
    await made.stop()


async def refusal(agent: Agent, **hello: object) -> tuple[grpc.StatusCode, str]:
    """Why its hello is not taken."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await agent.connect(**hello)
    return raised.value.code(), raised.value.details() or ""


async def ended(agent: Agent, kinds: list[str | None] | None = None) -> tuple[grpc.StatusCode, str]:
    """Why its stream has ended. `kinds`: takes the kinds of what comes before that."""
    try:
        while True:
            kind = (await agent.read()).WhichOneof("kind")
            if kinds is not None:
                kinds.append(kind)
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""


async def restart(here: Here) -> None:
    """The broker, on its log, while no agent is there."""
    if here.path is not None:
        path = here.path
        await here.stop()
        here.__dict__.update((await Here.start(SqliteLog(path), path, here.restarts)).__dict__)


async def listed(here: Here) -> monitor_pb2.Node:
    node: monitor_pb2.Node
    (node,) = (await here.monitor.ListNodes(monitor_pb2.ListNodesRequest())).nodes
    return node


def impostor(here: Here, node: monitor_pb2.Node, secret: bytes = b"") -> Agent:
    """Somebody who has read the list of nodes."""
    return Agent(here.channel, node=node.name, boot_id=node.boot_id, epoch=node.epoch, position=node.position, secret=secret)


def ends(*pids: int) -> list[Rec]:
    return [rec(EXIT, pid, boottime_ns=1_000_000 * pid) for pid in pids]


# -- the secret


async def test_who_has_read_the_list_of_nodes_cannot_report_a_death(once: Here) -> None:
    real, taker = await start(once, registration(0x40, pid=815))
    seen = await listed(once)
    for secret in (b"", ANOTHER):
        for at in (seen.position, 1 << 62, seen.position + 65):
            forged = impostor(once, seen, secret)
            forged.position = at
            code, _ = await refusal(forged)
            assert code in {DENIED, grpc.StatusCode.INVALID_ARGUMENT}
    await real.send([rec(EXIT, 1)])
    await real.acknowledged()
    assert taker.events == []
    assert (await listed(once)).since_unix_nano == seen.since_unix_nano


async def test_the_ring_is_taken_over_with_its_secret(once: Here) -> None:
    first, _ = await start(once, registration(0x40))
    second = Agent(once.channel)
    await second.connect()
    with pytest.raises(grpc.aio.AioRpcError, match="took over"):
        await Agent.read_on(first)


@pytest.mark.parametrize("draining", [False, True])
async def test_of_a_node_that_is_away_too(here: Here, draining: bool) -> None:
    """The broker remembers what it has to, over a restart and a crash; what is in its log does not help anybody."""
    agent, taker = await start(here, registration(0x40))
    await agent.send(ends(1))
    await agent.acknowledged()
    await taker.leave()
    await agent.leave()
    await until_away(here)
    await restart(here)
    if here.path is not None:
        files = b"".join(each.read_bytes() for each in here.path.parent.iterdir() if each.is_file())
        assert agent.secret not in files
        assert agent.secret.hex().encode() not in files
    seen = await listed(here)
    assert agent.secret.decode() not in str(seen)
    assert (await refusal(impostor(here, seen), draining=draining))[0] is DENIED
    assert (await refusal(impostor(here, seen, ANOTHER), draining=draining))[0] is DENIED
    code, _ = await refusal(impostor(here, seen, ANOTHER), draining=draining, end_position=seen.position)
    assert code is WENT_BACK, "the node's own agent is not kept out by who claimed its ring before: it begins a new epoch"
    welcome = await impostor(here, seen, agent.secret).connect(draining=draining)
    assert welcome.position == SLOT_SIZE


async def test_another_ring_needs_no_secret_of_the_one_before(once: Here) -> None:
    agent, taker = await start(once, registration(0x40))
    await agent.leave()
    await taker.until("node")
    await Agent(once.channel, epoch=8, secret=ANOTHER).connect()
    assert (await listed(once)).epoch == 8


async def test_an_agent_of_an_older_version(once: Here) -> None:
    """It shows none: it can have its ring when nobody has it, and not while somebody does; once it was upgraded, only with the secret."""
    old = Agent(once.channel, secret=b"")
    await old.connect()
    code, why = await refusal(Agent(once.channel, secret=b""))
    assert (code, "has shown no secret" in why, "127.0.0.1" in why) == (IN_USE, True, True)
    assert (await refusal(Agent(once.channel)))[0] is IN_USE
    old.call.cancel()
    await until_away(once)
    upgraded = Agent(once.channel)
    await upgraded.connect()
    upgraded.call.cancel()
    await until_away(once)
    assert (await refusal(Agent(once.channel, secret=b"")))[0] is DENIED
    await Agent(once.channel).connect()


async def until_away(here: Here) -> None:
    while (await listed(here)).state != monitor_pb2.NODE_STATE_UNREACHABLE:
        pass


async def test_the_refusal_names_the_holder(once: Here) -> None:
    await Agent(once.channel).connect()
    code, why = await refusal(Agent(once.channel, epoch=8))
    assert code is IN_USE
    assert "by the agent at 127.0.0.1 (boot boot-1)" in why


async def test_a_drain_holds_the_node(once: Here) -> None:
    """As the node's own stream does: another ring comes when it has ended."""
    await Agent(once.channel).connect(draining=True)
    assert (await refusal(Agent(once.channel, epoch=8)))[0] is IN_USE
    await Agent(once.channel).connect(draining=True)


# -- a ring that goes back


async def away(here: Here) -> tuple[Served, Taker]:
    """Ten ends were told, and the agent is away: the machine is restored, as it was after the fifth."""
    agent, taker = await start(here, registration(0x40))
    await agent.send(ends(*range(1, 6)))
    await agent.send(ends(*range(6, 11)))
    await taker.until_events(10)
    await agent.acknowledged()
    if here.path is not None:
        await taker.leave()
        await here.between(agent)
        await taker.open()
        await taker.until("registered")
    await agent.leave()
    await taker.until("node")
    return agent, taker


async def test_it_has_not_come_so_far_again(here: Here) -> None:
    """The broker has what the ring will only have: the agent is told at once, and goes on in a new epoch, behind a gap."""
    agent, taker = await away(here)
    restored = Agent(here.channel, position=5 * SLOT_SIZE)
    code, why = await refusal(restored, end_position=8 * SLOT_SIZE, ring_bytes=RING)
    assert (code, "those up to 1280 have come" in why) == (WENT_BACK, True)
    agent.epoch, agent.acked, agent.position, agent.sent = 8, 5 * SLOT_SIZE, 5 * SLOT_SIZE, []
    await agent.serve()
    await taker.until("gap")
    await agent.wait(lambda: agent.mask != 0)
    await agent.send(ends(101, 102, 103))
    await taker.until_events(13)
    assert [(epoch, pid) for _, epoch, _, _, pid in taker.events[10:]] == [(8, 101), (8, 102), (8, 103)]
    assert taker.gaps[-1].reason == monitor_pb2.GAP_REASON_AGENT


async def test_it_is_further_than_that_again(here: Here) -> None:
    """Only what lies in the ring tells. None of it is acknowledged, or counted as sent again, before that is known."""
    _, taker = await away(here)
    restored = Agent(here.channel, position=5 * SLOT_SIZE)
    welcome = await restored.connect(end_position=20 * SLOT_SIZE, ring_bytes=RING)
    assert welcome.position <= 9 * SLOT_SIZE, "the last record that came is to be sent once more"
    await restored.send(ends(*range(105, 120)), position=5 * SLOT_SIZE)
    kinds: list[str | None] = []
    code, why = await ended(restored, kinds)
    assert "ack" not in kinds
    assert (code, "another record lies at position 1152" in why) == (WENT_BACK, True)
    assert len(taker.events) == 10


async def test_an_older_agent_that_goes_back_is_refused(here: Here) -> None:
    """It says nothing of how far it is, and sends from its own position on."""
    await away(here)
    restored = Agent(here.channel, position=5 * SLOT_SIZE)
    await restored.connect()
    await restored.send(ends(101, 102, 103, 104, 105), position=5 * SLOT_SIZE)
    assert (await ended(restored))[0] is WENT_BACK


async def test_the_same_ring_is_known_again(here: Here) -> None:
    """It sends the last record that came, and what it has after that."""
    _, taker = await away(here)
    again = Agent(here.channel, position=8 * SLOT_SIZE)
    welcome = await again.connect(end_position=11 * SLOT_SIZE, ring_bytes=RING)
    assert welcome.position == 9 * SLOT_SIZE
    await again.send(ends(10), position=9 * SLOT_SIZE)
    await again.send(ends(11), position=10 * SLOT_SIZE)
    await again.ack_of(11 * SLOT_SIZE)
    await taker.until_events(11)
    assert slots(taker) == list(range(11))
    assert taker.gaps == []


async def test_what_the_agent_has_not_heard_of_is_acknowledged(once: Here) -> None:
    """It releases nothing for a welcome."""
    await away(once)
    again = Agent(once.channel, position=10 * SLOT_SIZE)
    await again.connect(end_position=10 * SLOT_SIZE, ring_bytes=RING)
    await again.ack_of(10 * SLOT_SIZE)


async def test_one_that_is_further_than_a_ring_begins_a_new_epoch(once: Here) -> None:
    """A broker whose log was lost: no hole is that large."""
    await away(once)
    far = 10 * SLOT_SIZE + RING + SLOT_SIZE
    code, why = await refusal(Agent(once.channel, position=far), end_position=far, ring_bytes=RING)
    assert (code, "more than its 65536 bytes away" in why) == (WENT_BACK, True)


async def test_a_boot_that_was_taken_to_be_over_begins_a_new_epoch(once: Here) -> None:
    """Ends of ours lie where its next records will."""
    agent, taker = await start(once, registration(0x40, pid=815))
    await agent.leave()
    await taker.until("node")
    other = Agent(once.channel, boot_id="boot-2", epoch=8, secret=ANOTHER)
    await other.connect()
    await taker.until_events(1)
    other.call.cancel()
    await until_away(once)
    assert (await refusal(Agent(once.channel), end_position=0, ring_bytes=RING))[0] is WENT_BACK
    assert (await refusal(Agent(once.channel), end_position=RING, ring_bytes=RING))[0] is WENT_BACK


async def test_a_position_within_a_record_is_no_boundary(once: Here) -> None:
    """An older agent that says it is further than it was, by a slot: the node's own one is not refused for ever, but goes on anew."""
    long = rec(EXEC, 5, filename=b"/bin/x", args=(b"y" * 300,))
    first = Agent(once.channel, secret=b"")
    await first.connect()
    await first.send(ends(1))
    await first.ack_of(SLOT_SIZE)
    first.call.cancel()
    await until_away(once)
    forged = Agent(once.channel, secret=b"", position=2 * SLOT_SIZE)
    await forged.connect()
    forged.call.cancel()
    await until_away(once)
    own = Agent(once.channel, position=SLOT_SIZE)
    await own.connect(end_position=SLOT_SIZE + len(build([long])), ring_bytes=RING)
    await own.call.write(agent_pb2.AgentMessage(block=agent_pb2.Block(position=SLOT_SIZE, data=build([long]))))
    assert (await ended(own))[0] is WENT_BACK
