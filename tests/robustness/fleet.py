# SPDX-License-Identifier: Apache-2.0
"""Very many agents in one process: the agent's own connection code, each with a ring in memory, and processes that are only said to be.

    python -m tests.robustness.fleet HOST:PORT AGENTS REGISTRATIONS

So many registrations are made of them, each of one process: see `place`. Whatever process an agent is asked for runs, until a line on
standard input, "end FIRST STEP", says that those of every STEP-th registration from FIRST on end. A line on standard output says that
all agents are connected; "again" on standard input has it said again, of connections from then on. "late" has it
say for how long its own loop was held up since: agents that a starved process does not get to are rightly taken for unreachable.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Coroutine
from functools import partial
from typing import Any

from kmonitor.agent.forwarder import Forwarder
from kmonitor.agent.identity import Identity
from kmonitor.agent.sources.memory_ring import MemoryRing, Pause
from kmonitor.agent.sources.memory_tables import MemoryControl
from kmonitor.agent.uplink import Uplink
from kmonitor.v1 import agent_pb2, monitor_pb2
from kmonitor.wire.descriptors import raise_file_limit
from kmonitor.wire.masks import EventType
from kmonitor.wire.record import F_MATCH_PROCESS, RECORD_VERSION

RING_BYTES = 256 << 10
_EXIT = int(EventType.PROCESS_EXIT)
_FIRST_PID = 1000
_START_STEP_NS = 1_000_000
_TICK_S = 0.1


def node_name(number: int) -> str:
    """Of the agent with this number."""
    return f"n{number:04}"


def place(registration: int, agents: int) -> tuple[str, int]:
    """Node and pid that the registration with this number is of: no two are of the same process."""
    return node_name(registration % agents), _FIRST_PID + registration // agents


class Feed:
    """What is made from is a ring in memory."""

    name = "netlink"
    secret = b"it lies with the ring"
    record_version = RECORD_VERSION

    def __init__(self) -> None:
        self.epoch = 7
        self.control = MemoryControl(lambda: None)
        self.ring = MemoryRing(RING_BYTES, self.control, Pause)
        # Positions at which monitors have a cursor: none can say that nothing was taken of a node from 0 on.
        self.ring.position = self.ring.consumer = self.ring.producer = RING_BYTES

    def begin_epoch(self) -> None:
        """Name the ring anew."""
        self.epoch += 1


class Agent(Uplink):
    """One node's."""

    def __init__(self, address: str, number: int, fleet: Fleet) -> None:
        self.feed = Feed()
        super().__init__(address, Identity(node_name(number), "host"), self.feed)
        self.name = node_name(number)
        self.connections = 0
        self._fleet = fleet
        self._gone: set[int] = set()
        self._answers = 0
        self._forwarder: Forwarder | None = None

    def end(self, pid: int) -> None:
        """The process ends; a process that is watched, as all are."""
        self._gone.add(pid)
        now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        self.feed.ring.append(_EXIT, F_MATCH_PROCESS, now, pid * _START_STEP_NS, pid, pid, 1, 0, 0, b"watched")
        if self._forwarder is not None:
            self._forwarder.wake()

    def _add_to_hello(self, hello: agent_pb2.Hello) -> None:
        hello.infers_exits = True

    def _connected(self) -> None:
        self.connections += 1
        self._fleet.connected(self)

    def _jobs(self, forwarder: Forwarder) -> list[Coroutine[Any, Any, Any]]:
        self._forwarder = forwarder
        return []

    async def _disconnected(self) -> None:
        self._forwarder = None

    async def _take(self, message: agent_pb2.BrokerMessage, forwarder: Forwarder) -> None:
        kind = message.WhichOneof("kind")
        if kind == "interest":
            await forwarder.answer(partial(self._apply, message.interest))
        elif kind == "infer_exits":
            # Each end was recorded: the broker is to have it before it asks.
            self._fleet.give_up(f"{self.name}: asked for ends that nobody saw: {message.infer_exits}")

    async def _apply(self, interest: agent_pb2.Interest) -> agent_pb2.AgentMessage:
        self._answers += 1
        at = self.feed.ring.producer
        answer = agent_pb2.InterestApplied(
            version=interest.version,
            position=at,
            end_position=at,
            number=self._answers,
            boottime_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        )
        for wanted in interest.processes:
            if not wanted.event_mask or not wanted.look_up:
                continue
            result = answer.processes.add(pid=wanted.pid, start_time=wanted.start_time)
            if wanted.pid in self._gone:
                result.state = monitor_pb2.REGISTRATION_STATE_EXITED
            else:
                result.state = monitor_pb2.REGISTRATION_STATE_RUNNING
                result.process.pid, result.process.start_time, result.process.comm = wanted.pid, wanted.pid * _START_STEP_NS, "watched"
        return agent_pb2.AgentMessage(applied=answer)


class Fleet:
    """All of them."""

    def __init__(self, address: str, agents: int, registrations: int) -> None:
        self._registrations = registrations
        self._agents = [Agent(address, number, self) for number in range(agents)]
        self._missing: set[Agent] = set(self._agents)
        self._late_s = 0.0
        """For so long this process was held up, since "again"."""

    def connected(self, agent: Agent) -> None:
        """The broker has welcomed it."""
        self._missing.discard(agent)
        if not self._missing:
            self._say()

    def _say(self) -> None:
        print(json.dumps({"connected": time.monotonic(), "connections": sum(agent.connections for agent in self._agents)}), flush=True)

    def give_up(self, why: str) -> None:
        """Something is wrong that a measurement must not pass over."""
        print(json.dumps({"wrong": why}), flush=True)

    def do(self, line: str) -> None:
        """What standard input says."""
        word, *numbers = line.split()
        if word == "again":
            self._missing = set(self._agents)
            self._late_s = 0.0
            for agent in self._agents:
                agent.connections = 0
        elif word == "late":
            print(json.dumps({"late_s": self._late_s}), flush=True)
        elif word == "end":
            by_name = {agent.name: agent for agent in self._agents}
            first, step = map(int, numbers)
            for registration in range(first, self._registrations, step):
                name, pid = place(registration, len(self._agents))
                by_name[name].end(pid)
            print(json.dumps({"ended": len(range(first, self._registrations, step))}), flush=True)

    async def _watch_clock(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            due = clock() + _TICK_S
            await asyncio.sleep(_TICK_S)
            self._late_s = max(self._late_s, clock() - due)

    async def run(self) -> None:
        """Until the end of standard input."""
        tasks = [asyncio.create_task(agent.run()) for agent in self._agents]
        for task in tasks:
            task.add_done_callback(self._look)
        tasks.append(asyncio.create_task(self._watch_clock()))
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            self.do(line)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _look(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.give_up(f"an agent has ended: {type(error).__name__}: {error}")


if __name__ == "__main__":
    logging.getLogger("kmonitor-agent").setLevel(logging.ERROR)  # a thousand of them would say that the broker is away
    raise_file_limit()
    asyncio.run(Fleet(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])).run())
