# SPDX-License-Identifier: Apache-2.0
"""How long a monitor waits until the process that it names is watched: from `register` to the answer that the kernel's map is armed.

    .venv/bin/python -m bench.arming [PAIRS]

And back, with `deregister`. At rest with a quiet time before each; and while another monitor gets 10,000 events a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.figure import Figure, Plan, Result, Series, percentile, summary
from bench.report import show
from bench.stack import NODE, stack
from bench.worker import Worker, worker
from bench.workload import Mortals, load, program
from kmonitor.clients import Monitor, RegistrationState, connect

GROUP = "arming"
_TARGET_MS = 10.0
_QUIET_MS = 5.0, 9.0


@dataclass
class _Taken:
    """Milliseconds."""

    register: list[float] = field(default_factory=list)
    deregister: list[float] = field(default_factory=list)


def measure(plan: Plan) -> Result:
    """The group's figures."""
    return _measure(plan, 20 if plan.quick else 500)


def _measure(plan: Plan, pairs: int) -> Result:
    pace = program(plan.build, "pace")
    rest, loaded = _Taken(), _Taken()
    log = f"sqlite:{plan.scratch / 'arming.sqlite'}"
    with stack(log=log) as (address, _, _), worker("bench.ends", "monitor", address) as drain:
        drain.answer()
        mortals = Mortals(1)
        try:
            asyncio.run(_rounds(address, mortals.pids[0], pairs, rest))
            with load(pace, plan.scratch) as made:
                drain.ask({"all": True, "batches": True})
                asyncio.run(_rounds(address, mortals.pids[0], max(pairs // 2, 2), loaded))
                told = _stop(drain)
        finally:
            mortals.close()
    result = Result()
    for when, taken in (("at rest", rest), ("under load", loaded)):
        for what, values in (("register to armed", taken.register), ("deregister to answered", taken.deregister)):
            ascending = sorted(values)
            target = _TARGET_MS if when == "at rest" else None
            p50, low, high = summary(ascending)
            result.figures.append(Figure(GROUP, f"{what}, {when}: p50", p50, "ms", low, high, len(values)))
            against = f"the slowest {ascending[-1]:.1f} ms of {len(values)}"
            result.figures.append(Figure(GROUP, f"{what}, {when}: p99", percentile(ascending, 0.99), "ms", target=target, against=against))
            shares = [share / 100 for share in (1, 5, *range(10, 100, 10), 95, 97, 99)]
            result.series.append(
                Series(
                    group=GROUP,
                    plot="register and deregister",
                    name=f"{what}, {when}",
                    x=[percentile(ascending, share) for share in shares],
                    y=shares,
                    x_label="ms until the answer",
                    y_label="share of calls",
                    log_x=True,
                )
            )
    result.notes.append(
        f"At rest: {_QUIET_MS[0]:.0f} to {_QUIET_MS[1]:.0f} ms of quiet before each call. Under load: {made.events_s:,.0f} events/s were "
        f"made, {told:,.0f} a second reached another monitor meanwhile."
    )
    return result


def _stop(drain: Worker) -> float:
    told = drain.ask("stop")
    return float(told["events"] / told["seconds"])


async def _rounds(address: str, pid: int, pairs: int, taken: _Taken) -> None:
    """Register a living process and deregister it, over and over; what came before a tenth of them is not counted."""
    warm = max(pairs // 10, 1)
    async with connect(address) as monitor, _read(monitor):
        for number in range(-warm, pairs):
            await asyncio.sleep(random.uniform(*_QUIET_MS) / 1000)
            began = time.perf_counter()
            registration = await monitor.register(node=NODE, pid=pid, events="exit")
            armed = time.perf_counter() - began
            if registration.states != {NODE: RegistrationState.RUNNING}:
                raise SystemExit(f"bench: process {pid} was not armed: {registration.states}")
            await asyncio.sleep(random.uniform(*_QUIET_MS) / 1000)
            began = time.perf_counter()
            await monitor.deregister(registration)
            if number >= 0:
                taken.register.append(1000 * armed)
                taken.deregister.append(1000 * (time.perf_counter() - began))


@contextlib.asynccontextmanager
async def _read(monitor: Monitor) -> AsyncIterator[None]:
    """Somebody takes what comes, as in any program."""

    async def read() -> None:
        async for _ in monitor:
            pass

    reading = asyncio.create_task(read())
    try:
        yield
    finally:
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading


def main() -> None:
    """Print the figures."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory(prefix="kmonitor-bench-") as folder:
        result = _measure(Plan(quick=False, build=Path(folder), scratch=Path(folder)), pairs)
    show(result)


if __name__ == "__main__":
    main()
