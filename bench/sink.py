# SPDX-License-Identifier: Apache-2.0
"""Monitors that cost next to nothing, in a process of their own: they take bytes, and look into them once the clock has stopped.

    .venv/bin/python -m bench.sink HOST:PORT

Obeys lines of JSON (see bench/worker.py): {"monitors": N, ...} opens streams, each with a connection of its own, see `Sinks.open`;
{"until": N} waits until each has come to the end of N nodes' streams, answers when that was, and then what all of them got. A gap, or a
hole that can be seen in what came, ends the measurement: rates of a stream that lost events mean nothing.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import grpc.aio

from bench.blocks import FIRST_PID, LAST
from bench.crew import CHANNEL_OPTIONS, give_up, obey, spawn
from kmonitor.v1 import monitor_pb2
from kmonitor.wire.masks import EventType

_ALL = sum(EventType)
_EVENTS, _GAP = 0x0A, 0x22  # the first byte of such a Notification
_TAIL = 320
"""Bytes in which a message's last event lies, and the batch's boot id behind it."""
_BOOT_ID = 38
"""Bytes of EventBatch.boot_id, which comes last, with its tag and length."""
_ARMED = (monitor_pb2.REGISTRATION_STATE_ARMED, monitor_pb2.REGISTRATION_STATE_RUNNING)


class Monitor:
    """One stream of MonitorService.Subscribe."""

    def __init__(self, address: str, pids: range, *, keeps: bool) -> None:
        """`pids` to register one by one; none: everything. `keeps` messages to decode them all afterwards, or only counts their bytes."""
        self.pids = pids
        self.idle = False
        """Nothing is to come for it."""
        self.keeps = keeps
        self.kept: list[bytes] = []
        self.bytes = 0
        """Of events, without the batches around them: that does not depend on how they were cut into messages."""
        self.messages = 0
        self.lasts = 0
        self.last_at = 0.0
        self.wanted = 0
        self.ended = asyncio.Event()
        self.armed = asyncio.Event()
        self._answers = 0
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._call: Any = None
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, nodes: int, comm: str) -> None:
        """Until all is armed on so many nodes."""
        self._answers = nodes * max(len(self.pids), 1)
        request = monitor_pb2.SubscribeRequest(linger_ms=0)
        for pid in self.pids:
            request.registrations.add(event_mask=_ALL).target.process.pid = pid
        if not self.pids:
            request.registrations.add(event_mask=_ALL).target.everything.SetInParent()
            if comm:
                request.registrations[0].filter.comms.append(comm)
        subscribe: Any = self._channel.unary_stream("/kmonitor.v1.MonitorService/Subscribe")
        self._call = subscribe(request.SerializeToString())
        self._tasks = [spawn(self._receive())]
        await self.armed.wait()

    async def close(self) -> None:
        """End the stream for good."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._call.cancel()
        await self._channel.close()

    def expect(self, lasts: int) -> None:
        """Begin to count; `ended` is set after so many streams' ends."""
        self.kept, self.bytes, self.messages, self.lasts, self.wanted = [], 0, 0, 0, lasts
        self.ended.clear()

    async def _receive(self) -> None:
        while raw := await self._call.read():
            if raw[0] == _EVENTS:
                self._take(raw)
            elif raw[0] == _GAP:
                give_up(f"a monitor was told of a gap: {monitor_pb2.Notification.FromString(raw).gap}")
            elif not self.armed.is_set():
                self._look(monitor_pb2.Notification.FromString(raw))

    def _take(self, raw: bytes) -> None:
        self.messages += 1
        if self.keeps:
            self.kept.append(raw)
        self.bytes += _events_bytes(raw)
        if raw.find(LAST, max(len(raw) - _TAIL, 0)) >= 0:
            self.lasts += 1
            if self.lasts == self.wanted:
                self.last_at = time.monotonic()
                self.ended.set()

    def _look(self, said: monitor_pb2.Notification) -> None:
        if said.WhichOneof("kind") != "registered":
            return
        if said.registered.HasField("error") or said.registered.state not in _ARMED:
            give_up(f"a registration was not armed: {said.registered}")
        self._answers -= 1
        if self._answers == 0:
            self.armed.set()

    def count(self) -> int:
        """Events among the kept messages. What is not in order, or not its own, ends the measurement."""
        events = 0
        positions: dict[str, int] = {}
        for raw in self.kept:
            batch = monitor_pb2.Notification.FromString(raw).events
            at = positions.get(batch.node, -1)
            for event in batch.events:
                if event.position <= at:
                    give_up(f"an event at {event.position} came behind one at {at}")
                at = event.position
                if self.pids and event.pid not in self.pids:
                    give_up(f"a monitor of {self.pids} got an event of process {event.pid}")
            positions[batch.node] = at
            events += len(batch.events)
        return events


class Sinks:
    """All monitors of this process."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._monitors: list[Monitor] = []

    async def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """One command; what to answer."""
        if "monitors" in command:
            return await self.open(**command)
        if "expect" in command:
            for monitor in self._monitors:
                monitor.expect(command["expect"])
            return {}
        if "ended" in command:
            waited = [monitor for monitor in self._monitors if not monitor.idle]
            for monitor in waited:
                await monitor.ended.wait()
            return {"ended": max(monitor.last_at for monitor in waited)}
        return self._count()

    async def open(
        self, monitors: int, *, each: int = 0, nodes: int = 1, comm: str = "", keep: int = 1 << 30, idle: bool = False
    ) -> dict[str, Any]:
        """So many more. Each registers `each` processes of its own, or everything, that has a `comm`, if any is given; it holds on `nodes`
        nodes. `keep`: how many keep all they get. `idle`: nothing is to come for these."""
        have = len(self._monitors)
        new = []
        for number in range(have, have + monitors):
            pids = range(FIRST_PID + number * each, FIRST_PID + (number + 1) * each)
            new.append(Monitor(self._address, pids, keeps=number < keep))
            new[-1].idle = idle
        self._monitors += new
        # The broker takes a long request at one go, during which it hears no agent.
        together = 50 if each <= 100 else 1
        for start in range(0, len(new), together):
            await asyncio.gather(*(monitor.open(nodes, comm) for monitor in new[start : start + together]))
        return {"monitors": len(self._monitors)}

    def _count(self) -> dict[str, Any]:
        """Of monitors that keep nothing, as many events as of the others, if they got as many bytes."""
        counted = [(monitor.count(), monitor) for monitor in self._monitors if monitor.keeps]
        others = [monitor for monitor in self._monitors if not monitor.keeps]
        events = sum(count for count, _ in counted)
        if others:
            first, model = counted[0]
            if any(monitor.bytes != model.bytes for monitor in others):
                give_up("monitors of the same stream got different events")
            events += first * len(others)
        said = {
            "events": events,
            "bytes": sum(monitor.bytes for monitor in self._monitors),
            "messages": sum(monitor.messages for monitor in self._monitors),
            "sample": len(max(self._monitors[0].kept, key=len, default=b"")),
        }
        for monitor in self._monitors:
            monitor.kept = []
        return said

    async def close(self) -> None:
        """End all streams."""
        await asyncio.gather(*(monitor.close() for monitor in self._monitors))


def _events_bytes(raw: bytes) -> int:
    """Of a Notification's EventBatch.events, with the tags and lengths of its events."""
    at = 1
    while raw[at] & 0x80:
        at += 1
    at += 3 + raw[at + 2] + 9  # behind the length: tag, length and bytes of EventBatch.node; then .epoch
    return len(raw) - at - _BOOT_ID


async def main() -> None:
    """Until the end of standard input."""
    sinks = Sinks(sys.argv[1])
    try:
        await obey(sinks.do)
    finally:
        await sinks.close()


if __name__ == "__main__":
    asyncio.run(main())
