# SPDX-License-Identifier: Apache-2.0
"""Simulated agents, in a process of their own: what the broker sees of them is what it sees of real ones.

    .venv/bin/python -m bench.simulated HOST:PORT

Obeys lines of JSON (see bench/worker.py): {"connect": N} more agents, each with a connection of its own; {"shape": {...}} of what they
send; {"blocks": N} from each of them, as fast as the broker takes them. They say that whatever process they are asked for runs.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from typing import Any

import grpc.aio

from bench.blocks import BOOT_ID, START_STEP_NS, Shape, Stream
from bench.crew import CHANNEL_OPTIONS, give_up, obey, spawn
from kmonitor.v1 import agent_pb2, monitor_pb2
from kmonitor.wire.record import RECORD_SIZE, RECORD_VERSION, SLOT_SIZE

_START = 1 << 20
_IN_FLIGHT_MOST = 4  # as the agent's: see agent/kmonitor/agent/forwarder.py
_HEARTBEAT_S = 1.0


class Agent:
    """One node's."""

    def __init__(self, address: str, number: int) -> None:
        self.node = f"node-{number:04}"
        self.stream = Stream(Shape(slots=1), _START)
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._number = number
        self._call: Any = None
        self._tasks: list[asyncio.Task[None]] = []
        self._in_flight: deque[int] = deque()
        self._room = asyncio.Event()
        self._lock = asyncio.Lock()
        self._applied = 0

    async def connect(self) -> None:
        """Until the broker has welcomed it."""
        self._call = self._channel.stream_stream("/kmonitor.v1.AgentService/Connect")()
        hello = agent_pb2.Hello(
            node=self.node, boot_id=BOOT_ID, epoch=7, position=_START, record_version=RECORD_VERSION, record_size=RECORD_SIZE,
            slot_size=SLOT_SIZE, source="core", scope="host", infers_exits=True, reads_pidfiles=True, ring_bytes=8 << 20,
            kernel_release="6.12.0", agent_version="bench",
        )  # fmt: skip
        await self._call.write(agent_pb2.AgentMessage(hello=hello).SerializeToString())
        first = agent_pb2.BrokerMessage.FromString(await self._call.read())
        if first.WhichOneof("kind") != "welcome":
            give_up("the broker did not welcome a simulated agent")
        self._tasks = [spawn(self._receive()), spawn(self._beat())]

    async def close(self) -> None:
        """End the stream."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._call.cancel()
        await self._channel.close()

    def take(self, shape: Shape) -> None:
        """Send blocks of this shape from now on."""
        self.stream = Stream(shape, self.stream.position)

    async def send(self, blocks: int) -> None:
        """So many blocks, the last of which says that it is; until the broker has got them."""
        for left in range(blocks - 1, -1, -1):
            while len(self._in_flight) >= _IN_FLIGHT_MOST:
                await self._until_acknowledged()
            message = self.stream.message(last=left == 0)
            self._in_flight.append(self.stream.position)
            await self._write(message)
        while self._in_flight:
            await self._until_acknowledged()

    async def _until_acknowledged(self) -> None:
        self._room.clear()
        await self._room.wait()

    async def _write(self, message: bytes) -> None:
        async with self._lock:  # gRPC takes one at a time
            await self._call.write(message)

    async def _receive(self) -> None:
        while raw := await self._call.read():
            message = agent_pb2.BrokerMessage.FromString(raw)
            kind = message.WhichOneof("kind")
            if kind == "ack":
                got = max(message.ack.received, message.ack.position)
                while self._in_flight and self._in_flight[0] <= got:
                    self._in_flight.popleft()
                self._room.set()
            elif kind == "interest":
                await self._write(agent_pb2.AgentMessage(applied=self._apply(message.interest)).SerializeToString())

    def _apply(self, interest: agent_pb2.Interest) -> agent_pb2.InterestApplied:
        self._applied += 1
        at = self.stream.position
        answer = agent_pb2.InterestApplied(version=interest.version, position=at, end_position=at, number=self._applied)
        for wanted in interest.processes:
            if wanted.event_mask and wanted.look_up:
                start = wanted.pid * START_STEP_NS
                result = answer.processes.add(
                    pid=wanted.pid, start_time=wanted.start_time, state=monitor_pb2.RegistrationState.REGISTRATION_STATE_RUNNING
                )
                result.process.pid, result.process.start_time, result.process.ppid, result.process.comm = wanted.pid, start, 1, "watched"
        return answer

    async def _beat(self) -> None:
        # Spread, as those of agents that were not started by one program.
        await asyncio.sleep(_HEARTBEAT_S * (self._number % 50) / 50)
        while True:
            beat = agent_pb2.Heartbeat(position=self.stream.position, time_unix_nano=time.time_ns())
            await self._write(agent_pb2.AgentMessage(heartbeat=beat).SerializeToString())
            await asyncio.sleep(_HEARTBEAT_S)


class Agents:
    """All of this process."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._agents: list[Agent] = []

    async def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """One command; what to answer."""
        if "connect" in command:
            have = len(self._agents)
            new = [Agent(self._address, number) for number in range(have, have + command["connect"])]
            for start in range(0, len(new), 50):
                await asyncio.gather(*(agent.connect() for agent in new[start : start + 50]))
            self._agents += new
            return {"agents": len(self._agents)}
        if "shape" in command:
            for agent in self._agents:
                agent.take(Shape(**command["shape"]))
            return {}
        streams = [agent.stream for agent in self._agents]
        before = sum(stream.records for stream in streams), sum(stream.watched for stream in streams)
        began = time.monotonic()
        await asyncio.gather(*(agent.send(command["blocks"]) for agent in self._agents))
        after = sum(stream.records for stream in streams), sum(stream.watched for stream in streams)
        return {"began": began, "ended": time.monotonic(), "records": after[0] - before[0], "watched": after[1] - before[1]}

    async def close(self) -> None:
        """End all streams."""
        await asyncio.gather(*(agent.close() for agent in self._agents))


async def main() -> None:
    """Until the end of standard input."""
    agents = Agents(sys.argv[1])
    try:
        await obey(agents.do)
    finally:
        await agents.close()


if __name__ == "__main__":
    asyncio.run(main())
