# SPDX-License-Identifier: Apache-2.0
"""Storms, and what they wrote down: of a length that is known before (tests/workload/storm.c), or until they are told (pace.c)."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.lab.services import Lab
from tests.lab.workload import Programs, Root


@dataclass
class Storm:
    """Ids and statuses of all that ended, by the worker that started them. Ids may come again: the kernel gives them out anew."""

    root: int
    count: int
    seconds: float
    ends: dict[int, list[tuple[int, int]]]

    @property
    def rate(self) -> float:
        """Ends in a second."""
        return self.count / self.seconds

    def statuses(self) -> Counter[tuple[int, int]]:
        """(id, exit code) of all ends."""
        return Counter((number, os.waitstatus_to_exitcode(status)) for ends in self.ends.values() for number, status in ends)

    def started(self) -> Counter[tuple[int, int]]:
        """(worker's pid, id) of all that were started."""
        return Counter((worker, number) for worker, ends in self.ends.items() for number, _ in ends)


def start(lab: Lab, programs: Programs, folder: Path, kind: str, count: int, workers: int = 2) -> Root:
    """Make one that waits for the word. `folder` is made, and is for `read`."""
    folder.mkdir()
    made = lab.keep(Root([programs.storm, kind, str(count), str(workers), folder], cwd=folder.parent))
    made.wait_ready()
    return made


def start_endless(lab: Lab, programs: Programs, folder: Path, workers: int = 2) -> list[Root]:
    """So many, each of which makes children as fast as it can from the word until `end`. `folder` is made."""
    folder.mkdir()
    made = [lab.keep(Root([programs.pace, str(number), "0", "0", "f", folder / str(number)], cwd=folder)) for number in range(workers)]
    for root in made:
        root.wait_ready()
    return made


def end(roots: list[Root], folder: Path) -> Storm:
    """Of such ones. Their files are removed."""
    ends: dict[int, list[tuple[int, int]]] = {}
    seconds = 0.0
    for root in roots:
        root.close_input()
    for number, root in enumerate(roots):
        root.wait_closed(120)
        if root.wait() != 0:
            raise root.failure("the storm failed")
        seconds = max(seconds, json.loads(root.lines[-1])["seconds"])
        deeds = np.fromfile(folder / str(number), dtype="<i4").reshape(-1, 3)
        (folder / str(number)).unlink()
        ends[root.root_pid] = [(int(child), int(status)) for _, child, status in deeds]
    return Storm(roots[0].root_pid, sum(map(len, ends.values())), seconds, ends)


def read(root: Root, folder: Path) -> Storm:
    """After its end. Its files are removed."""
    root.wait_closed(120)
    if root.wait() != 0:
        raise root.failure("the storm failed")
    totals = json.loads(root.lines[-1])
    ends: dict[int, list[tuple[int, int]]] = {}
    for file in folder.iterdir():
        pairs = np.fromfile(file, dtype="<i4").reshape(-1, 2)
        ends[int(file.name)] = [(int(number), int(status)) for number, status in pairs]
        file.unlink()
    storm = Storm(root.root_pid, totals["count"], totals["seconds"], ends)
    assert sum(map(len, ends.values())) == storm.count
    return storm
