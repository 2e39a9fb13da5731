# SPDX-License-Identifier: Apache-2.0
"""How long an isolated exit takes from the kernel's tracepoint to the monitor's Python code, over agent, broker and loopback.

    .venv/bin/python -m bench.latency [EVENTS] [--node-wide] [--quiet-ms 20]

Each event is a process that was registered for its exit, or any process with --node-wide; a quiet time lies before each. It
matters: in a virtual machine that slept, the same Python code takes three times as long. The event's own time is the kernel's; the
other end is time.time_ns() in the loop over the notifications.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
import time

from bench.stack import NODE, stack
from kmonitor.clients import Event, connect

_QUIET_MS = 20.0


async def measure(address: str, events: int, *, node_wide: bool, quiet_ms: float) -> list[int]:
    """Latencies in nanoseconds, in order."""
    taken: list[int] = []
    async with connect(address) as monitor:
        if node_wide:
            await monitor.register(node=NODE, events="exit")
        for _ in range(events):
            # Not os.fork: this process has gRPC's threads.
            process = await asyncio.create_subprocess_exec("/bin/cat", stdin=asyncio.subprocess.PIPE)
            if not node_wide:
                await monitor.register(node=NODE, pid=process.pid, events="exit")
            await asyncio.sleep(quiet_ms / 1000)
            assert process.stdin is not None
            process.stdin.close()
            async for notification in monitor:
                now = time.time_ns()
                if isinstance(notification, Event) and notification.pid == process.pid:
                    taken.append(now - notification.time)
                    break
            await process.wait()
    return sorted(taken)


def main() -> None:
    """Print a line of percentiles, in microseconds."""
    parser = argparse.ArgumentParser(description="Latency from kernel to monitor.")
    parser.add_argument("events", nargs="?", type=int, default=500)
    parser.add_argument("--node-wide", action="store_true")
    parser.add_argument("--quiet-ms", type=float, default=_QUIET_MS)
    asked = parser.parse_args()
    with stack() as (address, _, _):
        taken = asyncio.run(measure(address, asked.events, node_wide=asked.node_wide, quiet_ms=asked.quiet_ms))
    at = [taken[int(len(taken) * share)] / 1000 for share in (0.05, 0.5, 0.95, 0.99)]
    print(
        f"{'node-wide' if asked.node_wide else 'one pid'}, {asked.quiet_ms:g} ms quiet: {len(taken)} events, microseconds: "
        f"p5 {at[0]:.0f}  median {at[1]:.0f}  p95 {at[2]:.0f}  p99 {at[3]:.0f}  max {taken[-1] / 1000:.0f}  "
        f"mean {statistics.fmean(taken) / 1000:.0f}  ({os.cpu_count()} cores, Linux {platform.release()})"
    )


if __name__ == "__main__":
    main()
