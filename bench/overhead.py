# SPDX-License-Identifier: Apache-2.0
"""What being watched costs: the time of loops that fork, spawn and make threads, and the CPU time of whoever watches.

The loops run in one process on one CPU (the last); all that watches runs anywhere. On two cores, where the scheduler puts parent and
child decides between 40 and 190 us for a thread, which no probe does. Each figure is a ratio against no probe beside it. This
project's probe is detached and attached within a turn (attached.py); peers have to be started, and are compared with what was just
before and just after.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from bench.attached import Attached, attached
from bench.cheap_monitor import CheapMonitor, cheap_monitor
from bench.cputime import cpu_ns, settle
from bench.figure import Figure, Plan, Result, Series, summary
from bench.kernel_time import kernel_time
from bench.loops import EVENTS, LOOPS, Loop, Loops, loops
from bench.mounts import mounted
from bench.peers import PEERS, PeerError, check, peer
from bench.stack import stack

_GROUP = "overhead"
_NOBODY, _IDLE, _ONE, _ALL = "no probe", "idle", "one other pid", "everything"
_STATES = (_NOBODY, _IDLE, _ONE, _ALL)
_WHAT = {"fork": "fork+wait", "spawn": "posix_spawn+exec+wait", "threads": "pthread_create+join"}
_TARGETS: dict[tuple[str, Loop], float] = {
    **{(state, loop): 1.01 for state in (_IDLE, _ONE) for loop in LOOPS},
    (_ALL, "fork"): 1.03,
    (_ALL, "spawn"): 1.03,
    (_ALL, "threads"): 1.06,
}
_CPU_TARGET_US = 0.6
_CPU_RATIO_TARGET = 10.0

_LEAD = 0.25
"""Of each burst, untimed, before it: caches and the watcher's state are those of the middle of a storm."""


@dataclass(frozen=True, slots=True)
class _Extent:
    rounds: int
    turns: int
    """Of this project's states, in a round."""
    burst_s: float
    peer_bursts: int
    cpu_s: float


_WHOLE = _Extent(rounds=6, turns=12, burst_s=0.03, peer_bursts=4, cpu_s=0.3)
_QUICK = _Extent(rounds=1, turns=1, burst_s=0.01, peer_bursts=1, cpu_s=0.05)

Ratios = dict[tuple[str, Loop], list[float]]


@dataclass(slots=True)
class _Taken:
    """What was measured: one value a round."""

    ratios: Ratios = field(default_factory=dict)
    base_us: dict[Loop, list[float]] = field(default_factory=dict)
    cpu_us: Ratios = field(default_factory=dict)
    """CPU time an event, by process."""
    kernel_us: Ratios = field(default_factory=dict)
    """Time in the probe's programs, an iteration."""

    def add(self, to: Ratios, who: str, loop: Loop, value: float) -> None:
        to.setdefault((who, loop), []).append(value)


class _Bench:
    def __init__(self, timed: Loops, extent: _Extent) -> None:
        self._timed = timed
        self._extent = extent
        self.taken = _Taken()
        timed.count_for("fork", extent.burst_s)  # warms it up
        self._burst = {loop: timed.count_for(loop, extent.burst_s) for loop in LOOPS}
        self._long = {loop: timed.count_for(loop, extent.cpu_s) for loop in LOOPS}

    def segment(self, bursts: int = 1) -> dict[Loop, float]:
        """Microseconds of one iteration of each loop: the median of so many bursts."""
        found: dict[Loop, list[float]] = {loop: [] for loop in LOOPS}
        for _ in range(bursts):
            for loop, count in self._burst.items():
                self._timed.run(loop, max(int(count * _LEAD), 1))
                found[loop].append(self._timed.run(loop, count) / count / 1000)
        return {loop: statistics.median(values) for loop, values in found.items()}

    def cpu(self, pids: dict[str, int]) -> None:
        """CPU time an event of each process, while each loop runs."""
        for loop, count in self._long.items():
            self._timed.run(loop, max(int(count * _LEAD), 1))
            settle(pids.values())
            before = {name: cpu_ns(pid) for name, pid in pids.items()}
            self._timed.run(loop, count)
            settle(pids.values())
            for name, pid in pids.items():
                self.taken.add(self.taken.cpu_us, name, loop, (cpu_ns(pid) - before[name]) / 1000 / (count * EVENTS[loop]))

    def own(self, probe: Attached, monitor: CheapMonitor, pids: dict[str, int], other: int, first: int) -> None:
        """One round of this project's states: turns in each of which each state has a segment with no probe before and after it."""
        found: Ratios = {}
        base = self.segment()
        for turn in range(self._extent.turns):
            for state in _rotated(_STATES, first + turn):
                with _state(state, probe, monitor, pids, other):
                    inside = self.segment()
                after = self.segment()
                for loop in LOOPS:
                    self.taken.base_us.setdefault(loop, []).append(after[loop])
                    self.taken.add(found, state, loop, inside[loop] / (base[loop] + after[loop]) * 2)
                base = after
        for (state, loop), values in found.items():
            self.taken.add(self.taken.ratios, state, loop, statistics.median(values))
        with _state(_ALL, probe, monitor, pids, other):
            self.cpu(pids)

    def in_kernel(self, probe: Attached, monitor: CheapMonitor, pids: dict[str, int], other: int, state: str) -> None:
        """How long the probe's programs run in an iteration of each loop, by the kernel's own clock."""
        with probe.programs() as programs, kernel_time(programs) as clock, _state(state, probe, monitor, pids, other):
            for loop, count in self._burst.items():
                before, _ = clock.spent()
                self._timed.run(loop, count)
                after, _ = clock.spent()
                self.taken.add(self.taken.kernel_us, state, loop, (after - before) / 1000 / count)

    def others(self, names: Sequence[str], start: Callable[[str], contextlib.AbstractContextManager[int]]) -> None:
        """One round of the peers."""
        base = self.segment(self._extent.peer_bursts)
        for name in names:
            with start(name) as pid:
                inside = self.segment(self._extent.peer_bursts)
                self.cpu({name: pid})
            after = self.segment(self._extent.peer_bursts)
            for loop in LOOPS:
                self.taken.add(self.taken.ratios, name, loop, inside[loop] / (base[loop] + after[loop]) * 2)
            base = after


@contextlib.contextmanager
def _state(state: str, probe: Attached, monitor: CheapMonitor, pids: dict[str, int], other: int) -> Iterator[None]:
    """From no probe into this state and back; nobody has work left when it begins and when it ends."""
    asked = {_ONE: other, _ALL: 0}.get(state)
    if state != _NOBODY:
        probe.attach()
    if asked is not None:
        monitor.register(asked)
    settle(pids.values())
    yield
    if asked is not None:
        monitor.deregister()
        probe.nobody_asks()
    if state != _NOBODY:
        probe.detach()
    settle(pids.values())


def measure(plan: Plan) -> Result:
    """See the module. Raises SystemExit if there is no C compiler."""
    extent = _QUICK if plan.quick else _WHOLE
    result = Result()
    present = []
    for name in PEERS:
        try:
            check(name)
            present.append(name)
        except PeerError as error:
            result.notes.append(str(error))
    with contextlib.ExitStack() as running:
        timed = running.enter_context(loops(plan.build, (os.cpu_count() or 1) - 1))
        probe = running.enter_context(attached())
        address, broker, agent = running.enter_context(stack(log=f"sqlite:{plan.scratch / 'log'}", pin_root=probe.root))
        probe.adopted()
        monitor = running.enter_context(cheap_monitor(address))
        other = running.enter_context(_other())
        running.enter_context(mounted("tracefs", "/sys/kernel/tracing"))  # where bpftrace finds tracepoints
        pids = {"agent": agent, "broker": broker, "cheap monitor": monitor.pid}
        bench = _Bench(timed, extent)
        for number in range(extent.rounds):
            bench.own(probe, monitor, pids, other, number)
            for state in (_IDLE, _ONE, _ALL):
                bench.in_kernel(probe, monitor, pids, other, state)
            for name in _rotated(tuple(present), number):
                try:
                    bench.others([name], lambda name: peer(name, plan.scratch, timed))
                except PeerError as error:
                    result.notes.append(str(error))
                    present.remove(name)
        if lost := probe.lost():
            result.notes.append(f"the ring could not take {lost} events")
    _tell(result, bench.taken, present)
    return result


@contextlib.contextmanager
def _other() -> Iterator[int]:
    """A process that lives, and does nothing."""
    with subprocess.Popen(["sleep", "infinity"]) as process:
        try:
            yield process.pid
        finally:
            process.terminate()


def _rotated(several: Sequence[str], by: int) -> Sequence[str]:
    by %= len(several) or 1
    return [*several[by:], *several[:by]]


def _tell(result: Result, taken: _Taken, peers: Sequence[str]) -> None:
    def figure(what: str, values: Sequence[float], unit: str, **more: object) -> None:
        value, low, high = summary(values)
        result.figures.append(Figure(_GROUP, what, value, unit, low, high, len(values), **more))  # type: ignore[arg-type]

    for loop in LOOPS:
        against = ", ".join(f"{name} {statistics.median(taken.ratios[name, loop]):.3f}" for name in peers)
        for state in (_IDLE, _ONE, _ALL):
            figure(f"{_WHAT[loop]}, {state}", taken.ratios[state, loop], "x", target=_TARGETS[state, loop], against=against)
        figure(f"{_WHAT[loop]}, no probe against itself", taken.ratios[_NOBODY, loop], "x")
        for name in peers:
            figure(f"{_WHAT[loop]}, {name}", taken.ratios[name, loop], "x")
        iteration = statistics.median(taken.base_us[loop])
        for state in (_IDLE, _ONE, _ALL):
            spent = taken.kernel_us[state, loop]
            share = f"{100 * statistics.median(spent) / iteration:.2f} % of an iteration"
            figure(f"{_WHAT[loop]}, {state}: the probe's programs, by the kernel's clock", spent, "us", against=share)
    for loop in LOOPS:
        agent = taken.cpu_us["agent", loop]
        against = ", ".join(f"{name} {statistics.median(taken.cpu_us[name, loop]):.2f} us" for name in peers)
        figure(f"CPU an event, agent, {_WHAT[loop]}", agent, "us", target=_CPU_TARGET_US, against=against)
        if peers:
            cheapest = min(peers, key=lambda name: statistics.median(taken.cpu_us[name, loop]))
            times = [theirs / ours for theirs, ours in zip(taken.cpu_us[cheapest, loop], agent, strict=True)]
            figure(
                f"CPU an event, {cheapest} (the cheapest peer) / agent, {_WHAT[loop]}", times, "x", target=_CPU_RATIO_TARGET, better="more"
            )
        for name in (*peers, "broker", "cheap monitor"):
            figure(f"CPU an event, {name}, {_WHAT[loop]}", taken.cpu_us[name, loop], "us")
        figure(f"{_WHAT[loop]}, no probe: one iteration", taken.base_us[loop], "us")
    names = [_WHAT[loop] for loop in LOOPS]
    for who in (_IDLE, _ONE, _ALL, *peers):
        label = f"kmonitor, {who}" if who in _STATES else who
        over = [100 * (statistics.median(taken.ratios[who, loop]) - 1) for loop in LOOPS]
        result.series.append(Series(_GROUP, "Overhead", label, names, over, "", "% more time than with no probe", kind="bars"))
    for who in ("agent", *peers):
        label = "kmonitor's agent" if who == "agent" else who
        each = [statistics.median(taken.cpu_us[who, loop]) for loop in LOOPS]
        result.series.append(Series(_GROUP, "CPU an event", label, names, each, "", "us of CPU an event", kind="bars", log_y=True))
    result.notes += _NOTES


_NOTES = (
    "The loops are pinned to one CPU in all variants; whoever watches is not.",
    "No probe: no program is attached; the agent and the broker are there, asleep.",
    "Quartiles are of the rounds' medians. A peer has one segment a round, with no probe before and after it.",
    "The monitor that everything is shipped to takes the stream as bytes; Python's client library would take several times its CPU.",
    "By the kernel's clock: run-time statistics of the programs for one iteration of the loop, all of its events together, and what "
    "else the machine did meanwhile. Two clock readings a run are part of it, caches and the jump into the program are not.",
    "CPU an event: user and system time of the process, over the events that the loop made (fork and exit; fork, exec and exit; create "
    "and exit).",
    "bcc's program decodes and counts in its callback, and prints nothing; forkstat and bpftrace print to /dev/null.",
)
