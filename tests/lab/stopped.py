# SPDX-License-Identifier: Apache-2.0
"""An agent that does not get to run for a while."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from tests.lab.namespaces import Inside
from tests.lab.process import LabError, Running

LIMIT = 10.0


@contextlib.contextmanager
def stopped(process: Running) -> Iterator[None]:
    """Within, none of its threads runs; then it goes on."""
    pids = [process.pid]
    if isinstance(process, Inside):
        # nsenter stops itself when its child stops, and lets the child go on when it is continued.
        pids = [process.host_pid, process.process.pid]
    os.kill(pids[0], signal.SIGSTOP)
    try:
        for pid in pids:
            _wait_stopped(pid)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def _wait_stopped(pid: int) -> None:
    """Nobody but its parent is told, and that is not always the test."""
    until = time.monotonic() + LIMIT
    while not all(_state(task) == "T" for task in Path(f"/proc/{pid}/task").iterdir()):
        if time.monotonic() > until:
            raise LabError(f"process {pid} did not stop in {LIMIT:g} s")
        time.sleep(0.001)


def _state(task: Path) -> str:
    try:
        return (task / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # a thread that has just ended
        return "T"
