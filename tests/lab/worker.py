# SPDX-License-Identifier: Apache-2.0
"""A process that does what it is told."""

from __future__ import annotations

import signal
import time

from tests.lab.process import END_LIMIT, Running
from tests.lab.services import Lab


class Worker(Running):
    """A shell that starts a process when it is told to, or ends with the code that it is told."""

    def __init__(self) -> None:
        script = 'echo here; while read word; do [ "$word" = go ] || exit "$word"; /bin/true; echo did; done'
        super().__init__("worker", ["sh", "-c", script])
        self.started = time.monotonic()
        # Its own exec is over then.
        self.wait_line(lambda text: text == b"here", "a word")

    def work(self) -> None:
        """A fork, and an exec and an exit by the child."""
        done = len(self.lines)
        self.say("go")
        self.wait_line(lambda text: text == b"did", "its work", start=done)

    def end(self, code: int) -> None:
        """End with that code; nothing is left of it then."""
        self.say(str(code))
        if self.wait() != code:
            raise self.failure(f"expected exit status {code}")

    def stop(self, number: signal.Signals = signal.SIGTERM, limit: float = END_LIMIT) -> int:
        """How it ended is for `end` to look at."""
        super().stop(number, limit)
        return 0


def worker(lab: Lab) -> Worker:
    """One that `lab` stops."""
    return lab.keep(Worker())
