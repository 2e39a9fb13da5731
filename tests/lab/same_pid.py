# SPDX-License-Identifier: Apache-2.0
"""A second process with the pid that a first one had, as soon as the first one is gone."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from tests.lab.process import END_LIMIT, LabError, Running
from tests.lab.services import Lab

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
TRIES = 200
APART_S = 0.03
"""Between the starts of the two: start times may be known to 10 ms only."""


class Actor(Running):
    """A shell that forks, execs and exits when it is told so, with the code that it is told."""

    def __init__(self) -> None:
        super().__init__("actor", ["sh", "-c", "echo here; read code; /bin/true; exit $code"])
        self.started = time.monotonic()

    def wait_ready(self) -> None:
        """Until its own exec is over: what comes from then on is what it is told to do."""
        self.wait_line(lambda text: text == b"here", "a word")

    def end(self, code: int) -> None:
        """Fork, exec and exit; nothing is left of it then."""
        self.say(str(code))
        if self.wait() != code:
            raise self.failure(f"expected exit status {code}")

    def stop(self, number: signal.Signals = signal.SIGTERM, limit: float = END_LIMIT) -> int:
        """How it ended is for `end` to look at."""
        super().stop(number, limit)
        return 0


def actor(lab: Lab) -> Actor:
    """A first process."""
    first = lab.keep(Actor())
    first.wait_ready()
    return first


def stranger(lab: Lab, first: Actor) -> Actor:
    """Another process, with the pid of one that has ended, and a later start."""
    time.sleep(max(first.started + APART_S - time.monotonic(), 0))
    before = LAST_PID.read_text(encoding="ascii")
    try:
        for _ in range(TRIES):
            LAST_PID.write_text(str(first.pid - 1), encoding="ascii")
            second = lab.keep(Actor())
            if second.pid == first.pid:
                second.wait_ready()
                return second
            second.end(0)  # somebody else was faster
            lab.stop(second)
    finally:
        LAST_PID.write_text(before, encoding="ascii")
    raise LabError(f"no process got pid {first.pid} in {TRIES} tries")
