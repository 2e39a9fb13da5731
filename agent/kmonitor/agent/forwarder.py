# SPDX-License-Identifier: Apache-2.0
"""From the ring into one stream to the broker: blocks, losses, heartbeats, and the answers that must be in order with them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from kmonitor.agent.frame import block_frame
from kmonitor.agent.losses import Losses
from kmonitor.agent.orders import check_position
from kmonitor.agent.pace import FILL_BYTES, GATHER_S, Pace
from kmonitor.agent.slices import in_slices
from kmonitor.agent.source import Feed
from kmonitor.v1 import agent_pb2
from kmonitor.wire.clocks import boottime_to_unix_ns
from kmonitor.wire.parts import PART_BYTES, parts_of
from kmonitor.wire.record import SLOT_SIZE

BLOCK_BYTES = 256 * 1024
_BUSY_SECONDS = 0.0005

_IN_FLIGHT_MOST = 4 * BLOCK_BYTES
"""Bytes that the broker has not got. A broker that does not keep up gets larger blocks, not more of them: what waits
in the ring costs nothing, and what waits in gRPC costs both sides for each message."""


class _Moment(NamedTuple):
    """On all clocks. What is made after it lies at `end` or behind it."""

    loop_s: float
    unix_ns: int
    boottime_ns: int
    end: int


Write = Callable[[bytes], Awaitable[None]]
"""Of a serialised AgentMessage."""


class Forwarder:
    """One stream's sending side. Owned by the event loop's thread, as are the ring and the maps. `run`, `tell_late` and `heartbeat` are
    tasks of the stream's.

    What has a place in the order of events is made and written under `_lock`: what the broker reads is in order. A change of the source
    holds it for as long as the change takes, up to seconds; heartbeats, and what has no such place, go out meanwhile.
    """

    def __init__(self, feed: Feed, write: Write, gather_s: float = GATHER_S) -> None:
        """`gather_s`: so long, in seconds, events wait for each other at most when many come."""
        self._ring = feed.ring
        self._pace = Pace(gather_s)
        self._fill = min(FILL_BYTES, feed.ring.size // 8)
        self._to_broker = write
        self._writing = asyncio.Lock()
        """A call takes one write at a time."""
        self._lock = asyncio.Lock()
        self._beat_s: float | None = None
        """Between two heartbeats, once that is known."""
        self._beat_at = asyncio.get_running_loop().time()
        self._wake = asyncio.Event()
        self._offset = boottime_to_unix_ns()
        self._complete = _Moment(0.0, 0, 0, 0)
        """All from before it was sent, losses too."""
        self._aim: _Moment | None = None
        """The next that is to be complete: in a storm the present never is."""
        self._losses = Losses(feed)
        self._owed = asyncio.Event()
        """Set while a loss could be told but for the time since the last one."""
        self._got = self._ring.position
        """The broker has got all before it."""
        self._room = asyncio.Event()
        self._released = asyncio.Event()
        self.in_parts = False
        """The broker takes an answer in parts."""

    def totals(self) -> agent_pb2.Lost:
        """All losses of this epoch so far: for the hello, which makes them known to the broker."""
        return self._losses.totals()

    async def run(self) -> None:
        """Send what the ring holds, for ever. Nothing here is done once per event."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._ring.wakeups.fileno(), self._on_wakeup)
        self._got = self._ring.position
        end = 0
        woken = False
        try:
            while True:
                while self._ring.position - self._got >= _IN_FLIGHT_MOST:
                    self._room.clear()
                    await self._room.wait()
                if self._ring.position >= end:
                    woken = self._wake.is_set()
                    self._wake.clear()
                    # All that is there now goes, in as many blocks as it takes; what comes meanwhile may gather.
                    end = self._ring.producer
                async with self._lock:
                    size = await self._send_block()
                if size == 0 or self._ring.position >= end:
                    await self._wait(sent=size > 0, woken=woken)
                    end = 0
        finally:
            loop.remove_reader(self._ring.wakeups.fileno())
            self._ring.awake()

    async def _wait(self, *, sent: bool, woken: bool) -> None:
        """Until there may be something to send.

        A wake-up costs the process that forks more than the event does. So when events come fast the reader naps, as a
        network driver does (NAPI), and asks to be woken only when they come slowly; an urgent event wakes it all the same.
        """
        now = asyncio.get_running_loop().time()
        if (woken or not sent) and self._ring.has_unread() and not self._ring.committed_ahead():
            # Reserved, and not committed yet: the probe is at it this moment on another CPU, or was interrupted.
            await self._sleep(_BUSY_SECONDS)
        elif (nap := self._pace.nap_s(now)) > 0:
            calm = self._pace.calm_s(now)
            if self._ring.prepare_nap(self._fill, calm=calm > 0) and not self._wake.is_set():
                await self._sleep(min(nap, calm or nap))
                if self._wake.is_set() and self._ring.producer - self._ring.position < self._fill:
                    self._pace.sent_early(now)
            self._ring.awake()
        elif not self._wake.is_set() and self._ring.prepare_sleep():
            await self._wake.wait()

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass

    def _on_wakeup(self) -> None:
        if self._ring.awake():
            self._wake.set()

    def wake(self) -> None:
        """There is something in the ring, whether the source has woken the reader or not."""
        self._ring.awake()
        self._wake.set()

    async def _send_block(self) -> int:
        """Write one block; how many bytes it had, 0 if there was none. The caller holds the lock."""
        now = asyncio.get_running_loop().time()
        self._losses.look(now, quick=True)
        position = self._ring.position
        size = 0
        data = self._ring.read(BLOCK_BYTES)
        if data is not None:
            frame = block_frame(position, data, self._offset)
            size = len(data)
            self._pace.sent(now, size // SLOT_SIZE)
            del data  # the ring's own memory
            await self._write(frame)
        await self._tell_losses(now)
        return size

    async def _tell_losses(self, now: float, *, force: bool = False) -> None:
        """Once everything around them was sent: so a monitor hears of the gap where it is."""
        lost = self._losses.take(now, force=force)
        if lost is not None:
            await self._write(agent_pb2.AgentMessage(lost=lost).SerializeToString())
        if self._losses.due() is not None:
            self._owed.set()

    async def tell_late(self) -> None:
        """Tell, for ever, the losses that had to wait only because the one before had just been told."""
        loop = asyncio.get_running_loop()
        while True:
            await self._owed.wait()
            self._owed.clear()
            due = self._losses.due()
            if due is None:
                continue
            await asyncio.sleep(max(due - loop.time(), 0))
            async with self._lock:
                await self._tell_losses(max(due, loop.time()))

    async def heartbeat(self, seconds: float) -> None:
        """Renew the lease every so often, for ever. What it calls complete lies before any loss that was not told."""
        loop = asyncio.get_running_loop()
        self._beat_s = seconds
        while True:
            async with self._lock:
                # Before the looks: what is made or lost after it is not spoken of.
                times = loop.time(), time.time_ns(), time.clock_gettime_ns(time.CLOCK_BOOTTIME)
                unread, now = self._ring.has_unread(), _Moment(*times, self._ring.producer)
                if unread and self._ring.position - self._got < _IN_FLIGHT_MOST:
                    await self._send_block()  # while many come there is always something that gathers
                self._losses.look(loop.time())
                await self._tell_losses(loop.time())
                self._note_complete(now)
                await self._beat()
            self._offset = boottime_to_unix_ns()
            await asyncio.sleep(seconds)

    async def _beat_until(self, changed: asyncio.Event) -> None:
        """Renew the lease while a change is made. Nothing is sent meanwhile, so no more is complete than was."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with asyncio.timeout_at(None if self._beat_s is None else self._beat_at + self._beat_s):
                    await changed.wait()
            except TimeoutError:
                self._losses.look(loop.time())
                await self._beat()
            else:
                return

    def _note_complete(self, now: _Moment) -> None:
        self._aim = self._aim or now
        for moment in (now, self._aim):
            if self._ring.position >= moment.end and not self._ring.behind and self._losses.clear_at(moment.loop_s):
                self._complete, self._aim = moment, None
                return

    async def _beat(self, *, acknowledge: bool = False) -> None:
        self._beat_at = asyncio.get_running_loop().time()
        beat = agent_pb2.Heartbeat(
            position=self._losses.complete_before(self._ring.position),
            time_unix_nano=self._complete.unix_ns,
            boottime_ns=self._complete.boottime_ns,
            acknowledge=acknowledge,
        )
        await self._write(agent_pb2.AgentMessage(heartbeat=beat).SerializeToString())

    async def answer(self, make: Callable[[], Awaitable[agent_pb2.AgentMessage]]) -> None:
        """Do what changes the source, and write the answer before any record that comes of it."""
        async with self._lock:
            changed = asyncio.Event()
            beating = asyncio.create_task(self._beat_until(changed))
            try:
                message = await make()
            finally:
                changed.set()
                await beating
            await self._write_answer(message)

    async def _write_answer(self, message: agent_pb2.AgentMessage) -> None:
        if not self.in_parts or message.ByteSize() <= PART_BYTES:
            await self._write(message.SerializeToString())
            return
        async for part in in_slices(parts_of(message.applied, "processes", "groups")):
            await self._write(agent_pb2.AgentMessage(applied=part).SerializeToString())

    async def send(self, message: agent_pb2.AgentMessage) -> None:
        """Write a message that has no place in the order of events."""
        await self._write(message.SerializeToString())

    async def _write(self, message: bytes) -> None:
        async with self._writing:
            await self._to_broker(message)

    def acknowledge(self, ack: agent_pb2.Ack) -> None:
        """The broker has got everything before one position, and has it in its log before another: only that may be forgotten.

        What it has got makes room for more blocks: a log on a disk is written in groups, and must not slow the stream down. A broker
        that does not say what it has got says so by its log. Raises BrokerMessageError if it says more than was sent.
        """
        for position in (ack.position, ack.received):
            check_position("an acknowledgement", position, self._ring.position)
        self._ring.release(ack.position)
        self._got = max(self._got, ack.received, ack.position)
        self._room.set()
        self._released.set()

    async def until_released(self, position: int) -> None:
        """Until the broker has everything before `position` in its log."""
        if self._ring.consumer < position:
            async with self._lock:
                while self._ring.position < position and await self._send_block():
                    pass
                await self._beat(acknowledge=True)
        while self._ring.consumer < position:
            self._released.clear()
            await self._released.wait()

    async def drain(self) -> None:
        """Send what is there now, tell what is missing, and wait until the broker has it."""
        async with self._lock:
            while await self._send_block():
                pass
            self._losses.look(asyncio.get_running_loop().time())
            await self._tell_losses(asyncio.get_running_loop().time(), force=True)
        await self.until_released(self._ring.position)
