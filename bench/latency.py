# SPDX-License-Identifier: Apache-2.0
"""How long an event takes from the kernel's tracepoint to the monitor's Python code, over agent, broker and loopback.

    .venv/bin/python -m bench.latency [ROUNDS]

At rest, and under load. Beside it, in the same rounds: two bare grpc.aio hops (hops.py), and the proc connector read by Python on
the spot (ends.py). All processes are alive all the time; whoever's turn it is not sleeps. At rest a quiet time lies before each event.
It matters: in a virtual machine that slept, the same Python code takes three times as long.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.figure import Figure, Plan, Result, Series, paired, percentile, summary
from bench.report import show
from bench.stack import stack
from bench.worker import Worker, worker
from bench.workload import LOAD_EVENTS_S, Mortals, load, program

GROUP = "latency"
_P50_TARGET = 1.5
_P99_TARGET = 3.0
_QUIET_MS = 20.0, 25.0
_LOAD_GAP_MS = 8.0, 14.0
_BYTES = 128
"""Of a record."""
_TRIES = 10
_RESAMPLED = 400


@dataclass
class _Rounds:
    """Of one variant: the latencies of each round, in microseconds."""

    each: list[list[float]] = field(default_factory=list)

    def add(self, nanoseconds: Sequence[int]) -> None:
        self.each.append(sorted(taken / 1000 for taken in nanoseconds))

    @property
    def all(self) -> list[float]:
        """Ascending."""
        return sorted(taken for one in self.each for taken in one)

    @property
    def medians(self) -> list[float]:
        return [statistics.median(one) for one in self.each]


@dataclass
class _Ends:
    """The processes, all connected."""

    monitor: Worker
    drain: Worker
    connector: Worker
    sender: Worker
    receiver: Worker

    def exits(self, at: Worker, events: int, gap_ms: tuple[float, float], *, node_wide: bool = False) -> list[int]:
        """Latencies of processes that end one by one, and are watched by `at`."""
        mortals = Mortals(events)
        try:
            at.ask({"exits": mortals.pids, "node_wide": node_wide})
            mortals.end_all(gap_ms)
            taken: list[int] = at.answer()
        finally:
            mortals.close()
        return taken

    def floor(self, events: int, **what: object) -> list[int]:
        """Latencies of so many messages."""
        self.receiver.ask({"count": events})
        self.sender.send({"count": events, **what})
        taken: list[int] = self.receiver.answer()
        return taken


@dataclass
class _Load:
    """What there was under load, beside latencies."""

    seconds: float
    """That every event is taken for, a round."""
    batch_events: float = 50.0
    batches_s: float = 200.0
    rates: list[float] = field(default_factory=list)
    lost: int = 0

    def watched(self, ends: _Ends, events: int) -> list[int]:
        """Watched exits at one monitor, while another gets everything."""
        ends.drain.ask({"all": True, "batches": True})
        taken = ends.exits(ends.monitor, events, _LOAD_GAP_MS)
        told = ends.drain.ask("stop")
        self.lost += told["lost"]
        if told["batches"]:
            self.rates.append(told["events"] / told["seconds"])
            self.batch_events = told["events"] / told["batches"]
            self.batches_s = told["batches"] / told["seconds"]
        return taken

    def everything(self, ends: _Ends) -> list[int]:
        """All events, at one monitor. Raises SystemExit if none comes, many times longer than they gather in the agent."""
        for _ in range(_TRIES):
            ends.monitor.ask({"all": True, "batches": False})
            time.sleep(self.seconds)
            told = ends.monitor.ask("stop")
            self.lost += told["lost"]
            if told["taken"]:
                break
        else:
            raise SystemExit("bench: no event of the load has reached the monitor")
        self.rates.append(told["events"] / told["seconds"])
        taken: list[int] = told["taken"]
        return taken

    def floor(self, ends: _Ends) -> list[int]:
        """As many messages, as large, as the agent was seen to send at this load."""
        size = round(self.batch_events) * _BYTES
        return ends.floor(max(round(self.batches_s * self.seconds), 2), bytes=size, period_ms=1000 / self.batches_s)


Variants = dict[str, Callable[[], list[int]]]


def _run(rounds: int, variants: Variants, *, warm: int) -> dict[str, _Rounds]:
    """All variants each round, in another order each time; `warm` rounds more come first, and are not counted."""
    taken = {name: _Rounds() for name in variants}
    for number in range(-warm, rounds):
        for name in random.sample(list(variants), len(variants)):
            latencies = variants[name]()
            if number >= 0:
                taken[name].add(latencies)
    return taken


def measure(plan: Plan) -> Result:
    """The group's figures."""
    rounds, events, seconds = (1, 5, 0.6) if plan.quick else (9, 60, 1.2)
    return _measure(plan, rounds, events, seconds)


def _measure(plan: Plan, rounds: int, events: int, seconds: float) -> Result:
    pace = program(plan.build, "pace")
    warm = 0 if plan.quick else 1
    under = _Load(seconds)
    with contextlib.ExitStack() as running:
        relay = running.enter_context(worker("bench.hops", "relay"))
        connector = running.enter_context(worker("bench.ends", "connector"))
        log = f"sqlite:{plan.scratch / 'latency.sqlite'}"
        address, _, _ = running.enter_context(stack(log=log))
        relay_address = f"127.0.0.1:{relay.answer()}"
        monitor, drain = (running.enter_context(worker("bench.ends", "monitor", address)) for _ in range(2))
        sender, receiver = (running.enter_context(worker("bench.hops", role, relay_address)) for role in ("sender", "receiver"))
        ends = _Ends(monitor, drain, connector, sender, receiver)
        for each in (monitor, drain, connector, sender, receiver):
            each.answer()
        rest = _run(
            rounds,
            {
                "one pid": lambda: ends.exits(monitor, events, _QUIET_MS),
                "node-wide": lambda: ends.exits(monitor, events, _QUIET_MS, node_wide=True),
                "floor": lambda: ends.floor(events, bytes=_BYTES, gap_ms=_QUIET_MS),
                "connector": lambda: ends.exits(connector, events, _QUIET_MS),
            },
            warm=warm,
        )
        with load(pace, plan.scratch) as made:
            loaded = _run(
                rounds,
                {
                    "one pid": lambda: under.watched(ends, events),
                    "every event": lambda: under.everything(ends),
                    "floor": lambda: under.floor(ends),
                    "connector": lambda: ends.exits(connector, events, _LOAD_GAP_MS),
                },
                warm=warm,
            )
    result = Result()
    _tell(result, "at rest", rest)
    _tell(result, "under load", loaded)
    result.notes += [
        f"At rest: {_QUIET_MS[0]:.0f} to {_QUIET_MS[1]:.0f} ms of quiet before each event. Under load: {made.events_s:,.0f} events/s were "
        f"made of the {LOAD_EVENTS_S:,} wanted, {statistics.median(under.rates):,.0f} a second reached the monitors, {under.lost} were "
        f"lost. Batches had {under.batch_events:.0f} events, {under.batches_s:.0f} a second.",
        f"The floor: two bare grpc.aio hops through three processes, of {_BYTES} bytes at rest, and under load of as many bytes as often "
        "as monitors got batches. Its clock starts at the write: what our agent waits to fill a block is ours.",
        "One pid: the exit of a process that is registered by pid, under load with another monitor getting everything. p99 and their "
        f"ratios are of all rounds together; their quartiles are of {_RESAMPLED} times drawing as many rounds again.",
    ]
    return result


def _tell(result: Result, when: str, taken: dict[str, _Rounds]) -> None:
    floor, connector = taken["floor"], taken["connector"]
    for name, ours in taken.items():
        if ours not in (floor, connector):
            result.figures += _figures(f"{when}, {name}", ours, floor, connector)
        ascending = ours.all
        shares = [share / 100 for share in (1, 2, 5, *range(10, 100, 5), 97, 98, 99, 99.5)]
        result.series.append(
            Series(
                group=GROUP,
                plot=f"latency {when}",
                name={"floor": "two bare grpc.aio hops", "connector": "proc connector, Python"}.get(name, name),
                x=[percentile(ascending, share) for share in shares],
                y=shares,
                x_label="us from the kernel's timestamp to Python code",
                y_label="share of events",
                log_x=True,
            )
        )


def _figures(what: str, ours: _Rounds, floor: _Rounds, connector: _Rounds) -> list[Figure]:
    figures = []
    count = len(ours.all)
    middle, low, high = summary(ours.all)
    against = f"floor {_at(floor, 0.5):,.0f} us, proc connector {_at(connector, 0.5):,.0f} us"
    figures.append(Figure(GROUP, f"{what}: p50", middle, "us", low, high, count, against=against))
    ratio, low, high = paired(ours.medians, floor.medians)
    figures.append(Figure(GROUP, f"{what}: p50 over the floor's", ratio, "x", low, high, len(ours.each), _P50_TARGET))
    own, ratios = _resampled_p99(ours, floor)
    p99, floor_p99 = _at(ours, 0.99), _at(floor, 0.99)
    against = f"floor {floor_p99:,.0f} us, proc connector {_at(connector, 0.99):,.0f} us"
    figures.append(Figure(GROUP, f"{what}: p99", p99, "us", *summary(own)[1:], count, against=against))
    figures.append(Figure(GROUP, f"{what}: p99 over the floor's", p99 / floor_p99, "x", *summary(ratios)[1:], count, _P99_TARGET))
    return figures


def _at(rounds: _Rounds, share: float) -> float:
    return percentile(rounds.all, share)


def _resampled_p99(ours: _Rounds, floor: _Rounds) -> tuple[list[float], list[float]]:
    """p99, and its ratio to the floor's, if other rounds had been made: they are drawn from those that were."""
    own, ratios = [], []
    for _ in range(_RESAMPLED):
        drawn = random.choices(range(len(ours.each)), k=len(ours.each))
        p99 = _at(_Rounds([ours.each[number] for number in drawn]), 0.99)
        own.append(p99)
        ratios.append(p99 / _at(_Rounds([floor.each[number] for number in drawn]), 0.99))
    return own, ratios


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="bench.latency", description="Latency from kernel to monitor.")
    parser.add_argument("rounds", nargs="?", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kmonitor-bench-") as folder:
        result = _measure(Plan(quick=False, build=Path(folder), scratch=Path(folder)), asked.rounds, 60, 1.2)
    show(result)


if __name__ == "__main__":
    main()
