# SPDX-License-Identifier: Apache-2.0
"""What an event costs the broker as registrations, agents and monitors become more: its own CPU time, which others do not take."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from bench.blocks import Shape
from bench.figure import Figure, Plan, Result, Series, paired, summary
from bench.rig import Rig, Round, rig

_GROUP = "growth"
_ACTIVE = 10
"""Monitors to which the events of watched processes go, however many others there are."""
_IDLE_EACH = 1000
_REPEATS = 15
_PLACES = 256
"""Messages of a repetition."""
_LOG = ("--log", "memory", "--log-bytes", "128M", "--lease", "60s")
"""More than is sent in a round: the broker does not make agents wait for monitors, and one that falls behind must find it in the log."""


@dataclass(slots=True)
class _Line:
    """One thing that grows."""

    name: str
    counts: list[int]
    start: Callable[[Rig, int], None]
    """Make so many of it."""
    blocks: Callable[[int], int]
    """A round, of each agent, with so many of it."""
    shape: Shape | None = None
    """If it is not the one that `start` leaves."""
    rounds: list[list[Round]] = field(default_factory=list)
    """By count."""

    def costs(self, at: int) -> list[float]:
        """Nanoseconds an event, with counts[at]."""
        return [each.cost for each in self.rounds[at]]


def measure(plan: Plan) -> Result:
    """One line after the other; the counts of a line are measured in turn."""
    result = Result()
    registrations = _Line("registrations", [10, 1000, 100_000], _registrations, lambda _: 300)
    agents = _Line("agents", [1, 10, 100, 1000], _agents, lambda count: 1000 // count)
    small = _Line("agents, with blocks of 10 events", [1, 10, 100, 1000], _agents, lambda count: 1000 // count, Shape(slots=10))
    monitors = _Line("monitors", [1, 10, 100, 1000], _monitors, lambda count: max(1000 // count, 4))
    if plan.quick:
        registrations.counts, registrations.blocks = [10, 100], lambda _: 10
        for line in (agents, small, monitors):
            line.counts, line.blocks = [1, 10], lambda _: 10
    for together in ([registrations], [agents, small], [monitors]):
        _measure(together, turns=1 if plan.quick else 3, quick=plan.quick)
    for at in range(1, len(registrations.counts)):
        _ratio(result, registrations, at, target=1.2)
    for at in range(1, len(agents.counts)):
        _ratio(result, agents, at, target=None)
    _ratio(result, small, len(small.counts) - 1, target=None)
    _slope(result, monitors)
    for line in (registrations, agents, small):
        y = [summary(line.costs(at))[0] for at in range(len(line.counts))]
        result.series.append(
            Series(_GROUP, f"CPU for an event: {line.name}", "broker", line.counts, y, line.name.split(",")[0], "ns an event", log_x=True)
        )
    result.notes += [
        f"Registrations of one pid each. In all cases 1 event in 100 is wanted, by one of the same {_ACTIVE} monitors, of up to "
        f"{_IDLE_EACH * _ACTIVE} processes in turn; what goes beyond those is registered by others, {_IDLE_EACH} each.",
        "Agents: the same events altogether, in blocks of 250, or of 10, node-wide to one monitor.",
        "A 128 MiB log in memory; leases of 60 s: those of the default 3 s run out when 1,000 agents send as fast as they can.",
    ]
    return result


def _registrations(ready: Rig, count: int) -> None:
    each = min(count // _ACTIVE, _IDLE_EACH)
    ready.connect(1, Shape(watched=_ACTIVE * each, every=100, owners=_ACTIVE))
    ready.watch(_ACTIVE, each=each)
    if count > _ACTIVE * each:
        ready.watch(count // each - _ACTIVE, each=each, idle=True)


def _agents(ready: Rig, count: int) -> None:
    ready.connect(count, Shape(slots=250))
    ready.watch(1)


def _monitors(ready: Rig, count: int) -> None:
    ready.connect(1, Shape())
    ready.watch(count, keep=1)


def _measure(lines: list[_Line], *, turns: int, quick: bool) -> None:
    """Lines of the same counts and things, on the same brokers."""
    first = lines[0]
    with contextlib.ExitStack() as running:
        rigs = [running.enter_context(rig(*_LOG)) for _ in first.counts]
        for ready, count in zip(rigs, first.counts, strict=True):
            first.start(ready, count)
        for line in lines:
            line.rounds = [[] for _ in line.counts]
            for ready, count in zip(rigs, line.counts, strict=True):
                if line.shape is not None:
                    ready.send(line.shape)
                if not quick:
                    ready.run(line.blocks(count))
            for turn in range(turns):
                for at in range(len(rigs)):
                    number = (at + turn) % len(rigs)
                    line.rounds[number].append(rigs[number].run(line.blocks(line.counts[number])))


def _ratio(result: Result, line: _Line, at: int, *, target: float | None) -> None:
    base, costs = line.costs(0), line.costs(at)
    value, low, high = paired(costs, base)
    against = f"{summary(costs)[0]:,.0f} ns an event and {summary(base)[0]:,.0f}"
    what = f"{line.counts[at]:,} against {line.counts[0]:,} {line.name}: CPU for an event"
    result.figures.append(Figure(_GROUP, what, value, "x", low, high, len(costs), target, against=against))


def _slope(result: Result, line: _Line) -> None:
    """What each further monitor costs, beside a copy of what it gets in memory, and a plain write of it to a socket."""
    last = len(line.counts) - 1
    size = summary([each.bytes / each.delivered for each in line.rounds[last]])[0]
    message = int(summary([each.bytes / each.messages for each in line.rounds[last]])[0])
    copied, sent = (summary(taken) for taken in (_copies(message, size), _sends(message, size)))
    count = len(line.rounds[0])
    for at in range(1, last + 1):
        more = line.counts[at] - line.counts[0]
        slopes = [(cost - base) / more for cost, base in zip(line.costs(at), line.costs(0), strict=True)]
        value, low, high = summary(slopes)
        against = f"{value / copied[0]:.1f} copies, {value / sent[0]:.1f} writes"
        what = f"from {line.counts[0]} to {line.counts[at]:,} monitors: CPU for an event and monitor"
        result.figures.append(Figure(_GROUP, what, value, "ns", low, high, count, against=against))
    for what, taken in (("copying an event in memory", copied), ("writing an event to a socket on loopback", sent)):
        result.figures.append(Figure(_GROUP, f"{what}, {message / 1024:.0f} KiB at a time", *_spread(taken)))
    plot = "CPU for an event: monitors"
    axes = ("monitors", "ns an event")
    costs = [summary(line.costs(at))[0] for at in range(last + 1)]
    result.series.append(Series(_GROUP, plot, "broker", line.counts, costs, *axes, log_x=True, log_y=True))
    for name, taken in (("a copy in memory for each", copied), ("a write to a socket for each", sent)):
        y = [taken[0] * monitors for monitors in line.counts]
        result.series.append(Series(_GROUP, plot, name, line.counts, y, *axes, log_x=True, log_y=True))


def _spread(taken: tuple[float, float, float]) -> tuple[float, str, float, float, int]:
    return taken[0], "ns", taken[1], taken[2], _REPEATS


def _copies(message: int, event: float) -> tuple[float, float, float]:
    """Nanoseconds for copying an event's bytes, messages at a time, as far as caches go each to another place."""
    source = np.ones(message, dtype=np.uint8)
    room = np.zeros((_PLACES, message), dtype=np.uint8)
    taken = []
    for _ in range(_REPEATS):
        began = time.thread_time_ns()
        for place in range(_PLACES):
            np.copyto(room[place], source)
        taken.append((time.thread_time_ns() - began) / (_PLACES * message / event))
    return summary(taken)


def _sends(message: int, event: float) -> tuple[float, float, float]:
    """The same for writing them to a TCP connection: the writer's CPU time."""
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_connection(listening.getsockname()) as writer:
        reader, _ = listening.accept()
        draining = threading.Thread(target=_drain, args=(reader,))
        draining.start()
        data = bytes(message)
        taken = []
        for _ in range(_REPEATS):
            began = time.thread_time_ns()
            for _ in range(_PLACES):
                writer.sendall(data)
            taken.append((time.thread_time_ns() - began) / (_PLACES * message / event))
        writer.shutdown(socket.SHUT_RDWR)
        draining.join()
        reader.close()
    return summary(taken)


def _drain(reader: socket.socket) -> None:
    buffer = bytearray(1 << 20)
    while reader.recv_into(buffer):
        pass
