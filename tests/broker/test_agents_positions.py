# SPDX-License-Identifier: Apache-2.0
"""Positions, and all else that an agent may say: what cannot be is refused, and changes nothing."""

from __future__ import annotations

import asyncio
import logging
import tracemalloc
from collections.abc import Callable
from typing import Any

import grpc.aio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmonitor.broker.agents import Agents
from kmonitor.broker.broker import Broker
from kmonitor.broker.errors import Code, RefusedError
from kmonitor.broker.log.memory import MemoryLog
from kmonitor.broker.nodes import Node
from kmonitor.v1 import agent_pb2, monitor_pb2
from kmonitor.wire.parts import PART_BYTES
from kmonitor.wire.record import RECORD_SIZE, RECORD_VERSION, SLOT_SIZE
from tests.broker.records import EXIT, build, rec
from tests.broker.test_server import World, registration, world

pytestmark = pytest.mark.timeout(60)

RING = 1 << 16
SENT = 3 * RING
"""So far the node's agent has come."""
SECRET = b"it lies with the ring"
MOST = (1 << 64) - 1
ONE = build([rec(EXIT, 1)])


def hello(**fields: Any) -> agent_pb2.Hello:
    """One that is taken, but for `fields`."""
    good = agent_pb2.Hello(
        node="a", boot_id="boot-1", epoch=7, position=SENT, end_position=SENT, record_version=RECORD_VERSION, record_size=RECORD_SIZE,
        slot_size=SLOT_SIZE, secret=SECRET, ring_bytes=RING, takes_parts=True,
    )  # fmt: skip
    for name, value in fields.items():
        setattr(good, name, value)
    return good


def connected(agents: Agents) -> Any:
    """A link of an agent that has come to SENT."""
    link = agents.connect(hello())
    agents.receive(link, agent_pb2.AgentMessage(block=agent_pb2.Block(position=SENT, data=ONE)))
    return link


def state(node: Node) -> tuple[Any, ...]:
    return node.epoch, node.expected, node.position, node.logged, node.complete, dict(node.lost), node.last, dict(node.secrets)


HERE = SENT + SLOT_SIZE
OUTSIDE = [HERE + 1, HERE + 65, HERE + RING + SLOT_SIZE, 1 << 62, 1 << 63, MOST - SLOT_SIZE + 1, MOST, HERE - RING - SLOT_SIZE, 0, 1]
AHEAD = [HERE + 1, HERE + SLOT_SIZE, 1 << 62, MOST]

MESSAGES: dict[str, tuple[list[int], Callable[[int], agent_pb2.AgentMessage]]] = {
    "block": (OUTSIDE, lambda at: agent_pb2.AgentMessage(block=agent_pb2.Block(position=at, data=ONE))),
    "answer": ([at for at in OUTSIDE if at], lambda at: agent_pb2.AgentMessage(applied=agent_pb2.InterestApplied(version=1, position=at))),
    "end in an answer": (
        [at for at in OUTSIDE if at],
        lambda at: agent_pb2.AgentMessage(applied=agent_pb2.InterestApplied(version=1, position=HERE, end_position=at)),
    ),
    "heartbeat": (AHEAD, lambda at: agent_pb2.AgentMessage(heartbeat=agent_pb2.Heartbeat(position=at))),
    "loss": (AHEAD, lambda at: agent_pb2.AgentMessage(lost=agent_pb2.Lost(from_position=HERE, to_position=at))),
    "beginning of a loss": (AHEAD, lambda at: agent_pb2.AgentMessage(lost=agent_pb2.Lost(from_position=at, to_position=HERE))),
}
CASES = [pytest.param(at, make, id=f"{what} {at}") for what, (positions, make) in MESSAGES.items() for at in positions]


async def broker() -> Broker:
    return Broker(MemoryLog(1 << 20), lease=1e6, progress_interval=1e6)


@pytest.mark.parametrize(("at", "make"), CASES)
async def test_a_position_that_cannot_be(at: int, make: Callable[[int], agent_pb2.AgentMessage]) -> None:
    made = await broker()
    link = connected(made.agents)
    before = state(link.node)
    with pytest.raises(RefusedError):
        made.agents.receive(link, make(at))
    made.agents.disconnect(link, "it was refused")
    assert state(link.node) == before
    again = made.agents.connect(hello(position=SENT, end_position=HERE))
    made.agents.receive(again, agent_pb2.AgentMessage(block=agent_pb2.Block(position=SENT, data=ONE + ONE)))
    assert link.node.expected == HERE + SLOT_SIZE, "its own agent goes on"
    made.stop()


HELLOS = {
    "within a slot": {"position": SENT + 65, "end_position": SENT + 65},
    "far above": {"position": 1 << 62, "end_position": 1 << 62},
    "at the end of numbers": {"position": MOST - SLOT_SIZE + 1, "end_position": MOST - SLOT_SIZE + 1},
    "a ring above": {"position": HERE + RING + SLOT_SIZE, "end_position": HERE + RING + SLOT_SIZE},
    "a ring below": {"position": HERE - RING - SLOT_SIZE, "end_position": HERE},
    "end within a slot": {"end_position": HERE + 1},
    "end before position": {"end_position": SENT - SLOT_SIZE},
    "end beyond the ring": {"end_position": SENT + RING + SLOT_SIZE},
    "a ring that no kernel makes": {"ring_bytes": 1 << 40, "position": 1 << 39, "end_position": 1 << 39},
    "loss beyond the ring": {"lost": agent_pb2.Lost(to_position=MOST - SLOT_SIZE + 1)},
    "loss within a slot": {"lost": agent_pb2.Lost(from_position=1)},
}


@pytest.mark.parametrize("fields", HELLOS.values(), ids=HELLOS)
@pytest.mark.parametrize("is_connected", [True, False])
async def test_a_position_in_a_hello(fields: dict[str, Any], is_connected: bool) -> None:
    """Nothing changes, and an agent that is connected stays so."""
    made = await broker()
    link = connected(made.agents)
    if not is_connected:
        made.agents.disconnect(link, "it broke")
    before = state(link.node)
    wrong = hello()
    for name, value in fields.items():
        if isinstance(value, agent_pb2.Lost):
            wrong.lost.CopyFrom(value)
        else:
            setattr(wrong, name, value)
    with pytest.raises(RefusedError) as refusal:
        made.agents.connect(wrong)
    assert refusal.value.code in {Code.INVALID_ARGUMENT, Code.DATA_LOSS}
    assert state(link.node) == before
    assert (link.node.link is link, link.failure is None) == (is_connected, is_connected)
    made.stop()


ANY = st.integers(0, MOST) | st.integers(-3, 3).map(lambda by: HERE + by * SLOT_SIZE) | st.sampled_from(OUTSIDE)


@settings(max_examples=200, deadline=None)
@given(said=st.lists(st.tuples(st.sampled_from(["block", "answer", "end in an answer", "heartbeat", "loss"]), ANY), max_size=20))
def test_any_positions(said: list[tuple[str, int]]) -> None:
    """Whatever it says: the node is never more than a ring from where it was, and nothing piles up."""

    async def inside() -> None:
        made = await broker()
        link = connected(made.agents)
        node, before = link.node, HERE
        for what, at in said:
            try:
                made.agents.receive(link, MESSAGES[what][1](at))
            except RefusedError:
                made.agents.disconnect(link, "it was refused")
                link = made.agents.connect(hello(position=node.expected, end_position=node.expected))
            assert before <= node.expected <= before + RING + SLOT_SIZE
            assert node.position <= node.expected
            assert node.expected % SLOT_SIZE == 0
            before = node.expected
        made.stop()

    asyncio.run(inside())


async def test_losses_that_never_come_do_not_pile_up() -> None:
    """A hello that is further than the broker has come, and losses before what lies between has come."""
    made = await broker()
    made.agents.disconnect(connected(made.agents), "it broke")
    link = made.agents.connect(hello(position=HERE + RING // 2, end_position=HERE + RING // 2))
    lost = agent_pb2.Lost(from_position=HERE, to_position=HERE + RING // 2)
    for _ in range(200):
        made.agents.receive(link, agent_pb2.AgentMessage(lost=lost))

    def tell_more() -> None:
        for _ in range(100):
            made.agents.receive(link, agent_pb2.AgentMessage(lost=lost))

    with pytest.raises(RefusedError, match="before the records around them"):
        tell_more()
    made.stop()


# -- what is said beside positions

STRINGS = {
    "boot id with a newline": {"boot_id": "b\nkmonitor-broker: all is well"},
    "boot id with markup": {"boot_id": "[/]"},
    "long boot id": {"boot_id": "b" * 129},
    "source with an escape": {"source": "core\x1b[2J"},
    "scope with a newline": {"scope": "host\n"},
    "kernel release with U+202E": {"kernel_release": "6.1\u202e"},
    "long version": {"agent_version": "1" * 129},
    "no epoch": {"epoch": 0},
    "short secret": {"secret": b"1234"},
    "long secret": {"secret": b"1" * 65},
}


@pytest.mark.parametrize("fields", STRINGS.values(), ids=STRINGS)
async def test_a_hello_that_cannot_be_shown_or_kept(fields: dict[str, Any]) -> None:
    made = await broker()
    with pytest.raises(RefusedError) as refusal:
        made.agents.connect(hello(**fields))
    assert refusal.value.code is Code.INVALID_ARGUMENT
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 400
    assert made.list_nodes(monitor_pb2.NodeSelector()) == []
    made.stop()


LABELS = {
    "many": {f"l{number}": "" for number in range(65)},
    "a long value": {"zone": "x" * (7 << 20)},
    "a name that is none": {"a b": "c"},
    "an escape": {"zone": "\x1b[2J"},
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
async def test_labels_are_bounded(labels: dict[str, str]) -> None:
    """Those of a hello, which stay in the log, and those of a registration, which stay as long as it lingers."""
    made = await broker()
    wrong = hello()
    wrong.labels.update(labels)
    with pytest.raises(RefusedError, match="label"):
        made.agents.connect(wrong)
    asked = registration(0x40)
    asked.nodes.labels.update(labels)
    with pytest.raises(RefusedError, match="label") as refusal:
        made.register(made.open_session(), 1, asked)
    assert len(str(refusal.value)) < 400
    made.stop()


async def test_groups_that_nobody_asked_for_are_not_kept() -> None:
    made = await broker()
    link = connected(made.agents)
    answers = []
    for number in range(20):
        answer = agent_pb2.InterestApplied(version=0, position=HERE)
        for each in range(1000):
            answer.groups.add(cgroup=f"/{number}/{each}", state=5, cgroup_ids=[number << 20 | each << 8 | level for level in range(1, 50)])
        answers.append(agent_pb2.AgentMessage(applied=answer))
    tracemalloc.start()
    for message in answers:
        made.agents.receive(link, message)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 1 << 20
    made.stop()


async def test_node_names_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kmonitor.broker.agents.NODES_MOST", 3)
    made = await broker()
    for name in ("a", "b", "c"):
        made.agents.connect(hello(node=name))
    with pytest.raises(RefusedError) as refusal:
        made.agents.connect(hello(node="d"))
    assert refusal.value.code is Code.RESOURCE_EXHAUSTED
    made.agents.connect(hello(node="c"))
    made.stop()


async def test_what_is_no_message_is_a_line(caplog: pytest.LogCaptureFixture) -> None:
    """Not more of them than somebody can read, and no traceback; the broker goes on."""
    async with world() as here:
        channel: Any = here.channel
        with caplog.at_level(logging.DEBUG):
            for _ in range(60):
                call = channel.stream_stream("/kmonitor.v1.AgentService/Connect")()
                await call.write(b"\xff" * 20)
                assert await call.code() is not grpc.StatusCode.OK
        assert (await here.monitor.ListNodes(monitor_pb2.ListNodesRequest())).nodes == []
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING and record.name.startswith("kmonitor")]
    assert 0 < len(lines) <= 20
    assert not any(record.exc_info for record in lines)


# -- long messages


async def test_a_snapshot_of_many_long_paths_comes_in_parts() -> None:
    """As many as make 17 MB, where an agent takes 16: it can come back, and all of it is armed as one."""
    async with world(linger=60.0) as here:
        await settle(here)
        session = here.broker.open_session()
        paths = [f"/{number}" + "/x" * 2000 for number in range(4200)]
        for number, path in enumerate(paths):
            asked = registration(0x40)
            asked.target.cgroup = path
            here.broker.register(session, number, asked)
        link = here.broker.agents.connect(hello())
        parts = [message.interest for message in link.take() if message.WhichOneof("kind") == "interest"]
        assert sum(part.ByteSize() for part in parts) > 16 << 20
        assert all(part.ByteSize() < PART_BYTES + 5000 for part in parts)
        assert [part.more for part in parts] == [True] * (len(parts) - 1) + [False]
        assert {(part.version, part.reset) for part in parts} == {(parts[0].version, True)}
        assert [group.cgroup for part in parts for group in part.groups] == paths
        old = hello(takes_parts=False)
        here.broker.agents.disconnect(link, "it broke")
        whole = [message for message in here.broker.agents.connect(old).take() if message.WhichOneof("kind") == "interest"]
        assert len(whole) == 1, "an agent that knows of no parts gets it as before"


async def settle(here: World) -> None:
    here.broker.agents.disconnect(here.broker.agents.connect(hello()), "it broke")


async def test_an_answer_in_parts_is_one() -> None:
    """Nobody is answered before the last part; parts of several versions are none."""
    made = await broker()
    link = connected(made.agents)
    session = made.open_session()
    for pid in (11, 12):
        made.register(session, pid, registration(0x40, pid=pid))
    await asyncio.sleep(0)
    (interest,) = (message.interest for message in link.take() if message.WhichOneof("kind") == "interest" and not message.interest.reset)

    def part(pid: int, *, more: bool, version: int = interest.version) -> agent_pb2.AgentMessage:
        answer = agent_pb2.InterestApplied(version=version, position=HERE, end_position=HERE, number=1, more=more)
        answer.processes.add(pid=pid, state=1).process.start_time = pid * 10
        answer.processes[0].process.pid = pid
        return agent_pb2.AgentMessage(applied=answer)

    def told() -> list[int]:
        notes = [monitor_pb2.Notification.FromString(raw) for raw in session.outbox.take()]
        return [note.registered.process.pid for note in notes if note.WhichOneof("kind") == "registered"]

    made.agents.receive(link, part(11, more=True))
    assert told() == []
    with pytest.raises(RefusedError):
        made.agents.receive(link, part(12, more=False, version=interest.version + 1))
    made.agents.receive(link, part(12, more=False))
    assert told() == [11, 12]
    made.stop()


# -- a cursor of somebody who was not told so much


@pytest.mark.parametrize("says_end", [True, False])
async def test_a_cursor_beyond_what_the_node_will_have(says_end: bool) -> None:
    """While the node is away nobody can know. When it is back the stream ends, and does not keep silent."""
    made = await broker()
    made.agents.disconnect(connected(made.agents), "it broke")
    far = HERE + 5 * SLOT_SIZE if says_end else HERE + (1 << 32)
    beyond, well = made.open_session(), made.open_session()
    for session, position in ((beyond, far), (well, HERE - SLOT_SIZE)):
        cursor = monitor_pb2.Cursor(positions=[monitor_pb2.Cursor.Position(node="a", epoch=7, position=position)])
        made.resume(session, cursor, 1)
        made.register(session, 1, registration(0x40))
        made.resumed(session)
    back = hello(position=HERE, end_position=HERE + 5 * SLOT_SIZE)
    if not says_end:
        back.ClearField("end_position")
    made.agents.connect(back)
    assert beyond.failure is not None
    assert beyond.failure.code is Code.INVALID_ARGUMENT
    assert well.failure is None
    made.stop()
