# SPDX-License-Identifier: Apache-2.0
"""A steady workload in a node (tests/workload/pace.c): begun, stopped, and asked what it did."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np

from tests.lab.namespaces import InsideRoot, Machine
from tests.lab.services import Lab
from tests.robustness.account import Truth

EVERYTHING = "fekt"
"""Children that end, that exec, that are killed; threads."""
_numbers = itertools.count()


class Pace:
    """One run. It does nothing before `go`."""

    def __init__(
        self, lab: Lab, machine: Machine, program: Path, folder: Path, *, rate: float, count: int = 0, mix: str = EVERYTHING, seed: int = 1
    ):
        """At most `rate` deeds a second (0: flat out), `count` of them (0: until `stop`), each of which is two or three events."""
        self._file = folder / f"pace {next(_numbers)}"
        self.root: InsideRoot = machine.workload(lab, folder, program, str(seed), f"{rate:g}", str(count), mix, self._file)
        self.node = machine.name
        self.pid = self.root.root_pid
        self.seconds = 0.0
        self.deeds = 0

    @property
    def tree(self) -> dict[str, object]:
        """A registration of all that it does."""
        return {"node": self.node, "pid": self.pid, "follow": True, "events": "all"}

    def go(self) -> None:
        """Begin."""
        self.root.say("go")

    def stop(self) -> Truth:
        """Now, however much is left to do. What it did."""
        if self.root.process.poll() is None:
            self.root.close_input()
        return self.done()

    def done(self, limit: float = 120) -> Truth:
        """What it did, once it has ended: with its own end, as a tree that is followed."""
        self.root.wait_closed(limit)
        if self.root.wait() != 0:
            raise self.root.failure("the workload failed")
        totals = json.loads(self.root.lines[-1])
        self.seconds, self.deeds = totals["seconds"], totals["deeds"]
        deeds = np.fromfile(self._file, dtype="<i4").reshape(-1, 3)
        self._file.unlink()
        assert len(deeds) == self.deeds
        children = deeds[deeds[:, 0] != ord("t")]
        ends = Counter((int(pid), os.waitstatus_to_exitcode(int(status))) for _, pid, status in children)
        counts = Counter(
            {
                "PROCESS_FORK": len(children),
                "PROCESS_EXEC": totals["e"],
                "PROCESS_ABORT": totals["k"],
                "PROCESS_EXIT": len(children) + 1,
                "THREAD_CREATE": totals["t"],
                "THREAD_EXIT": totals["t"],
            }
        )
        return Truth(+counts, ends + Counter({(self.pid, 0): 1}))
