# SPDX-License-Identifier: Apache-2.0
"""What one stream sends: how much at a time, what is released when, and losses; with a ring in memory and no broker."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kmonitor.agent.forwarder import BLOCK_BYTES, Forwarder
from kmonitor.agent.losses import INTERVAL_S
from kmonitor.agent.pace import FILL_BYTES, GATHER_S
from kmonitor.agent.sources.memory_ring import MemoryRing, Pause
from kmonitor.agent.sources.memory_tables import MemoryControl
from kmonitor.v1 import agent_pb2
from kmonitor.wire.record import RECORD_VERSION, SLOT_SIZE

RING = 4 << 20
EXIT, EXIT_INDEX = 0x40, 6
MATCH_PROCESS = 0x10
MATCH_NODE = 0x20


class Feed:
    """Records that a test makes."""

    name = "netlink"
    epoch = 1
    secret = b"it lies with the ring"
    record_version = RECORD_VERSION

    def __init__(self, size: int = RING) -> None:
        self.control = MemoryControl(lambda: None)
        self.ring = MemoryRing(size, self.control, Pause)

    def begin_epoch(self) -> None:
        self.epoch += 1

    def make(self, count: int) -> None:
        """So many exits, as far as there is room for them."""
        for _ in range(count):
            self.ring.append(EXIT, MATCH_PROCESS, 0, 0, 1, 1, 0, 0, 0, b"")

    def make_others(self, count: int) -> None:
        """Ends of processes that nobody watches."""
        for _ in range(count):
            self.ring.append(EXIT, MATCH_NODE, 0, 0, 1, 1, 0, 0, 0, b"")

    def lose(self, count: int) -> None:
        """So many were not made."""
        self.control.count(1, EXIT_INDEX, count)


class Broker:
    """What was written, and when."""

    def __init__(self) -> None:
        self.messages: list[tuple[float, agent_pb2.AgentMessage]] = []
        self._came = asyncio.Condition()

    async def write(self, frame: bytes) -> None:
        async with self._came:
            self.messages.append((time.monotonic(), agent_pb2.AgentMessage.FromString(frame)))
            self._came.notify_all()

    def of(self, kind: str) -> list[agent_pb2.AgentMessage]:
        return [message for _, message in self.messages if message.WhichOneof("kind") == kind]

    def lost(self) -> list[agent_pb2.Lost]:
        return [message.lost for message in self.of("lost")]

    async def until(self, kind: str, count: int) -> None:
        async with asyncio.timeout(5), self._came:
            await self._came.wait_for(lambda: len(self.of(kind)) >= count)


@pytest.fixture
def feed() -> Feed:
    return Feed()


@asynccontextmanager
async def sending(feed: Feed, beat: float = 60.0, gather: float = GATHER_S) -> AsyncIterator[tuple[Forwarder, Broker]]:
    """A stream's tasks."""
    broker = Broker()
    forwarder = Forwarder(feed, broker.write, gather)
    forwarder.totals()
    tasks = [asyncio.create_task(job) for job in (forwarder.run(), forwarder.tell_late(), forwarder.heartbeat(beat))]
    try:
        yield forwarder, broker
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        feed.ring.close()
    assert all(isinstance(result, asyncio.CancelledError) for result in results), results


BLOCK = BLOCK_BYTES // SLOT_SIZE


async def test_what_is_received_makes_room_and_what_is_logged_is_released(feed: Feed) -> None:
    feed.make(10 * BLOCK)
    async with sending(feed) as (forwarder, broker):
        await broker.until("block", 4)
        await asyncio.sleep(0.05)
        assert len(broker.of("block")) == 4, "no more without an answer"
        forwarder.acknowledge(agent_pb2.Ack(position=0, received=2 * BLOCK_BYTES))
        await broker.until("block", 6)
        assert feed.ring.consumer == 0
        forwarder.acknowledge(agent_pb2.Ack(position=BLOCK_BYTES, received=4 * BLOCK_BYTES))
        await broker.until("block", 8)
        assert feed.ring.consumer == BLOCK_BYTES


async def test_a_broker_that_knows_only_its_log(feed: Feed) -> None:
    feed.make(10 * BLOCK)
    async with sending(feed) as (forwarder, broker):
        await broker.until("block", 4)
        forwarder.acknowledge(agent_pb2.Ack(position=3 * BLOCK_BYTES))
        await broker.until("block", 7)
        assert feed.ring.consumer == 3 * BLOCK_BYTES


async def test_a_drain_waits_for_the_log(feed: Feed) -> None:
    async with sending(feed) as (forwarder, broker):
        feed.make(3)
        drained = asyncio.create_task(forwarder.drain())
        await broker.until("block", 1)
        forwarder.acknowledge(agent_pb2.Ack(position=SLOT_SIZE, received=3 * SLOT_SIZE))
        await asyncio.sleep(0.05)
        assert not drained.done()
        forwarder.acknowledge(agent_pb2.Ack(position=3 * SLOT_SIZE))
        await asyncio.wait_for(drained, 5)


async def test_losses_are_told_at_most_five_times_a_second(feed: Feed) -> None:
    async with sending(feed) as (forwarder, broker):
        began = time.monotonic()
        losses = 0
        while time.monotonic() < began + 3 * INTERVAL_S:
            feed.make(1)
            feed.lose(1)
            losses += 1
            forwarder.wake()
            await asyncio.sleep(0.005)
            forwarder.acknowledge(agent_pb2.Ack(position=feed.ring.position))
        ended = time.monotonic()
        await asyncio.sleep(2 * INTERVAL_S)
        times = [at for at, message in broker.messages if message.WhichOneof("kind") == "lost"]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert min(gaps) >= 0.8 * INTERVAL_S
        assert 3 <= len(times) <= 5
        assert times[0] < began + INTERVAL_S, "the first at once"
        assert times[-1] < ended + INTERVAL_S + 0.1, "and the last not much later"
        lost = broker.lost()
        assert lost[-1].counts[0].total == losses
        assert lost[-1].counts[0].watched
        for before, after in itertools.pairwise(lost):
            assert before.to_position <= after.from_position + SLOT_SIZE
            assert after.from_position < after.to_position
            assert before.to_time_unix_nano <= after.from_time_unix_nano < after.to_time_unix_nano
        assert lost[-1].to_position == feed.ring.producer


async def test_a_loss_is_told_where_it_is(feed: Feed) -> None:
    """Not before all that was made before it ended has been sent, however long ago the last one was."""
    feed.make(8 * BLOCK)
    async with sending(feed) as (forwarder, broker):
        await broker.until("block", 4)
        feed.lose(1)
        forwarder.acknowledge(agent_pb2.Ack(received=BLOCK_BYTES))
        await broker.until("block", 5)
        await asyncio.sleep(1.5 * INTERVAL_S)
        assert broker.lost() == []
        for blocks in range(2, 5):
            forwarder.acknowledge(agent_pb2.Ack(received=blocks * BLOCK_BYTES))
        await broker.until("block", 8)
        await broker.until("lost", 1)
        kinds = [message.WhichOneof("kind") for _, message in broker.messages]
        assert kinds.index("lost") > kinds.index("block") + 7


async def test_nothing_is_complete_past_a_loss_that_was_not_told(feed: Feed) -> None:
    async with sending(feed, beat=0.02) as (forwarder, broker):
        feed.lose(1)
        await broker.until("lost", 1)
        feed.make(1)
        made_at = feed.ring.producer
        before_ns = time.time_ns()
        feed.lose(1)
        feed.make(1)
        forwarder.wake()
        await broker.until("lost", 2)
        messages = [message for _, message in broker.messages]
        kinds = [message.WhichOneof("kind") for message in messages]
        at = [index for index, kind in enumerate(kinds) if kind == "lost"][1]
        between = [message.heartbeat for message in messages[:at] if message.WhichOneof("kind") == "heartbeat"]
        assert len(between) > 3, "they go on while the loss waits for its time"
        assert all(beat.time_unix_nano < before_ns and beat.position <= made_at for beat in between)
        came = len(broker.of("heartbeat"))
        await broker.until("heartbeat", came + 2)
        last = broker.of("heartbeat")[-1].heartbeat
        assert (last.time_unix_nano > before_ns, last.position) == (True, feed.ring.producer)


async def test_losses_while_nothing_is_released() -> None:
    """The ring is full of what was sent, and nothing wakes the reader: the heartbeat notices."""
    feed = Feed(64 << 10)
    async with sending(feed, beat=0.05) as (_, broker):
        feed.make(600)
        await broker.until("lost", 1)
        [lost] = broker.lost()
        assert lost.counts[0].total == 600 - 512
        assert lost.to_position == feed.ring.producer


async def test_a_drain_tells_what_was_just_lost(feed: Feed) -> None:
    async with sending(feed) as (forwarder, broker):
        feed.lose(1)
        forwarder.wake()
        await broker.until("lost", 1)
        feed.lose(2)
        await asyncio.wait_for(forwarder.drain(), 5)
        assert [message.counts[0].total for message in broker.lost()] == [1, 3]


async def test_the_hello_has_all_of_them(feed: Feed) -> None:
    async with sending(feed) as (_, broker):
        feed.lose(3)
        later = Forwarder(feed, broker.write)
        assert later.totals().counts[0].total == 3
        await later.drain()
        assert broker.lost() == [], "and it is not told again"


FOR_EVER = 1000.0


async def test_while_many_come_others_gather_and_what_is_watched_does_not(feed: Feed) -> None:
    feed.make_others(5000)
    async with sending(feed, gather=FOR_EVER) as (forwarder, broker):
        await broker.until("block", 3)
        assert feed.ring.position == feed.ring.producer
        feed.make_others(3)
        feed.ring.awake()
        await asyncio.sleep(0.05)
        assert feed.ring.has_unread(), "they wait for more"
        feed.make(1)
        forwarder._on_wakeup()  # as the event loop does when the ring's descriptor says so
        await broker.until("block", 4)
        assert feed.ring.position == feed.ring.producer, "what lay before it went with it"


async def test_all_that_lies_before_it_goes_along_in_however_many_blocks(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read may end early: where the ring does."""
    feed.make_others(5000)
    async with sending(feed, gather=FOR_EVER) as (forwarder, broker):
        await broker.until("block", 3)
        read = feed.ring.read
        monkeypatch.setattr(feed.ring, "read", lambda limit: read(min(limit, 4 * SLOT_SIZE)))
        feed.make_others(9)
        feed.make(1)
        forwarder._on_wakeup()
        await broker.until("block", 6)
        assert feed.ring.position == feed.ring.producer


async def test_when_it_is_quiet_again_each_is_sent_as_it_comes(feed: Feed) -> None:
    feed.make_others(300)
    async with sending(feed, gather=0.01) as (forwarder, broker):
        for number in range(20):
            await broker.until("block", 1 + number)
            await asyncio.sleep(0.1)
            feed.make_others(1)
            forwarder._on_wakeup()


async def test_so_much_goes_at_once(feed: Feed) -> None:
    feed.make_others(5000)
    async with sending(feed, gather=FOR_EVER) as (forwarder, broker):
        await broker.until("block", 3)
        fill = min(FILL_BYTES, feed.ring.size // 8) // SLOT_SIZE
        feed.make_others(fill - 1)
        forwarder._on_wakeup()
        await asyncio.sleep(0.05)
        assert len(broker.of("block")) == 3
        feed.make_others(1)
        forwarder._on_wakeup()
        await broker.until("block", 4)


async def test_a_heartbeat_takes_along_what_gathers(feed: Feed) -> None:
    """Or nothing would ever be complete while many come."""
    feed.make_others(5000)
    async with sending(feed, beat=0.05, gather=FOR_EVER) as (_, broker):
        await broker.until("block", 3)
        feed.make_others(3)
        before_ns = time.time_ns()
        await broker.until("block", 4)
        came = len(broker.of("heartbeat"))
        await broker.until("heartbeat", came + 2)
        last = broker.of("heartbeat")[-1].heartbeat
        assert (last.position, last.time_unix_nano > before_ns) == (feed.ring.producer, True)


async def test_a_change_that_takes_long(feed: Feed) -> None:
    """The lease is renewed, nothing is sent that its answer must come before, and nothing more is called complete."""
    feed.make(3)
    async with sending(feed, beat=0.02) as (forwarder, broker):
        await broker.until("block", 1)
        may_end = asyncio.Event()

        async def change() -> agent_pb2.AgentMessage:
            feed.make(2)
            feed.lose(1)
            forwarder.wake()
            await may_end.wait()
            feed.make(1)
            return agent_pb2.AgentMessage(applied=agent_pb2.InterestApplied(version=7))

        before = len(broker.of("heartbeat"))
        changing = asyncio.create_task(forwarder.answer(change))
        await broker.until("heartbeat", before + 10)
        await forwarder.send(agent_pb2.AgentMessage(groups_changed=agent_pb2.GroupsChanged()))
        assert broker.of("groups_changed"), "what has no place in the order does not wait"
        assert (len(broker.of("block")), broker.of("lost")) == (1, [])
        beats = [message.heartbeat for message in broker.of("heartbeat")]
        assert {beat.position for beat in beats} <= {0, 3 * SLOT_SIZE}
        assert len({beat.time_unix_nano for beat in beats[before + 1 :]}) == 1
        may_end.set()
        await changing
        await broker.until("lost", 1)
        kinds = [kind for _, message in broker.messages if (kind := message.WhichOneof("kind")) in ("block", "applied", "lost")]
        assert kinds[:3] == ["block", "applied", "block"]
        assert sum(len(message.block.data) for message in broker.of("block")) == 6 * SLOT_SIZE


async def test_in_a_storm_that_loses_some_all_the_time_it_goes_on_all_the_same(feed: Feed) -> None:
    """The present is never complete then, and something is always about to be told: what was before is complete in the end."""
    lost: list[int] = []  # when, boot-time nanoseconds, after each of them
    async with sending(feed, beat=0.02) as (forwarder, broker), asyncio.timeout(20):
        beats: list[agent_pb2.Heartbeat] = []
        while len(lost) <= 20 or not beats or beats[-1].boottime_ns < lost[20]:
            feed.lose(1)
            lost.append(time.clock_gettime_ns(time.CLOCK_BOOTTIME))
            feed.make(10)
            forwarder.wake()
            await asyncio.sleep(0.005)
            beats = [message.heartbeat for message in broker.of("heartbeat")]
            forwarder.acknowledge(agent_pb2.Ack(position=feed.ring.position, received=feed.ring.position))
    told = 0
    for _, message in broker.messages:
        if message.WhichOneof("kind") == "lost":
            told = message.lost.counts[0].total
        elif message.WhichOneof("kind") == "heartbeat":
            assert sum(at < message.heartbeat.boottime_ns for at in lost) <= told


async def test_what_was_is_complete_while_a_broker_does_not_keep_up() -> None:
    """There is always more in the ring than it takes."""
    feed = Feed(8 << 20)
    async with sending(feed, beat=0.02) as (forwarder, broker), asyncio.timeout(20):
        feed.make_others(8 * BLOCK)
        start = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        got = 0
        while not any(message.heartbeat.boottime_ns > start for message in broker.of("heartbeat")):
            feed.make_others(BLOCK)
            got = min(got + BLOCK_BYTES, feed.ring.position)
            forwarder.acknowledge(agent_pb2.Ack(position=got, received=got))
            came = len(broker.of("heartbeat"))
            await broker.until("heartbeat", came + 1)
            assert feed.ring.producer - feed.ring.position > 2 * BLOCK_BYTES
