# SPDX-License-Identifier: Apache-2.0
"""The kernel's boot-time clock, the wall clock, and the boot id."""

from __future__ import annotations

import time
from pathlib import Path


def boottime_to_unix_ns() -> int:
    """What to add to CLOCK_BOOTTIME nanoseconds to get Unix nanoseconds, now.

    The closest of three readings: a reading that the scheduler interrupted is wrong by as long as it was away.
    """
    best = (1 << 62, 0)
    for _ in range(3):
        before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        unix = time.time_ns()
        after = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        best = min(best, (after - before, unix - (before + after) // 2))
    return best[1]


def boot_id() -> str:
    """The kernel's random id of this boot (proc(5), /proc/sys/kernel/random/boot_id)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
