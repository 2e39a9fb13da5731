# SPDX-License-Identifier: Apache-2.0
"""A broker between simulated agents and cheap monitors, each in a process of its own; and one round of events through them."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.blocks import Shape
from bench.crew import Clock, Worker, worker

_BROKER = Path(sys.executable).parent / "kmonitor-broker"


@dataclass(frozen=True, slots=True)
class Round:
    """What it took to bring so many events from the agents to the last monitor. All were delivered: it was counted."""

    events: int
    """In to the broker."""
    delivered: int
    bytes: int
    """Of events, as they were delivered."""
    messages: int
    """... in so many."""
    message: int
    """Bytes of the largest that was kept."""
    seconds: float
    broker_ns: int
    """CPU time, as the next two."""
    agents_ns: int
    monitors_ns: int

    @property
    def rate(self) -> float:
        """Events a second, in to the broker and out to all who want them."""
        return self.events / self.seconds

    @property
    def cost(self) -> float:
        """Nanoseconds of the broker's CPU for an event."""
        return self.broker_ns / self.events

    @property
    def busy(self) -> str:
        """Who had how much of a CPU."""
        shares = [f"{who} {ns / self.seconds / 1e7:.0f} %" for who, ns in zip(("broker", "agents", "monitors"), self._costs(), strict=True)]
        return "of a CPU " + ", ".join(shares)

    def _costs(self) -> tuple[int, int, int]:
        return self.broker_ns, self.agents_ns, self.monitors_ns


@dataclass(slots=True)
class Rig:
    """One broker with its agents and monitors."""

    broker_pid: int
    agents: Worker
    monitors: Worker
    nodes: int = 0
    streams: int = 0
    """Monitors."""
    shape: Shape = dataclasses.field(default_factory=Shape)

    def connect(self, nodes: int, shape: Shape) -> None:
        """So many more agents; all of them send blocks of this shape."""
        self.nodes = self.agents.do(connect=nodes)["agents"]
        self.send(shape)

    def send(self, shape: Shape) -> None:
        """From now on blocks of this shape."""
        self.shape = shape
        self.agents.do(shape=dataclasses.asdict(shape))

    def watch(self, monitors: int, **how: Any) -> None:
        """So many more monitors: see bench.sink.Sinks.open."""
        self.streams = self.monitors.do(monitors=monitors, nodes=self.nodes, **how)["monitors"]

    def run(self, blocks: int) -> Round:
        """So many blocks from each agent, until all monitors have all that is theirs. Raises SystemExit if they do not get it."""
        self.monitors.do(expect=self.nodes)
        clocks = [Clock(pid) for pid in (self.broker_pid, self.agents.pid, self.monitors.pid)]
        self.monitors.tell(ended=True)
        sent = self.agents.do(blocks=blocks)
        ended = self.monitors.answer()["ended"]
        broker_ns, agents_ns, monitors_ns = (clock.ns() for clock in clocks)
        got = self.monitors.do(count=True)
        wanted = sent["watched"] if self.shape.every else sent["records"] * self.streams
        if got["events"] != wanted:
            raise SystemExit(f"bench: {got['events']} events were delivered of {wanted}")
        seconds = ended - sent["began"]
        costs = broker_ns, agents_ns, monitors_ns
        return Round(sent["records"], got["events"], got["bytes"], got["messages"], got["sample"], seconds, *costs)


@contextlib.contextmanager
def rig(*options: str) -> Iterator[Rig]:
    """With a broker that keeps its log in memory, or as the options say."""
    with contextlib.ExitStack() as running:
        argv = [str(_BROKER), "--listen", "127.0.0.1:0", *(options or ("--log", "memory"))]
        broker = running.enter_context(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))
        running.callback(broker.kill)
        assert broker.stdout is not None
        said = broker.stdout.readline().strip()
        if not said:
            raise SystemExit("bench: the broker did not start; see above")
        address = said.rsplit(" ", 1)[1]
        agents, monitors = (running.enter_context(worker(f"bench.{name}", address)) for name in ("simulated", "sink"))
        running.callback(broker.kill)  # before them: it would complain about each stream that breaks
        for each in (agents, monitors):
            running.callback(each.hold)
        yield Rig(broker.pid, agents, monitors)
