# SPDX-License-Identifier: Apache-2.0
"""A second process with the pid that a first one had, as soon as the first one is gone."""

from __future__ import annotations

import time
from pathlib import Path

from tests.lab.process import LabError
from tests.lab.services import Lab
from tests.lab.worker import Worker, worker

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
TRIES = 200
APART_S = 0.03
"""Between the starts of the two: start times may be known to 10 ms only."""


def stranger(lab: Lab, first: Worker) -> Worker:
    """Another process, with the pid of one that has ended, and a later start."""
    time.sleep(max(first.started + APART_S - time.monotonic(), 0))
    before = LAST_PID.read_text(encoding="ascii")
    try:
        for _ in range(TRIES):
            LAST_PID.write_text(str(first.pid - 1), encoding="ascii")
            second = worker(lab)
            if second.pid == first.pid:
                return second
            lab.stop(second)  # somebody else was faster
    finally:
        LAST_PID.write_text(before, encoding="ascii")
    raise LabError(f"no process got pid {first.pid} in {TRIES} tries")
