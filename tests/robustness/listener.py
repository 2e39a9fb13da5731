# SPDX-License-Identifier: Apache-2.0
"""A monitor of a test, the program tests/robustness/listen.py: started, killed and started again, and its account."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.lab.process import LabError, Running
from tests.lab.services import Lab
from tests.lab.stopped import stopped
from tests.robustness.account import Account, Line

REPOSITORY = Path(__file__).resolve().parents[2]
Selection = dict[str, Any]
"""Arguments of `Monitor.register`, as far as JSON has them."""


class Listener:
    """One monitor through all its lives."""

    def __init__(self, lab: Lab, prefix: Sequence[str], broker: str, journal: Path, selections: Sequence[Selection], *options: str) -> None:
        self.selections = selections
        self.account = Account(journal)
        self._lab = lab
        self._command = [
            *prefix,
            sys.executable,
            "-m",
            "tests.robustness.listen",
            broker,
            str(journal),
            json.dumps(list(selections)),
            *options,
        ]
        self.process = self._start()

    def _start(self) -> Running:
        # Not from its folder: what the tests are called must be found.
        return self._lab.keep(Running("listener", self._command, cwd=REPOSITORY))

    @property
    def pid(self) -> int:
        """Of the process that lives now."""
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL."""
        self._lab.kill(self.process)
        self._lab.stop(self.process)

    def again(self) -> None:
        """Start it again, to carry on where it was."""
        self.process = self._start()

    def stopped(self) -> contextlib.AbstractContextManager[None]:
        """Within, it does not run."""
        return stopped(self.process)

    def hurry(self) -> None:
        """From now on as fast as it can."""
        self.process.say("hurry")

    def stop(self) -> None:
        """In order: its registrations end."""
        self._lab.stop(self.process)

    def wait(self, wanted: Callable[[Line], bool], what: str, *, limit: float = 30.0, start: int = 0) -> int:
        """The index of the first line of this life, from `start` on, that is `wanted`."""
        return self.process.wait_line(lambda text: wanted(json.loads(text)), what, limit=limit, start=start)

    @property
    def said(self) -> int:
        """How many lines this life has said so far: where to begin to wait for what is to come."""
        return len(self.process.lines)

    def line(self, index: int) -> Line:
        """A line of this life."""
        line: Line = json.loads(self.process.lines[index])
        return line

    def wait_armed(self, *, limit: float = 20.0) -> None:
        """Until all that it registered for is answered."""
        left = set(range(1, len(self.selections) + 1))

        def all_answered(line: Line) -> bool:
            if line["kind"] == "registered" and line["pending"] == 0:
                left.discard(line["registration_id"])
            return not left

        self.wait(all_answered, "answers to its registrations", limit=limit)

    def wait_answer(self, node: str, state: str, target: str, *, limit: float = 30.0) -> None:
        """Until a node has answered a registration so."""
        self.wait(
            lambda line: line["kind"] == "registered" and (line["node"], line["state"], line["target"]) == (node, state, target),
            f"{target} on {node} is {state}",
            limit=limit,
        )

    def wait_change(self, node: str, state: str, *, start: int = 0, limit: float = 30.0) -> int:
        """Until a node has come into a state; the line's index."""
        return self.wait(
            lambda line: (line["kind"], line.get("node"), line.get("state")) == ("node", node, state),
            f"{node} is {state}",
            start=start,
            limit=limit,
        )

    def wait_more(self, events: int, *, limit: float = 30.0) -> None:
        """Until it was told of so many more: things are in full swing."""
        told = 0

        def enough(line: Line) -> bool:
            nonlocal told
            told += int(line.get("count", 0))
            return told >= events

        self.wait(enough, f"{events} more events", limit=limit, start=self.said)

    def wait_end_of(self, pid: int, *, start: int = 0, limit: float = 30.0) -> int:
        """Until it was told of the end of a process."""
        return self.wait(lambda line: pid in line.get("ends", ()), f"the end of process {pid}", start=start, limit=limit)

    def wait_counted(self, total: int, *, limit: float = 40.0) -> None:
        """Until events and those that gaps count are so many, over all its lives, and whatever else is on its way has come.

        `limit`: seconds without one more of them.
        """
        counted, at = -1, 0
        try:
            while counted < total:
                at = self.wait(
                    lambda line, before=counted: int(line.get("counted", 0)) > before,  # type: ignore[misc]
                    f"{total} events, told or counted",
                    start=at,
                    limit=limit,
                )
                counted = int(self.line(at).get("counted", 0))
        except LabError as error:
            account = self.account.read()
            lost = {node: dict(account.lost(node)) for node in account.told}
            inferred = {node: dict(ends) for node, ends in account.inferred.items()}
            raise LabError(f"{error}\n-- told: {account.told}\n-- counted in gaps: {lost}\n-- inferred ends: {inferred}") from None
        self.settle()

    def wait_reached(self, number: int, *, limit: float = 40.0) -> None:
        """Until its heartbeats say that all up to this number of the broker's log was delivered.

        `limit`: seconds without one more event, counted or told.
        """
        counted = -1

        def comes_nearer(line: Line) -> bool:
            return int(line.get("counted", 0)) > counted or line.get("number", 0) >= number

        at = 0
        while True:
            at = self.wait(comes_nearer, f"all up to number {number} of the log", limit=limit, start=at)
            line = self.line(at)
            if line["kind"] == "progress" and line["number"] >= number:
                return
            counted = max(counted, int(line.get("counted", 0)))
            at += 1

    def heartbeat(self) -> int:
        """Up to which number of the broker's log the next heartbeat says that all was delivered."""
        at = self.wait(lambda line: line["kind"] == "progress", "a heartbeat", start=self.said)
        return int(self.line(at)["number"])

    def settle(self) -> None:
        """Until two further heartbeats: what was on its way before them has come. A slow one may have much to say before."""
        at, heartbeats = self.said - 1, 0
        while heartbeats < 2:
            at = self.wait(lambda _: True, "a heartbeat", start=at + 1)
            heartbeats += self.line(at)["kind"] == "progress"

    def resident_bytes(self) -> int:
        """Memory of the process that lives now."""
        return resident_bytes(self.pid)


def resident_bytes(pid: int) -> int:
    """Memory of a process (VmRSS)."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise ProcessLookupError(os.strerror(3))
