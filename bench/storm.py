# SPDX-License-Identifier: Apache-2.0
"""Threads and processes as fast as the machine makes them, all captured and routed: how many, at what cost, with what loss?

    .venv/bin/python -m bench.storm [COUNT]

The workload is tests/workload/storm.c with a worker for each core; the agent has its default ring; a monitor registered for
everything counts along. CPU times are of the storm and the catching up behind it.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.stack import NODE, cpu_seconds, stack
from kmonitor.clients import Event, Gap, Progress, connect

_SOURCE = Path(__file__).parent.parent / "tests" / "workload" / "storm.c"


async def _count(address: str, storm: subprocess.Popen[str]) -> tuple[int, int, float]:
    """(events, lost in gaps, seconds until all that the storm made was here)."""
    events = lost = 0
    async with connect(address) as monitor:
        await monitor.register(node=NODE, events="all")
        assert storm.stdin is not None
        storm.stdin.write("go\n")
        storm.stdin.flush()
        began = time.monotonic()
        async for notification in monitor:
            if isinstance(notification, Event):
                events += 1
                if notification.pid == storm.pid and notification.type.name == "PROCESS_EXIT":
                    return events, lost, time.monotonic() - began
            elif isinstance(notification, Gap):
                lost += sum(count.count for count in notification.lost)
            elif isinstance(notification, Progress) and storm.poll() is not None and lost:
                return events, lost, time.monotonic() - began
    return events, lost, 0.0


def _run(program: Path, kind: str, count: int) -> None:
    workers = os.cpu_count() or 1
    with stack() as (address, broker, agent), tempfile.TemporaryDirectory() as folder:
        argv = [str(program), kind, str(count), str(workers), folder]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as storm:
            assert storm.stdout is not None
            storm.stdout.readline()
            before = cpu_seconds(agent), cpu_seconds(broker)
            events, lost, seconds = asyncio.run(_count(address, storm))
            spent = cpu_seconds(agent) - before[0], cpu_seconds(broker) - before[1]
            told = json.loads(storm.stdout.readline())
    rate = told["count"] / told["seconds"]
    each = [1e6 * cpu / events for cpu in spent]
    print(
        f"{kind:8} {told['count']} in {told['seconds']:.2f} s: {rate:,.0f} a second; "
        f"{events} events, {lost} lost, all here after {seconds:.2f} s; CPU an event: agent {each[0]:.2f} us, broker {each[1]:.2f} us",
        flush=True,
    )


def main() -> None:
    """One line a kind of storm."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "storm"
        subprocess.run(["cc", "-O2", "-pthread", "-o", program, _SOURCE], check=True)
        for kind, share in (("threads", 1), ("fork", 8), ("exec", 20)):
            _run(program, kind, count // share)


if __name__ == "__main__":
    main()
