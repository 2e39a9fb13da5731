# SPDX-License-Identifier: Apache-2.0
"""From the ring into one stream to the broker: blocks, losses, heartbeats, and the answers that must be in order with them."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from kmonitor.agent.interest import InterestTable
from kmonitor.agent.maps import LOST_FOLLOW, LOST_PROCESS, TYPE_BITS
from kmonitor.agent.source import Source
from kmonitor.v1 import agent_pb2, events_pb2
from kmonitor.wire.clocks import boottime_to_unix_ns
from kmonitor.wire.record import SLOT_SIZE

BLOCK_BYTES = 256 * 1024
_NAP_LEAST_S = 0.001
_NAP_MOST_S = 0.005
_RATE_WINDOW_S = 0.02
_NAP_SLOTS = 40
"""So many slots within about the window are a storm. A process that comes, execs and goes makes four."""
_BUSY_SECONDS = 0.0005

_IN_FLIGHT_MOST = 4
"""Blocks that the broker has not acknowledged. A broker that does not keep up gets larger blocks, not more of them: what waits
in the ring costs nothing, and what waits in gRPC costs both sides for each message."""

Write = Callable[[agent_pb2.AgentMessage], Awaitable[None]]
LostCounts = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(slots=True)
class _Loss:
    """Records that were not made, seen but not told yet: between which positions and times."""

    from_position: int
    from_time_ns: int
    to_position: int
    to_time_ns: int


class Forwarder:
    """One stream's sending side. Everything that is written goes through `_lock`: what the broker reads is in order.

    Owned by the event loop's thread, as are the ring and the maps.
    """

    def __init__(self, source: Source, interest: InterestTable, write: Write) -> None:
        self._source = source
        self._ring = source.ring
        self._interest = interest
        self._write = write
        self._lock = asyncio.Lock()
        self._wake = asyncio.Event()
        self._offset = boottime_to_unix_ns()
        self._complete_ns = 0
        self._told: LostCounts = source.control.lost()
        self._seen: LostCounts = self._told
        self._loss: _Loss | None = None
        self._in_flight: deque[int] = deque()
        """The position behind each block that is not acknowledged."""
        self._room = asyncio.Event()
        self._checked_position = self._ring.consumer
        self._checked_ns = time.time_ns()
        self.acknowledged = asyncio.Event()
        """Set whenever the ring was released up to what was read."""

    def totals(self) -> agent_pb2.Lost:
        """All losses of this epoch so far: for the hello, which makes them known to the broker."""
        self._told = self._seen = self._source.control.lost()
        # What the broker does not know of them was lost while there was no stream: since it last acknowledged.
        return _lost(self._told, _Loss(self._ring.consumer, 0, self._ring.producer, time.time_ns()))

    async def run(self) -> None:
        """Send what the ring holds, for ever. Nothing here is done once per event."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._ring.wakeups.fileno(), self._on_wakeup)
        drained_at = loop.time()
        level = 0.0  # slots of late: each counts for less the longer ago it was
        try:
            while True:
                while len(self._in_flight) >= _IN_FLIGHT_MOST:
                    self._room.clear()
                    await self._room.wait()
                sent = await self._send_block()
                if sent:
                    level += sent
                    continue
                now = loop.time()
                level *= math.exp((drained_at - now) / _RATE_WINDOW_S)
                drained_at = now
                # The more there is, the longer the nap: a block costs the broker some 0.2 ms, however little is in it.
                await self._wait(nap=min(_NAP_LEAST_S * level / _NAP_SLOTS, _NAP_MOST_S) if level > _NAP_SLOTS else 0.0)
        finally:
            loop.remove_reader(self._ring.wakeups.fileno())
            self._ring.awake()

    async def _wait(self, *, nap: float) -> None:
        """Until there may be something to read.

        A wake-up costs the process that forks more than the event does. So when events come fast the reader naps, as a
        network driver does (NAPI), and asks to be woken only when they come slowly; an urgent event wakes it all the same.
        """
        self._wake.clear()
        if nap > 0:
            await self._sleep(nap)
        elif self._ring.prepare_sleep():
            await self._wake.wait()
        else:
            # Reserved, and not committed yet: the probe is at it this moment on another CPU, or was interrupted.
            await asyncio.sleep(0)
            if self._ring.has_unread() and not self._ring.committed_ahead():
                await self._sleep(_BUSY_SECONDS)

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass

    def _on_wakeup(self) -> None:
        self._ring.awake()
        self._wake.set()

    async def _send_block(self) -> int:
        """Write one block; how many slots it had, 0 if there was none."""
        async with self._lock:
            self._look_for_losses()
            position = self._ring.position
            data = self._ring.read(BLOCK_BYTES)
            if data is None:
                await self._tell_losses()
                return 0
            self.acknowledged.clear()
            self._in_flight.append(self._ring.position)
            block = agent_pb2.Block(position=position, data=data, boottime_to_unix_ns=self._offset)
            await self._write(agent_pb2.AgentMessage(block=block))
            await self._tell_losses()
            return len(data) // SLOT_SIZE

    def _look_for_losses(self) -> None:
        """What is lost between two looks lies between the producer's position before the first and after the second."""
        before = self._ring.producer
        counts = self._source.control.lost()
        if counts != self._seen:
            now = time.time_ns()
            if self._loss is None:
                self._loss = _Loss(self._checked_position, self._checked_ns, 0, 0)
            self._loss.to_position = self._ring.producer
            self._loss.to_time_ns = now
            self._seen = counts
            self._checked_ns = now
        self._checked_position = before

    async def _tell_losses(self) -> None:
        """Once everything around them was sent: so a monitor hears of the gap where it is, and once for a long one."""
        if self._loss is not None and self._ring.position >= self._loss.to_position:
            loss, self._loss = self._loss, None
            self._told = self._seen
            await self._write(agent_pb2.AgentMessage(lost=_lost(self._told, loss)))

    async def heartbeat(self, seconds: float) -> None:
        """Renew the lease every so often, for ever."""
        while True:
            async with self._lock:
                now = time.time_ns()
                self._checked_ns = now if self._loss is None and self._source.control.lost() == self._seen else self._checked_ns
                if not self._ring.has_unread():
                    self._complete_ns = now
                beat = agent_pb2.Heartbeat(position=self._ring.position, time_unix_nano=self._complete_ns)
                await self._write(agent_pb2.AgentMessage(heartbeat=beat))
            self._offset = boottime_to_unix_ns()
            await asyncio.sleep(seconds)

    async def apply(self, interest: agent_pb2.Interest) -> None:
        """Arm the kernel, and answer before any record that comes of it."""
        async with self._lock:
            await self._write(agent_pb2.AgentMessage(applied=self._interest.apply(interest)))

    async def send(self, message: agent_pb2.AgentMessage) -> None:
        """Write a message that has no place in the order of events."""
        async with self._lock:
            await self._write(message)

    def release(self, position: int) -> None:
        """The broker has everything before `position`."""
        self._ring.release(position)
        while self._in_flight and self._in_flight[0] <= position:
            self._in_flight.popleft()
        self._room.set()
        if self._ring.consumer >= self._ring.position:
            self.acknowledged.set()

    async def drain(self) -> None:
        """Send what is there now, and wait until the broker has it."""
        while await self._send_block():
            pass
        if self._ring.consumer < self._ring.position:
            self.acknowledged.clear()
            await self.acknowledged.wait()


def _lost(counts: LostCounts, loss: _Loss | None) -> agent_pb2.Lost:
    message = agent_pb2.Lost()
    if loss is not None:
        message.from_position = loss.from_position
        message.to_position = loss.to_position
        message.from_time_unix_nano = loss.from_time_ns
        message.to_time_unix_nano = loss.to_time_ns
    for which, totals in enumerate(counts):
        for index, total in enumerate(totals):
            if total:
                # A child that could not be followed: any type of event may be missing, of processes that nobody knows.
                kind = events_pb2.EVENT_TYPE_UNSPECIFIED if index == LOST_FOLLOW else TYPE_BITS[index]
                message.counts.add(type=kind, watched=which == LOST_PROCESS, total=total)
    return message
