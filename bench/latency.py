# SPDX-License-Identifier: Apache-2.0
"""How long an isolated exit takes from the kernel's tracepoint to the monitor's Python code, over agent, broker and loopback.

    .venv/bin/python -m bench.latency [EVENTS] [--node-wide]

Each event is a process that was registered for its exit, or any process with --node-wide; a quiet time of 20 ms lies before
each. The event's own time is the kernel's; the other end is time.time_ns() in the loop over the notifications.
"""

from __future__ import annotations

import asyncio
import os
import platform
import statistics
import sys
import time

from bench.stack import NODE, stack
from kmonitor.clients import Event, connect

_QUIET_S = 0.02


async def measure(address: str, events: int, *, node_wide: bool) -> list[int]:
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
            await asyncio.sleep(_QUIET_S)
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
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    node_wide = "--node-wide" in sys.argv
    with stack() as (address, _, _):
        taken = asyncio.run(measure(address, int(arguments[0]) if arguments else 500, node_wide=node_wide))
    at = [taken[int(len(taken) * share)] / 1000 for share in (0.05, 0.5, 0.95, 0.99)]
    print(
        f"{'node-wide' if node_wide else 'one pid'}: {len(taken)} events, microseconds: "
        f"p5 {at[0]:.0f}  median {at[1]:.0f}  p95 {at[2]:.0f}  p99 {at[3]:.0f}  max {taken[-1] / 1000:.0f}  "
        f"mean {statistics.fmean(taken) / 1000:.0f}  ({os.cpu_count()} cores, Linux {platform.release()})"
    )


if __name__ == "__main__":
    main()
