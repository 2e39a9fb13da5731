# SPDX-License-Identifier: Apache-2.0
"""CPU time of other processes, to the nanosecond."""

from __future__ import annotations

import time
from collections.abc import Iterable

_POLL_SECONDS = 0.01
_QUIET_NS = 200_000


def cpu_ns(pid: int) -> int:
    """User and system time of all threads of a process, also of those that ended. Raises OSError if there is no such process.

    clock_getcpuclockid(3) is not in Python: the clock's number is made as the kernel's include/linux/posix-timers_types.h has it.
    """
    return time.clock_gettime_ns((~pid << 3) | 2)


def settle(pids: Iterable[int], *, timeout: float = 10.0) -> bool:
    """Wait until these processes have nothing to do: they used less than 2 % of a CPU for a while. False if the time is up."""
    several = tuple(pids)
    deadline = time.monotonic() + timeout
    quiet, before = 0, sum(map(cpu_ns, several))
    while quiet < 2:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)  # there is no event to wait for: it is for the lack of any
        now = sum(map(cpu_ns, several))
        quiet = quiet + 1 if now - before < _QUIET_NS else 0
        before = now
    return True
