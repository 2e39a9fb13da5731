# SPDX-License-Identifier: Apache-2.0
"""What makes events on purpose: a paced load, and processes that end when they are told."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kmonitor.wire.priority import DEFAULT_NICE

_SOURCES = Path(__file__).parent.parent / "tests" / "workload"
LOAD_EVENTS_S = 10_000
_LOAD_MIX = "ttttttttf"
"""Of the letters of pace.c: each deed is two events, a beginning and an end."""


def program(build: Path, name: str) -> Path:
    """A program of tests/workload, compiled."""
    made = build / name
    source = _SOURCES / f"{name}.c"
    if not made.exists() or made.stat().st_mtime < source.stat().st_mtime:
        subprocess.run(["cc", "-O2", "-pthread", "-o", made, source], check=True)
    return made


class Load:
    """Of `load`: what was reached is known when it has ended."""

    events_s = 0.0


@contextlib.contextmanager
def load(pace: Path, scratch: Path) -> Iterator[Load]:
    """LOAD_EVENTS_S events a second for as long as this lasts: threads that come and go, and one child among nine deeds."""
    told = Load()
    file = scratch / f"pace-{time.monotonic_ns()}"
    argv = [str(pace), "1", str(LOAD_EVENTS_S // 2), "0", _LOAD_MIX, str(file)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        # As agent and broker: the load is given, whoever wants the CPU. Else it would fall behind in one variant, and catch up in the next.
        os.setpriority(os.PRIO_PROCESS, process.pid, DEFAULT_NICE)
        process.stdin.write("go\n")
        process.stdin.flush()
        try:
            yield told
        finally:
            process.stdin.close()
            last: dict[str, Any] = json.loads(process.stdout.readline())
            told.events_s = 2 * last["deeds"] / last["seconds"]
            file.unlink(missing_ok=True)


class Mortals:
    """Processes that wait for their end. They are left unreaped until `close`: nobody but they does anything then."""

    def __init__(self, count: int) -> None:
        self._processes = [subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) for _ in range(count)]
        self.pids = [process.pid for process in self._processes]

    def end_all(self, gap_ms: tuple[float, float]) -> None:
        """One after the other, after a random quiet time each."""
        for process in self._processes:
            time.sleep(random.uniform(*gap_ms) / 1000)
            assert process.stdin is not None
            process.stdin.close()

    def close(self) -> None:
        """End what still lives, and reap all."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
