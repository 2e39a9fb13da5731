# SPDX-License-Identifier: Apache-2.0
"""Where an isolated event's time goes, for whoever wants to shorten it; by hand, not in the report.

    .venv/bin/python -m bench.stages [EVENTS] [--node-wide] [--load]

Agent and broker are those of this checkout, launched by this module, which notes the time at a few of their calls. That costs
some microseconds each.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.stack import NODE, first_line
from bench.workload import Mortals, load, program

_STAGES = (
    "kernel",
    "agent has read",
    "agent writes",
    "agent has written",
    "broker has it",
    "broker has routed",
    "broker writes",
    "broker has written",
    "client has it",
    "monitor",
)
_BOOTTIME_AT = 16


def _agent(folder: str) -> None:
    from kmonitor.agent import cli, forwarder, ring  # noqa: PLC0415 -- each launcher imports its own side only
    from kmonitor.v1 import agent_pb2  # noqa: PLC0415

    seen: dict[int, list[int]] = {}
    original = ring.Ring.read

    def read(self: ring.Ring, limit: int) -> memoryview | None:
        data = original(self, limit)
        if data is not None:
            seen.setdefault(_boottime(data), []).append(time.time_ns())
        return data

    ring.Ring.read = read  # type: ignore[method-assign]
    init = forwarder.Forwarder.__init__

    def make(self: forwarder.Forwarder, feed: Any, write: Callable[[bytes], Any], *more: Any) -> None:
        async def timed(frame: bytes) -> None:
            began = time.time_ns()
            await write(frame)
            ended = time.time_ns()
            message = agent_pb2.AgentMessage.FromString(frame)
            if message.HasField("block"):
                seen[_boottime(message.block.data)] += [began, ended]

        init(self, feed, timed, *more)

    forwarder.Forwarder.__init__ = make  # type: ignore[assignment,method-assign]
    atexit.register(lambda: _save(folder, "agent", seen))
    cli.main()


def _broker(folder: str) -> None:
    from kmonitor.broker import agents, cli, server  # noqa: PLC0415

    received: dict[int, list[int]] = {}
    written: list[tuple[bytes, int, int]] = []
    receive = agents.Agents.receive

    def timed_receive(self: agents.Agents, link: Any, message: Any) -> None:
        began = time.time_ns()
        receive(self, link, message)
        if message.HasField("block"):
            received[_boottime(message.block.data)] = [began, time.time_ns()]

    agents.Agents.receive = timed_receive  # type: ignore[method-assign]
    serve = server.Server._serve

    @functools.wraps(serve)
    async def timed_serve(self: server.Server, context: Any, take_requests: Any) -> None:
        write = context.write

        class Timed:
            """A context whose writes are timed."""

            async def write(self, message: bytes) -> None:
                began = time.time_ns()
                await write(message)
                written.append((bytes(message), began, time.time_ns()))

            def __getattr__(self, name: str) -> Any:
                return getattr(context, name)

        await serve(self, Timed(), take_requests)  # type: ignore[arg-type]

    server.Server._serve = timed_serve  # type: ignore[method-assign]

    def save() -> None:
        from kmonitor.v1 import monitor_pb2  # noqa: PLC0415

        found: dict[int, list[int]] = {}
        for message, began, ended in written:
            notification = monitor_pb2.Notification.FromString(message)
            for event in notification.events.events:
                found[event.time] = [began, ended]
        _save(folder, "broker_in", received)
        _save(folder, "broker_out", found)

    atexit.register(save)
    cli.main()


def _boottime(data: bytes | memoryview) -> int:
    """Of a block's first record."""
    return int.from_bytes(data[_BOOTTIME_AT : _BOOTTIME_AT + 8], "little")


def _save(folder: str, name: str, times: dict[int, list[int]]) -> None:
    Path(folder, f"{name}.json").write_text(json.dumps(times), encoding="utf-8")


async def _monitor(address: str, count: int, *, node_wide: bool) -> dict[int, list[int]]:
    """The event's time -> when the client's reader had it, when the caller."""
    from kmonitor.clients import Event, connect, stream  # noqa: PLC0415

    read: dict[int, int] = {}
    put = stream.Stream._put_events

    def timed_put(self: stream.Stream, message: Any) -> None:
        now = time.time_ns()
        for event in message.events:
            read[event.time] = now
        put(self, message)

    stream.Stream._put_events = timed_put  # type: ignore[method-assign]
    mortals = Mortals(count)
    pids = set(mortals.pids)
    taken: dict[int, list[int]] = {}
    async with connect(address) as monitor:
        if node_wide:
            await monitor.register(node=NODE, events="exit")
        else:
            await monitor.register_all([{"node": NODE, "pid": pid, "events": "exit"} for pid in pids])
        ending = asyncio.create_task(asyncio.to_thread(mortals.end_all, (20.0, 25.0)))
        async for notification in monitor:
            now = time.time_ns()
            if isinstance(notification, Event) and notification.pid in pids:
                taken[notification.time] = [read[notification.time], now]
                pids.remove(notification.pid)
                if not pids:
                    break
        await ending
    mortals.close()
    return taken


@contextlib.contextmanager
def _launched(role: str, folder: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "bench.stages", f"--{role}", folder, *options], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def _measure(events: int, *, node_wide: bool, loaded: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="kmonitor-bench-") as folder:
        with contextlib.ExitStack() as running:
            broker = running.enter_context(_launched("broker", folder, "--listen", "127.0.0.1:0", "--log", f"sqlite:{folder}/log.sqlite"))
            address = first_line(broker).rsplit(" ", 1)[1]
            first_line(running.enter_context(_launched("agent", folder, "--broker", address, "--node", NODE, "--no-pin")))
            if loaded:
                running.enter_context(load(program(Path(folder), "pace"), Path(folder)))
            monitor = asyncio.run(_monitor(address, events, node_wide=node_wide))
        agent, into, out = (
            {int(at): times for at, times in json.loads(Path(folder, f"{name}.json").read_text(encoding="utf-8")).items()}
            for name in ("agent", "broker_in", "broker_out")
        )
    offset = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    rows = []
    for at, arrived in monitor.items():
        near = min(agent, key=lambda boottime: abs(boottime + offset - at))
        if abs(near + offset - at) < 100_000 and at in out and near in into:
            rows.append([at, *agent[near][:3], *into[near], *out[at], *arrived])
    print(f"{len(rows)} of {len(monitor)} events, each alone in its block; microseconds: median, p90, p99 of each step")
    for number in range(1, len(_STAGES)):
        # The steps behind a write go on while it returns: they are counted from its beginning.
        since = number - 2 if _STAGES[number] in ("broker has it", "client has it") else number - 1
        since = _STAGES.index("broker has it") if _STAGES[number] == "broker writes" else since
        _print(f"{_STAGES[since]} -> {_STAGES[number]}", [row[number] - row[since] for row in rows])
    _print("kernel -> monitor", [row[-1] - row[0] for row in rows])


def _print(what: str, nanoseconds: list[int]) -> None:
    taken = sorted(value / 1000 for value in nanoseconds)
    print(f"{what:40} {statistics.median(taken):8.0f} {taken[len(taken) * 9 // 10]:8.0f} {taken[len(taken) * 99 // 100]:8.0f}")


def main() -> None:
    """A table, or one of the two launchers."""
    if len(sys.argv) > 2 and sys.argv[1] in ("--agent", "--broker"):
        role, folder = sys.argv[1:3]
        sys.argv = [f"kmonitor-{role[2:]}", *sys.argv[3:]]
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        (_agent if role == "--agent" else _broker)(folder)
        return
    parser = argparse.ArgumentParser(prog="bench.stages")
    parser.add_argument("events", nargs="?", type=int, default=200)
    parser.add_argument("--node-wide", action="store_true")
    parser.add_argument("--load", action="store_true")
    asked = parser.parse_args()
    _measure(asked.events, node_wide=asked.node_wide, loaded=asked.load)


if __name__ == "__main__":
    main()
