# SPDX-License-Identifier: Apache-2.0
"""A control group in which memory runs out soon."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tests.lab.control_groups import remove
from tests.lab.requires import Lack, skip


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[Path]:
    """The cgroup.procs file of a new group with that limit. Skips where there is no memory controller."""
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, where, kind, options, *_ = line.split()
        first = kind == "cgroup" and "memory" in options.split(",")
        second = kind == "cgroup2" and "memory" in Path(where, "cgroup.subtree_control").read_text(encoding="ascii").split()
        if first or second:
            break
    else:
        skip(Lack.MEMORY_CGROUP)
        return
    group = Path(where, f"kmonitor-test-{os.getpid()}")
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit_bytes), encoding="ascii")
        if second:
            (group / "memory.swap.max").write_text("0", encoding="ascii")
        yield group / "cgroup.procs"
    finally:
        remove(group)
