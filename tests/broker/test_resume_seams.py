# SPDX-License-Identifier: Apache-2.0
"""Resume where it meets something else: retention, ends as the stream breaks, epochs that come back, other monitors, crashes between
commits."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

import kmonitor.broker.broker as broker_module
import kmonitor.broker.outbox as outbox_module
from kmonitor.broker.broker import Broker
from kmonitor.broker.log.memory import MemoryLog
from kmonitor.broker.log.sqlite import SqliteLog
from kmonitor.broker.log.writer import Order
from kmonitor.broker.sessions import REQUESTS_HELD_ABOVE
from kmonitor.v1 import agent_pb2, monitor_pb2
from kmonitor.wire.record import SLOT_SIZE
from tests.broker.records import EXEC, EXIT, FORK, rec
from tests.broker.test_resume import HOW, LOG, OWN, Here, Served, Taker, slots, start
from tests.broker.test_server import EXITED, RUNNING, Agent, registration

pytestmark = pytest.mark.timeout(15)


@pytest.fixture
async def here() -> AsyncIterator[Here]:
    made = await Here.start(MemoryLog(64 << 20), None, "")
    yield made
    await made.stop()


@pytest.fixture
async def small() -> AsyncIterator[Here]:
    """Its log has room for some 35 blocks of one record."""
    made = await Here.start(MemoryLog(40_000), None, "")
    yield made
    await made.stop()


@pytest.fixture
async def on_disk(tmp_path: Path) -> AsyncIterator[Here]:
    path = tmp_path / "broker.sqlite"
    made = await Here.start(SqliteLog(path), path, "")
    yield made
    await made.stop()


@pytest.fixture(params=HOW)
async def anyhow(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Here]:
    path = None if request.param == "memory" else tmp_path / "broker.sqlite"
    made = await Here.start(
        MemoryLog(64 << 20) if path is None else SqliteLog(path), path, request.param if request.param in HOW[2:] else ""
    )
    yield made
    await made.stop()


async def until(what: Callable[[], bool]) -> None:
    """Until something is so in the broker."""
    async with asyncio.timeout(10):
        while not what():  # noqa: ASYNC110 -- the broker has no event for it
            await asyncio.sleep(0.002)


def tick(broker: Broker) -> None:
    """As if a progress interval had passed."""
    assert broker._ticker is not None
    broker._ticker.cancel()
    broker._tick()


async def beat(here: Here, agent: Served) -> None:
    """The agent says that all of long ago has come, and the broker has heard it."""
    node = next(each for each in here.broker.nodes if each.name == "a")
    said = node.complete[1] + 1
    heartbeat = agent_pb2.Heartbeat(position=agent.position, time_unix_nano=said, boottime_ns=1 << 62)
    await agent.call.write(agent_pb2.AgentMessage(heartbeat=heartbeat))
    await until(lambda: node.complete[1] == said)


def outstay(here: Here) -> None:
    """Those who have left stay away for longer than their places are kept."""
    for session in here.broker.lingering:
        here.broker.lingering.drop(session)


def copy_file(here: Here, path: Path) -> Path:
    """What a crash would leave now."""
    for suffix in ("", "-wal"):
        shutil.copy(f"{here.path}{suffix}", f"{path}{suffix}")
    return path


@contextlib.contextmanager
def disk_that_does_not_answer(here: Here, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing gets into the file meanwhile. What came before has to be flushed."""
    assert isinstance(here.log, SqliteLog)
    with monkeypatch.context() as held:
        held.setattr(here.log, "_hand_over", lambda: None)
        yield
    here.log._hand_over()


async def restart_in_epoch(agent: Served, epoch: int, position: int = 0) -> None:
    """The agent ends, and comes with another ring, or one that it had before; until it is told what is wanted."""
    await agent.leave()
    agent.epoch, agent.position, agent.acked, agent.sent = epoch, position, position, []
    await agent.serve()
    await agent.wait(lambda: agent.mask != 0)


async def another_node(here: Here, name: str) -> Served:
    agent = Served(here.channel)
    agent.node, agent.boot_id = name, f"boot-{name}"
    await agent.serve()
    return agent


def lost(taker: Taker) -> dict[int, int]:
    """Event type -> how many, of all gaps."""
    counts: dict[int, int] = {}
    for gap in taker.gaps:
        for each in gap.lost:
            counts[each.type] = counts.get(each.type, 0) + each.count
    return counts


def assert_one_gap_then_all(taker: Taker, taken: Literal[0, 1], total: int) -> None:
    """Of `total` records in a row the first or none was taken: the next were dropped by the log, which one gap says, and the rest came."""
    (gap,) = taker.gaps
    assert (gap.reason, gap.epoch) == (LOG, 7)
    assert gap.from_position == (1 if taken else 0)
    assert taken < gap.to_position // SLOT_SIZE < total
    assert slots(taker)[taken:] == list(range(gap.to_position // SLOT_SIZE, total))


async def test_what_was_lost_last_of_all_in_a_ring(here: Here) -> None:
    """No record came behind it, and then there was another ring: who reads that in the log is told as if it had been there."""
    agent, taker = await start(here, registration(0x40))
    await agent.send([rec(EXIT, 1)])
    await taker.until_events(1)
    await taker.leave()
    await agent.lose(2)
    await until(lambda: here.log.end == 2)
    agent.total = 0
    await restart_in_epoch(agent, 8)
    await taker.open()
    await taker.until("registered")
    assert lost(taker) == {EXIT: 2}


# -- retention


async def test_retention_before_the_stream_broke(small: Here) -> None:
    """What was sent and not taken, and dropped by the log while the stream still was, is told as a gap."""
    agent, taker = await start(small, registration(0x40))
    await agent.send([rec(EXIT, 1)])
    await taker.until_events(1)
    for pid in range(200):
        await agent.send([rec(EXIT, pid)])
    await agent.acknowledged()
    await taker.leave()
    await taker.open()
    await taker.until("registered")
    assert_one_gap_then_all(taker, 1, 201)


async def test_retention_of_a_node_of_which_nothing_was_taken(small: Here) -> None:
    """A cursor without a position of the node: the gap begins where the registration did."""
    agent, taker = await start(small, registration(0x40))
    for pid in range(200):
        await agent.send([rec(EXIT, pid)])
    await agent.acknowledged()
    await taker.leave()
    assert not taker.positions
    await taker.open()
    await taker.until("registered")
    assert_one_gap_then_all(taker, 0, 200)


@pytest.mark.parametrize("how", ["restarted", "crashed"])
async def test_retention_and_then_another_broker(tmp_path: Path, how: str) -> None:
    """What the broker before had counted is gone with it; from where to where something is missing is known all the same."""
    path = tmp_path / "broker.sqlite"
    here = await Here.start(SqliteLog(path, max_bytes=1 << 20), path, how)
    try:
        agent, taker = await start(here, registration(0x40))
        await agent.send([rec(EXIT, 1)])
        await taker.until_events(1)
        await taker.leave()
        for _ in range(30):
            await agent.send([rec(EXIT, pid) for pid in range(500)])
            await agent.acknowledged()
        await until(lambda: here.log.oldest > 3)
        await here.log.flush()
        await here.between(agent)
        await taker.open()
        await taker.until("registered")
        assert_one_gap_then_all(taker, 1, 15_001)
    finally:
        await here.stop()


async def test_two_registrations_miss_a_record_once(small: Here) -> None:
    """What retention takes of two registrations of one stream is counted once, as it would have been delivered once."""
    agent, taker = await start(small, registration(0x40), registration(0x40, uids=[1000]))
    await agent.send([rec(EXIT, 1)])
    await taker.until_events(1)
    await taker.leave()
    for pid in range(200):
        await agent.send([rec(EXIT, pid)])
    await agent.acknowledged()
    await taker.open()
    await taker.until("registered")
    assert lost(taker)[EXIT] > 0
    assert len(taker.events) - 1 + lost(taker)[EXIT] == 200


async def test_retention_of_an_epoch_that_was_taken(small: Here) -> None:
    """The log drops what the client has long had: no gap, and its cursor does not go back to that epoch."""
    agent, taker = await start(small, registration(0x40))
    await agent.send([rec(EXIT, 1)])
    await taker.until_events(1)
    await restart_in_epoch(agent, 8)
    await agent.send([rec(EXIT, 2)])
    await taker.until_events(2)
    await taker.leave()
    for pid in range(100):
        await agent.send([rec(EXEC, pid)])
    await agent.acknowledged()
    await taker.open()
    await taker.until("registered")
    assert [gap.reason for gap in taker.gaps] == [monitor_pb2.GAP_REASON_AGENT], "for the ring that is gone"
    assert taker.positions["a"] == (8, 0)


async def test_retention_counts_for_those_whose_ended_processes_are_remembered(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session without a stream forgets all but so many processes that ended: what retention takes of those is counted."""
    monkeypatch.setattr(broker_module, "PAST", 4)
    assert isinstance(here.log, MemoryLog)
    agent, taker = await start(here, registration(0x48, pid=100, follow=True))
    await taker.leave()
    for pid in range(200, 220):
        await agent.send([rec(FORK, 100, flags=OWN, child_tgid=pid, child_start_boottime_ns=pid * 10)])
        await agent.send([rec(EXIT, pid, flags=OWN)])
    await agent.acknowledged()
    await beat(here, agent)
    tick(here.broker)
    (session,) = here.broker.sessions
    assert session.matcher.remembers_from
    here.log.max_bytes = 40_000
    for _ in range(100):
        await agent.send([rec(EXEC, 1)])
    await agent.acknowledged()
    assert here.log.oldest > 40
    await taker.open()
    await taker.until("registered")
    assert lost(taker) == {FORK: 20, EXIT: 4}
    (counted,) = (gap for gap in taker.gaps if gap.lost)
    assert (counted.from_position, counted.to_position) == (0, 40 * SLOT_SIZE)


async def test_what_a_session_has_forgotten_is_a_gap(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """More processes have ended meanwhile than are remembered: their events are in the log, and nobody knows any more whose they are."""
    monkeypatch.setattr(broker_module, "PAST", 4)
    agent, taker = await start(here, registration(0x48, pid=100, follow=True))
    await agent.send([rec(FORK, 100, flags=OWN, child_tgid=300, child_start_boottime_ns=3000)])
    await taker.until_events(1)
    await taker.leave()
    for pid in range(200, 220):
        await agent.send([rec(FORK, 100, flags=OWN, child_tgid=pid, child_start_boottime_ns=pid * 10)])
        await agent.send([rec(EXIT, pid, flags=OWN)])
    await agent.acknowledged()
    await beat(here, agent)
    tick(here.broker)
    await taker.open()
    await taker.until("registered")
    assert [(gap.reason, gap.from_position, gap.to_position) for gap in taker.gaps] == [(LOG, 1, agent.position)]
    assert [event[3] for event in taker.events].count(FORK) == 21
    assert [event[4] for event in taker.events if event[3] == EXIT] == [216, 217, 218, 219]


# -- ends


async def test_an_end_as_the_stream_broke(anyhow: Here) -> None:
    """The last of a registration, which is over by it, was sent and not taken: it comes again, and so does the answer."""
    agent, taker = await start(anyhow, registration(0x60, pid=100, node="a"))
    await agent.send([rec(EXEC, 100, flags=OWN)])
    await taker.until_events(1)
    await agent.send([rec(EXIT, 100, flags=OWN)])
    await agent.acknowledged()
    agent.gone = (100,)
    await taker.leave()
    await anyhow.between(agent)
    await taker.open()
    await taker.until("registered")
    assert slots(taker) == [0, 1]
    assert taker.gaps == []
    assert taker.states == [RUNNING, EXITED]


async def test_registered_again_after_an_end_that_was_not_taken(anyhow: Here) -> None:
    """The same registration, once over and once new in one stream: what the first had is not lost with it."""
    agent, taker = await start(anyhow, registration(0x40, pid=100, node="a"))
    await agent.send([rec(EXIT, 100, flags=OWN)])
    await agent.acknowledged()
    saved = dict(taker.positions)
    again = monitor_pb2.RegisterRequest(registration=taker.wanted[0])
    await taker.call.write(monitor_pb2.WatchRequest(request_id=5, register=again))
    await taker.until("registered")
    await anyhow.log.flush()
    taker.positions = saved
    taker.events.clear()
    await taker.leave()
    await anyhow.between(agent)
    await taker.open()
    await taker.until("registered")
    assert slots(taker) == [0]
    assert taker.gaps == []


async def test_processes_that_were_never_there_leave_nothing(here: Here) -> None:
    """A registration without a process has had nothing to deliver: nothing is kept of it for a stream that comes back."""
    agent, taker = await start(here, registration(0x40, pid=1, node="a"))
    agent.gone = tuple(range(2, 40))
    for pid in agent.gone:
        wanted = monitor_pb2.RegisterRequest(registration=registration(0x40, pid=pid, node="a"))
        await taker.call.write(monitor_pb2.WatchRequest(request_id=pid, register=wanted))
        assert (await taker.until("registered")).state == EXITED
    (session,) = here.broker.sessions
    assert not session.past
    assert len(session.registrations) == 1


# -- nodes that come and go


async def test_a_node_that_was_removed(here: Here) -> None:
    """A cursor names a node that an operator has removed since: the stream goes on with the others."""
    agent, taker = await start(here, registration(0x40))
    other = await another_node(here, "b")
    await taker.until("registered")
    await agent.send([rec(EXIT, 1)])
    await other.send([rec(EXIT, 1)])
    await taker.until_events(2)
    await other.leave()
    await taker.until("node")
    await here.monitor.RemoveNode(monitor_pb2.RemoveNodeRequest(node="b"))
    assert (await taker.until("node")).state == monitor_pb2.NODE_STATE_GONE
    await taker.leave()
    await agent.send([rec(EXIT, 2)])
    await agent.acknowledged()
    await taker.open()
    await taker.until("registered")
    assert [event[:3] for event in taker.events if event[0] == "a"] == [("a", 7, 0), ("a", 7, SLOT_SIZE)]
    assert taker.gaps == []


async def test_a_node_that_is_removed_just_after_an_end(here: Here) -> None:
    """What is kept for late records of a process that ended goes with its node: progress goes on for the others."""
    agent, taker = await start(here, registration(0x40, pid=100, node="a"), registration(0x20))
    await agent.send([rec(EXIT, 100, flags=OWN)])
    await taker.until_events(1)
    await another_node(here, "b")
    await taker.until("registered")
    await agent.leave()
    await taker.until("node")
    await here.monitor.RemoveNode(monitor_pb2.RemoveNodeRequest(node="a"))
    tick(here.broker)
    told = await taker.until("progress")
    assert [each.node for each in told.nodes] == ["b"]


async def test_absence_is_told_by_a_later_stream(here: Here) -> None:
    """Nobody kept the place, and the node is away when the monitor comes; it returns while the stream is broken again: the stream after
    that still says what was missed."""
    agent, taker = await start(here, registration(0x40))
    other = await another_node(here, "b")
    await taker.until("registered")
    await agent.send([rec(EXIT, 1)])
    await other.send([rec(EXIT, 2)])
    await taker.until_events(2)
    await taker.leave()
    outstay(here)
    await other.send([rec(EXIT, 3)])
    await other.acknowledged()
    await other.leave()
    await taker.open()
    for _ in range(2):
        await taker.until("registered")
    await taker.leave()
    await other.serve()
    await other.wait(lambda: other.mask != 0)
    await other.send([rec(EXIT, 4)])
    await other.acknowledged()
    await taker.open()
    for _ in range(2):
        await taker.until("registered")
    assert [(gap.from_position, gap.to_position) for gap in taker.gaps if gap.node == "b"] == [(1, 2 * SLOT_SIZE)]
    assert [event[4] for event in taker.events if event[0] == "b"] == [2, 4]


async def test_absence_of_two_registrations(here: Here) -> None:
    """Nobody kept the place, and the second registration is brought later than the first: what only that one has missed is told too."""
    agent = Agent(here.channel)
    await agent.connect()
    await agent.next_interest()
    await agent.send([rec(EXEC, 1), rec(EXEC, 1)])
    await agent.ack_of(agent.position)
    taker = Taker(here, [registration(0x40, pid=100), registration(0x40)], positions={"a": (7, 0)})
    taker.call = here.monitor.Watch()
    first, second = (
        monitor_pb2.WatchRequest(request_id=index, register=monitor_pb2.RegisterRequest(registration=wanted))
        for index, wanted in enumerate(taker.wanted)
    )
    first.cursor.CopyFrom(taker.cursor())
    first.resuming = 2
    await taker.call.write(first)
    await agent.apply(await agent.next_interest())
    await agent.send([rec(EXIT, 2), rec(EXIT, 3)])
    await agent.ack_of(agent.position)
    await taker.call.write(second)
    await agent.apply(await agent.next_interest())
    for _ in range(2):
        await taker.until("registered")
    assert [(gap.reason, gap.from_position, gap.to_position) for gap in taker.gaps] == [
        (LOG, 1, 2 * SLOT_SIZE),
        (LOG, 2 * SLOT_SIZE, 4 * SLOT_SIZE),
    ]


async def test_an_epoch_that_comes_back(here: Here) -> None:
    """The client has all of the node's last epoch; what comes then is of the one before."""
    agent, taker = await start(here, registration(0x40))
    await agent.send([rec(EXIT, 1)])
    await taker.until_events(1)
    end = agent.position
    await restart_in_epoch(agent, 8)
    await agent.send([rec(EXIT, 2)])
    await taker.until_events(2)
    heartbeat = agent_pb2.Heartbeat(position=agent.position, time_unix_nano=1)
    await agent.call.write(agent_pb2.AgentMessage(heartbeat=heartbeat))
    (node,) = here.broker.nodes
    await until(lambda: node.complete[0] == agent.position)
    tick(here.broker)
    await taker.until("progress")
    assert taker.positions["a"] == (8, SLOT_SIZE - 1)
    await taker.leave()
    await restart_in_epoch(agent, 7, end)
    await agent.send([rec(EXIT, 3)])
    await agent.acknowledged()
    await taker.open()
    await taker.until("registered")
    assert [(epoch, pid) for _, epoch, _, _, pid in taker.events] == [(7, 1), (8, 2), (7, 3)]
    assert {gap.reason for gap in taker.gaps} == {monitor_pb2.GAP_REASON_AGENT}


# -- registrations


async def test_one_key_in_two_requests(anyhow: Here) -> None:
    """Two requests for other event types of the same: both were kept, so no gap."""
    agent, taker = await start(anyhow, registration(0x40), registration(0x20))
    await agent.send([rec(EXIT, 1)])
    await taker.until_events(1)
    await taker.leave()
    await agent.send([rec(EXEC, 2), rec(EXIT, 3)])
    await agent.acknowledged()
    await anyhow.between(agent)
    await taker.open()
    for _ in range(2):
        await taker.until("registered")
    assert [event[3] for event in taker.events] == [EXIT, EXEC, EXIT]
    assert taker.gaps == []


async def test_somebody_elses_place_is_kept_for_him(here: Here) -> None:
    """A monitor whose own place is gone goes on with that of another one, who wants the same and finds it when his stream breaks."""
    agent, stays = await start(here, registration(0x40))
    goes = Taker(here, [registration(0x40)])
    await goes.open()
    await goes.until("registered")
    await agent.send([rec(EXIT, 1)])
    await goes.until_events(1)
    await stays.until_events(1)
    goes.call.cancel()
    await until(lambda: len(here.broker.lingering) == 1)
    outstay(here)
    await agent.send([rec(EXIT, 2)])
    await stays.until_events(2)
    await goes.open()
    await goes.until_events(2)
    assert goes.gaps == []
    await goes.call.write(monitor_pb2.WatchRequest(close=monitor_pb2.CloseRequest()))
    await until(lambda: len(here.broker.sessions) == 1)
    await agent.send([rec(EXIT, 3)])
    await agent.acknowledged()
    await stays.leave()
    await agent.send([rec(EXIT, 4)])
    await agent.acknowledged()
    await stays.open()
    await stays.until("registered")
    assert slots(stays) == [0, 1, 2, 3]
    assert stays.gaps == []


async def test_many_registrations_come_back(here: Here) -> None:
    """More answers than are held for a slow reader wait for the last registration to be brought: it is taken all the same."""
    count = 1500
    agent = Served(here.channel)
    agent.node = "n" * 250
    await agent.serve()
    taker = Taker(here, [registration(0x40, pid=pid) for pid in range(1, count + 1)])
    opening = asyncio.create_task(taker.open())
    await asyncio.sleep(0)  # it has its call then
    for _ in range(count):
        await taker.until("registered")
    await opening
    await taker.leave()
    taker.call = here.monitor.Watch()
    for index, wanted in enumerate(taker.wanted):
        request = monitor_pb2.WatchRequest(request_id=index, register=monitor_pb2.RegisterRequest(registration=wanted))
        if index == 0:
            request.cursor.CopyFrom(taker.cursor())
            request.resuming = count
        if index == count - 2:  # the one that the broker waits for already is taken in any case
            await until(lambda: any(each.outbox.messages_bytes > REQUESTS_HELD_ABOVE for each in here.broker.sessions))
        await taker.call.write(request)
    for _ in range(count):
        await taker.until("registered")
    assert taker.states == [RUNNING] * (2 * count)
    assert taker.gaps == []
    assert len(here.broker.sessions) == 1, "it has taken all of the first one's"


# -- a log on disk


async def test_a_crash_at_each_commit_while_a_monitor_comes_back(on_disk: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place goes from one session to the other: whatever commit is the last, one of them has it. The monitor first says that it is
    there, and brings its registration later."""
    assert isinstance(on_disk.log, SqliteLog)
    agent, taker = await start(on_disk, registration(0x40))
    await agent.send([rec(EXIT, 1)])
    await taker.until_events(1)
    await taker.leave()
    await agent.send([rec(EXIT, 2)])
    await agent.acknowledged()
    await on_disk.log.flush()
    brought = taker.cursor()
    submit = on_disk.log._writer.submit
    left: list[Path] = []

    def crash_and_submit(batch: list[Order]) -> None:
        left.append(copy_file(on_disk, tmp_path / f"crashed.{len(left)}"))
        submit(batch)

    monkeypatch.setattr(on_disk.log._writer, "submit", crash_and_submit)
    taker.call = on_disk.monitor.Watch()
    nothing = monitor_pb2.DeregisterRequest(registration=registration(0x1, pid=1))
    await taker.call.write(monitor_pb2.WatchRequest(request_id=1, deregister=nothing, cursor=brought, resuming=1))
    await until(lambda: any(session.resuming for session in on_disk.broker.sessions))
    await on_disk.log.flush()
    wanted = monitor_pb2.RegisterRequest(registration=taker.wanted[0])
    await taker.call.write(monitor_pb2.WatchRequest(request_id=0, register=wanted))
    await taker.until("registered")
    await on_disk.log.flush()
    left.append(copy_file(on_disk, tmp_path / "crashed.last"))
    for path in left:
        new = await Here.start(SqliteLog(path), path, "")
        again = Taker(new, taker.wanted, log_id=brought.log_id, number=brought.number, stream_id=brought.stream_id)
        again.positions = {each.node: (each.epoch, each.position) for each in brought.positions}
        await again.open()
        await again.until("registered")
        assert slots(again) == [1], path.name
        assert again.gaps == [], path.name
        await new.stop()


async def test_a_fork_that_was_taken_and_is_lost_in_a_crash(on_disk: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The monitor has the fork, the file has not: when the agent sends it again it is not told again, and the child is followed."""
    agent, taker = await start(on_disk, registration(0x48, pid=100, follow=True))
    with disk_that_does_not_answer(on_disk, monkeypatch):
        await agent.send([rec(FORK, 100, flags=OWN, child_tgid=101, child_start_boottime_ns=1010)])
        await taker.until_events(1)
        await taker.leave()
        path = copy_file(on_disk, tmp_path / "crashed")
        await agent.leave()
    new = await Here.start(SqliteLog(path), path, "")
    try:
        taker.here = new
        await taker.open()
        await taker.until("registered")
        agent.channel = new.channel
        await agent.serve()
        await agent.acknowledged()
        await agent.send([rec(EXIT, 101, flags=OWN)])
        await taker.until_events(2)
        assert slots(taker) == [0, 1]
        assert taker.gaps == []
    finally:
        await new.stop()


async def test_a_slow_disk_does_not_hold_events_up(on_disk: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gap is told once it is safe, and what has come since waits behind it: not for ever."""
    monkeypatch.setattr(outbox_module, "MARK_WAIT", 1000.0)
    agent, taker = await start(on_disk, registration(0x40))
    (session,) = on_disk.broker.sessions
    with disk_that_does_not_answer(on_disk, monkeypatch):
        await agent.lose(1)
        await agent.send([rec(EXIT, 1)])
        await until(lambda: on_disk.log.end - on_disk.log.committed == 2)
        await until(lambda: not session.outbox.filled.is_set())  # it has come upon the mark, and waits
        monkeypatch.setattr(outbox_module, "MARK_WAIT", 0.0)
        tick(on_disk.broker)
        await taker.until_events(1)
        assert lost(taker) == {EXIT: 1}


async def test_progress_goes_on_while_the_disk_does_not_answer(on_disk: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that waits for a gap to be safe says that it lives, and no further number than it has told."""
    monkeypatch.setattr(outbox_module, "MARK_WAIT", 1000.0)
    agent, taker = await start(on_disk, registration(0x40))
    (session,) = on_disk.broker.sessions
    with disk_that_does_not_answer(on_disk, monkeypatch):
        await agent.lose(1)
        await until(lambda: on_disk.log.end > on_disk.log.committed)
        for _ in range(3):
            await until(lambda: not session.outbox.filled.is_set())  # it has come upon the mark, and waits
            tick(on_disk.broker)
            assert (await taker.until("progress")).number == on_disk.log.committed
        assert taker.gaps == []
    await taker.until("gap")


async def many_ends(here: Here, agent: Served) -> None:
    """More children of process 100 come and go than the broker is made to remember."""
    for pid in range(200, 220):
        await agent.send([rec(FORK, 100, flags=OWN, child_tgid=pid, child_start_boottime_ns=pid * 10)])
        await agent.send([rec(EXIT, pid, flags=OWN)])
    await agent.acknowledged()
    await beat(here, agent)
    tick(here.broker)


async def test_forgotten_ends_of_a_node_without_a_position(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its positions begin where the monitor was armed, and a cursor cannot say so: there is a gap all the same."""
    monkeypatch.setattr(broker_module, "PAST", 4)
    agent, taker = await start(here, registration(0x48, pid=100, follow=True))
    await taker.leave()
    await many_ends(here, agent)
    await taker.open()
    await taker.until("registered")
    assert len(taker.events) < 40
    assert [gap.reason for gap in taker.gaps] == [LOG]


async def test_forgotten_ends_in_a_later_ring(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gap names that ring, and stands behind what is delivered of it."""
    monkeypatch.setattr(broker_module, "PAST", 4)
    agent, taker = await start(here, registration(0x48, pid=100, follow=True))
    await agent.send([rec(FORK, 100, flags=OWN, child_tgid=300, child_start_boottime_ns=3000)])
    await taker.until_events(1)
    await taker.leave()
    await agent.leave()
    agent.epoch, agent.position, agent.acked, agent.sent = 8, 0, 0, []
    await agent.serve()
    await agent.wait(lambda: agent.applied)
    await many_ends(here, agent)
    await taker.open()
    await taker.until("registered")
    while not any(gap.reason == LOG and gap.epoch == 8 for gap in taker.gaps):
        await taker.take()
    assert len(taker.events) < 41


async def test_ended_children_again_and_again(anyhow: Here) -> None:
    """Their events come, however often the stream breaks and the broker is started again before anything of it was taken."""
    agent, taker = await start(anyhow, registration(0x48, pid=100, follow=True))
    await agent.send([rec(FORK, 100, flags=OWN, child_tgid=300, child_start_boottime_ns=3000)])
    await taker.until_events(1)
    await taker.leave()
    await many_ends(anyhow, agent)
    before = dict(taker.positions)
    for own in (True, True, False):
        await anyhow.log.flush()
        await anyhow.between(agent)
        await beat(anyhow, agent)  # nothing more can come of them
        taker.events.clear()
        taker.positions, taker.names_stream = dict(before), own
        await taker.open()
        await taker.until_events(40)
        assert [event[3] for event in taker.events] == [FORK, EXIT] * 20
        assert not taker.gaps
        await taker.leave()


async def test_forgotten_ends_again_and_again(anyhow: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was forgotten stays known, though the broker is started again before the next one is forgotten: by whoever has the place now,
    and by others who go on with what that one has."""
    monkeypatch.setattr(broker_module, "PAST", 4)
    agent, taker = await start(anyhow, registration(0x48, pid=100, follow=True))
    await agent.send([rec(FORK, 100, flags=OWN, child_tgid=300, child_start_boottime_ns=3000)])
    await taker.until_events(1)
    await taker.leave()
    await many_ends(anyhow, agent)
    before = dict(taker.positions)
    for own in (True, True, False):
        await anyhow.log.flush()  # else a broker that crashes has forgotten nothing
        await anyhow.between(agent)
        taker.gaps.clear()
        taker.positions, taker.names_stream = dict(before), own  # it has taken nothing of the stream before
        await taker.open()
        await taker.until("registered")
        while not taker.gaps:
            await taker.take()
        assert [(gap.reason, gap.from_position) for gap in taker.gaps] == [(LOG, 1)]
        await taker.leave()


@pytest.mark.parametrize("first", ["agent", "monitor"])
@pytest.mark.parametrize("delivered", [False, True])
async def test_a_ring_that_a_crashed_broker_had_armed(
    on_disk: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, delivered: bool
) -> None:
    """The agent has come with another ring, was armed there, and made records; of all that the file has nothing. What the next broker
    cannot tell whose it is, is a gap: behind what was delivered, and once."""
    agent, taker = await start(on_disk, registration(0x40), registration(0x40, pid=9))
    await agent.send([rec(EXIT, 1)])
    await taker.until_events(1)
    await agent.acknowledged()
    with disk_that_does_not_answer(on_disk, monkeypatch):
        path = copy_file(on_disk, tmp_path / "crashed")
        await restart_in_epoch(agent, 8)
        await until(lambda: all(span.epoch == 8 for session in on_disk.broker.sessions for span in session.matcher.spans("a")))
        if delivered:
            monkeypatch.setattr(outbox_module, "MARK_WAIT", 0.0)
            await agent.send([rec(EXIT, 2)])
            await taker.until_events(2)
        await taker.leave()
        await agent.send([rec(EXIT, 3), rec(EXIT, 4)])
        await agent.leave()
    before = len(taker.gaps)
    agent.acked = 0
    new = await Here.start(SqliteLog(path), path, "")
    try:
        taker.here = new
        agent.channel = new.channel
        if first == "monitor":
            await taker.open()
            await taker.until("registered")
            await agent.serve()
        else:
            await agent.serve()
            await agent.wait(lambda: agent.applied)
            await agent.acknowledged()
            await taker.open()
        await agent.acknowledged()
        await agent.send([rec(EXIT, 5)])
        while taker.events[-1][4] != 5:
            await taker.take()
        # Who has come to a ring that the next broker does not know yet is told anew what its log has of the ring before.
        assert list(dict.fromkeys(pid for _, _, _, _, pid in taker.events)) == [1, *([2] if delivered else []), 5]
        end = (3 if delivered else 2) * SLOT_SIZE
        told = [(gap.epoch, gap.from_position, gap.to_position) for gap in taker.gaps[before:] if gap.to_position]
        assert told == [(8, 1 if delivered else 0, end)]
    finally:
        await new.stop()
