# SPDX-License-Identifier: Apache-2.0
"""How long from the start of the agent until the kernel records, and until a monitor has it.

    .venv/bin/python -m bench.start [STARTS]

A monitor has registered with a broker for all forks, on all nodes, before there is a node; and a process forks every millisecond or
two all the time. The agent is started (fork and exec of kmonitor-agent), imports, loads its probe, connects, is told what is
wanted, and arms it: the kernel's time in the first event of the new node is the end. So it holds all that a user waits for, to a
millisecond or two.

With pins the probe is at work while no agent is. There what counts is how long a new agent takes to deliver what the ring holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.figure import Figure, Plan, Result, Series, paired, summary
from bench.report import show
from bench.stack import command, first_line
from bench.workload import program
from kmonitor.clients import Event, Monitor, NodeChange, NodeState, connect

GROUP = "start"
_TARGET_S = 0.5
_FORKS_S = 700
_TIMEOUT_S = 20.0
_PINNED = "bench-start-pinned"
_VARIANTS = ("core", "bcc", "pinned")


def measure(plan: Plan) -> Result:
    """The group's figures."""
    return asyncio.run(_measure(plan, 1 if plan.quick else 10, warm=0 if plan.quick else 1))


async def _measure(plan: Plan, starts: int, warm: int = 1) -> Result:
    result = Result()
    captured: dict[str, list[float]] = {name: [] for name in _VARIANTS}
    told: dict[str, list[float]] = {name: [] for name in _VARIANTS}
    variants = list(_VARIANTS)
    pace = program(plan.build, "pace")
    with command("kmonitor-broker", "--listen", "127.0.0.1:0", "--log", f"sqlite:{plan.scratch / 'start.sqlite'}") as broker:
        address = first_line(broker).rsplit(" ", 1)[1]
        with _forks(pace, plan.scratch), _pins(address):
            async with connect(address) as monitor:
                await monitor.register(events="fork")
                await _start(address, monitor, _PINNED, pinned=True)
                for number in range(-warm, starts):  # the first of each finds cold caches
                    for name in random.sample(variants, len(variants)):
                        node = _PINNED if name == "pinned" else f"bench-start-{name}-{number + warm}"
                        try:
                            first = await _start(address, monitor, node, source=None if name == "pinned" else name, pinned=name == "pinned")
                        except _NoStartError as error:
                            result.notes.append(f"{name} is left out: {error}")
                            variants.remove(name)
                            continue
                        if number >= 0:
                            captured[name].append(first[0])
                            told[name].append(first[1])
    if not captured["core"]:
        raise SystemExit("bench: the agent does not start here; see above")
    _tell(result, captured, told)
    return result


def _tell(result: Result, captured: dict[str, list[float]], told: dict[str, list[float]]) -> None:
    core, bcc = captured["core"], captured["bcc"]
    against = f"source bcc {summary(bcc)[0]:.2f} s" if bcc else ""
    result.figures.append(
        Figure(GROUP, "start until the probe captures", *summary(core)[:1], "s", *summary(core)[1:], len(core), _TARGET_S, against=against)
    )
    if bcc and len(bcc) == len(core):
        result.figures.append(Figure(GROUP, "over that of source bcc", *paired(core, bcc)[:1], "x", *paired(core, bcc)[1:], len(core)))
    ends = (("until a monitor has it", told["core"]), ("source bcc, until a monitor has it", told["bcc"]))
    for what, values in (*ends, ("with pins: until a monitor has what the ring held", told["pinned"])):
        if values:
            middle, low, high = summary(values)
            result.figures.append(Figure(GROUP, what, middle, "s", low, high, len(values)))
    names = [name for name in _VARIANTS if told[name]]
    for label, values_of in (("until it captures", captured), ("until a monitor has it", told)):
        shown = [name for name in names if not (name == "pinned" and values_of is captured)]
        result.series.append(
            Series(
                GROUP,
                f"start of the agent, {label}",
                "median",
                shown,
                [summary(values_of[name])[0] for name in shown],
                "source",
                "s",
                "bars",
            )
        )
    result.notes.append(
        f"Through the broker: the first fork that the kernel recorded for a monitor that had asked before, of some {_FORKS_S} "
        "a second. The probe of source bcc is the same program, made by bcc. With pins, the probe captures without an agent."
    )


class _NoStartError(Exception):
    """What the agent said."""


async def _start(address: str, monitor: Monitor, node: str, *, source: str | None = None, pinned: bool) -> tuple[float, float]:
    """Seconds from exec until the first event was recorded, and until it is here. The agent ends again."""
    options = ["--broker", address, "--node", node] + ([] if pinned else ["--no-pin"]) + (["--source", source] if source else [])
    began = time.time_ns()
    with command("kmonitor-agent", *options) as agent:
        assert agent.stdout is not None
        if not await asyncio.to_thread(agent.stdout.readline):  # at the latest when it is connected
            raise _NoStartError(f"the agent did not start, exit status {agent.wait()}; see above")
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                event = await _first_event(monitor, node)
        except TimeoutError:
            raise _NoStartError(f"the agent gave no event in {_TIMEOUT_S:.0f} s") from None
        now = time.time_ns()
    async for notification in monitor:  # what it still had to say must not be taken for the next one's
        if isinstance(notification, NodeChange) and notification.state is NodeState.UNREACHABLE and notification.node == node:
            break
    return (event.time - began) / 1e9, (now - began) / 1e9


async def _first_event(monitor: Monitor, node: str) -> Event:
    async for notification in monitor:
        if isinstance(notification, Event) and notification.node == node:
            return notification
    raise _NoStartError("the monitor has ended")


@contextlib.contextmanager
def _forks(pace: Path, scratch: Path) -> Iterator[None]:
    with subprocess.Popen(
        [pace, "1", str(_FORKS_S), "0", "f", scratch / "forks"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as process:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
        try:
            yield
        finally:
            process.stdin.close()


@contextlib.contextmanager
def _pins(address: str) -> Iterator[None]:
    """Takes away what the agents with pins leave."""
    try:
        yield
    finally:
        with command("kmonitor-agent", "--broker", address, "--node", _PINNED, "--unpin") as agent:
            agent.wait()


def main() -> None:
    """Print the figures."""
    starts = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory(prefix="kmonitor-bench-") as folder:
        result = asyncio.run(_measure(Plan(quick=False, build=Path(folder), scratch=Path(folder)), starts))
    show(result)


if __name__ == "__main__":
    main()
