# SPDX-License-Identifier: Apache-2.0
"""What goes through one broker process: from a simulated agent, in blocks as real ones send them, to monitors that only count.

All of it is on one machine: the broker has the CPU that agents and monitors leave it. Its CPU time for an event is a figure of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.blocks import Shape
from bench.figure import Figure, Plan, Result, paired, summary
from bench.nats import NatsRound, nats
from bench.rig import Rig, Round, rig

_GROUP = "throughput"
_MONITORS = 100
_ONE = 100  # registrations of each of them
_LOG_FULL = 2_200_000  # events: the log in memory is full, and drops for each block another one


@dataclass(slots=True)
class _Case:
    """One stream, and who watches it."""

    what: str
    shape: Shape
    blocks: int
    """A round, of one agent's."""
    monitors: int = 1
    each: int = 0
    log: str = "memory"
    target: float | None = None
    rounds: list[Round] = field(default_factory=list)

    @property
    def rig(self) -> tuple[int, int, str]:
        """Cases that have the same are run on one broker."""
        return self.monitors, self.each, self.log


def measure(plan: Plan) -> Result:
    """Rates of the broker, and of a nats-server for the same blocks, in turn."""
    result = Result()
    cases = _cases(quick=plan.quick)
    blocks: list[NatsRound] = []
    events: list[NatsRound] = []
    with contextlib.ExitStack() as running:
        peer = running.enter_context(nats(plan.scratch))
        started: dict[tuple[int, int, str], Rig] = {}
        for case in cases:
            if case.rig not in started:
                started[case.rig] = running.enter_context(_started(case, plan))
        rigs = [started[case.rig] for case in cases]
        if not plan.quick:
            for case, ready in zip(cases, rigs, strict=True):
                ready.send(case.shape)
                ready.run(_LOG_FULL // case.shape.slots if case.target else max(case.blocks // 2, 1))
        turns = 1 if plan.quick else 5
        for turn in range(turns):
            for at in range(len(cases)):
                number = (at + turn) % len(cases)
                rigs[number].send(cases[number].shape)
                cases[number].rounds.append(rigs[number].run(cases[number].blocks))
            if peer is not None:
                blocks.append(peer.run(cases[0].blocks * 4, whole=True))
                events.append(peer.run(cases[0].blocks, whole=False))
    for case in cases:
        _tell(result, case)
    if peer is None:
        result.notes.append("nats-server is not installed: nothing is compared with it")
    else:
        _compare(result, cases[0], blocks, events)
    result.notes += [
        "All events were counted where they arrived: none was lost. A block has 1,000 slots of 128 bytes, as a real agent's under load.",
        "Watched processes fork, and make and end threads, but do not end: the end of a process is the end of its registration.",
        *(f"{case.what}: {case.rounds[-1].busy}" for case in cases),
    ]
    return result


def _cases(*, quick: bool) -> list[_Case]:
    watching = Shape(watched=_MONITORS * _ONE, every=1000, owners=_MONITORS)
    cases = [
        _Case("node-wide, to one monitor", Shape(), 800, target=1_000_000),
        _Case("past 10,000 registrations of 100 monitors, 1 event in 1,000 wanted", watching, 800, _MONITORS, _ONE, target=2_000_000),
        _Case("the same, 1 event in 100 wanted", dataclasses.replace(watching, every=100), 300, _MONITORS, _ONE),
        _Case("the same, each event wanted by one of the 100", dataclasses.replace(watching, every=1), 20, _MONITORS, _ONE),
        _Case("node-wide, a tenth of it execs", Shape(execs=0.1), 300),
        _Case("node-wide, in blocks of 256 KiB", Shape(slots=2048), 300),
        _Case("node-wide, with the log in SQLite", Shape(), 400, log="sqlite"),
    ]
    if quick:
        for case in cases:
            case.blocks = max(case.blocks // 20, 1)
            if case.each:
                case.each = 2
                case.shape = dataclasses.replace(case.shape, watched=_MONITORS * 2)
    return cases


@contextlib.contextmanager
def _started(case: _Case, plan: Plan) -> Iterator[Rig]:
    log = "memory" if case.log == "memory" else f"sqlite:{plan.scratch / 'log.sqlite'}"
    with rig("--log", log) as made:
        made.connect(1, case.shape)
        made.watch(case.monitors, each=case.each)
        yield made


def _tell(result: Result, case: _Case) -> None:
    value, low, high = summary([each.rate for each in case.rounds])
    cost, cost_low, cost_high = summary([each.cost for each in case.rounds])
    count = len(case.rounds)
    figure = Figure(_GROUP, f"{case.what}: rate", value, "events/s", low, high, count, case.target, "more", f"{cost:,.0f} ns of CPU each")
    result.figures.append(figure)
    result.figures.append(Figure(_GROUP, f"{case.what}: broker's CPU for an event", cost, "ns", cost_low, cost_high, count))


def _compare(result: Result, case: _Case, blocks: list[NatsRound], events: list[NatsRound]) -> None:
    rates = [each.rate for each in case.rounds]
    several = (
        ("the same blocks", blocks, 0.5, "nats-server passes them on unread"),
        ("a message for each event", events, None, "its payload is the event as kmonitor encodes it, without the node's name"),
    )
    for what, rounds, target, against in several:
        value, low, high = summary([each.rate for each in rounds])
        cost = summary([each.server_ns / each.events for each in rounds])[0]
        name = f"nats-server, {what}"
        result.figures.append(
            Figure(_GROUP, f"{name}: rate", value, "events/s", low, high, len(rounds), against=f"{cost:,.0f} ns of CPU each; {against}")
        )
        value, low, high = paired(rates, [each.rate for each in rounds])
        result.figures.append(
            Figure(_GROUP, f"node-wide to one monitor against {name}", value, "x", low, high, len(rounds), target, "more")
        )
