# SPDX-License-Identifier: Apache-2.0
"""What agent and broker keep in memory: resident set size (Rss of /proc/PID/smaps_rollup, see proc(5)), libraries included."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from bench.blocks import Shape
from bench.crew import worker
from bench.figure import Figure, Plan, Result
from bench.rig import Rig, rig
from bench.stack import NODE, stack

_GROUP = "memory"
_STORM = Path(__file__).parent.parent / "tests" / "workload" / "storm.c"
_QUIET_S = 0.4
_QUIET_MOST_S = 5.0


def measure(plan: Plan) -> Result:
    """The agent's memory as it is; the broker's as the difference between few and many of a thing."""
    result = Result()
    _agent(result, plan)
    few, many = (10, 40) if plan.quick else (100, 500)
    _growing(result, "a connected agent", few, many, target=100.0, make=lambda ready, count: ready.connect(count, Shape(slots=1)))
    _growing(result, "an idle monitor, with one registration", few, many, target=None, make=_monitors)
    few, many = (10, 40) if plan.quick else (20, 200)
    _registration(result, few, many)
    result.notes.append("A Tetragon agent is documented with hundreds of MB; it is not installed here, and was not measured.")
    return result


_EACH = 100  # registrations of one monitor, against one


def _monitors(ready: Rig, count: int) -> None:
    if not ready.nodes:
        ready.connect(1, Shape(slots=1))
    ready.watch(count)


def _registrations(ready: Rig, count: int) -> None:
    if not ready.nodes:
        ready.connect(1, Shape(slots=1))
    ready.watch(count, each=_EACH)


def _growing(result: Result, what: str, few: int, many: int, *, target: float | None, make: Callable[[Rig, int], None]) -> None:
    before, after = _grown(few, many, make)
    value = (after - before) / (many - few)
    against = f"{after / 1024:,.1f} MB with {many:,}, {before / 1024:,.1f} MB with {few:,}"
    result.figures.append(Figure(_GROUP, f"broker, {what}", value, "KB", target=target, against=against))


def _registration(result: Result, few: int, many: int) -> None:
    """By how much more monitors with many registrations cost than as many with one: a stream costs as much as fifty registrations."""
    one, many_each = (after - before for before, after in (_grown(few, many, _monitors), _grown(few, many, _registrations)))
    monitors = many - few
    value = (many_each - one) / (monitors * (_EACH - 1))
    against = f"{many_each / monitors:,.1f} KB a monitor with {_EACH}, {one / monitors:,.1f} KB with one"
    result.figures.append(Figure(_GROUP, "broker, a registration of one pid", value, "KB", target=1.0, against=against))


def _grown(few: int, many: int, make: Callable[[Rig, int], None]) -> tuple[int, int]:
    """The broker's memory with few and with many, kilobytes. The first ones bring what is needed but once."""
    with rig("--log", "memory") as ready:
        make(ready, few)
        before = _quiet(ready.broker_pid)
        make(ready, many - few)
        return before, _quiet(ready.broker_pid)


def _agent(result: Result, plan: Plan) -> None:
    program = plan.build / "storm"
    subprocess.run(["cc", "-O2", "-pthread", "-o", program, _STORM], check=True)
    count = 2_000 if plan.quick else 100_000
    with contextlib.ExitStack() as running:
        address, _, pid = running.enter_context(stack())
        idle = _quiet(pid)
        monitors = running.enter_context(worker("bench.sink", address))
        monitors.do(monitors=1)
        workers = "2"
        subprocess.run(
            [program, "threads", str(count), workers, plan.scratch], input="go\n", stdout=subprocess.DEVNULL, text=True, check=True
        )
        after = _quiet(pid)
    for when, rss in ((f"connected to its broker, idle, node {NODE}", idle), (f"after {count:,} threads as fast as they go", after)):
        result.figures.append(Figure(_GROUP, f"agent, {when}", rss / 1024, "MB", target=64.0, against="a Tetragon agent: hundreds of MB"))


def _quiet(pid: int) -> int:
    """Resident kilobytes once they have not changed for a while."""
    until = time.monotonic() + _QUIET_MOST_S
    now, since = _resident(pid), time.monotonic()
    while time.monotonic() - since < _QUIET_S and time.monotonic() < until:
        time.sleep(_QUIET_S / 5)  # the memory of another process: nothing tells of it
        if abs((seen := _resident(pid)) - now) > now // 500:
            now, since = seen, time.monotonic()
    return _resident(pid)


def _resident(pid: int) -> int:
    found = re.search(r"^Rss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return int(found[1])
