# SPDX-License-Identifier: Apache-2.0
"""`kmon watch --json` as it runs: its lines as objects, and waits for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.lab.process import Running

Line = dict[str, Any]
"""An object of a JSON line."""


class Watch(Running):
    """Lines are taken as they come, and parsed when they are asked for."""

    def __init__(self, argv: Sequence[str | Path]) -> None:
        super().__init__("kmon watch", argv)
        self._parsed: list[Line] = []

    @property
    def records(self) -> list[Line]:
        """All lines so far."""
        for text in self.lines[len(self._parsed) :]:
            self._parsed.append(json.loads(text))
        return self._parsed

    def events(self) -> list[Line]:
        """The lines that are events."""
        return self.of_kind("event")

    def of_kind(self, kind: str) -> list[Line]:
        """The lines of one kind."""
        return [line for line in self.records if line["kind"] == kind]

    def wait_for(self, wanted: Callable[[Line], bool], what: str, *, limit: float = 20.0, start: int = 0) -> int:
        """The index in `records` of the first line from `start` on that is `wanted`."""
        return self.wait_line(lambda text: wanted(json.loads(text)), what, limit=limit, start=start)

    def wait_registered(self, count: int, *states: str, limit: float = 20.0) -> list[Line]:
        """The first `count` answers to its registrations. If `states` are given, each must have one of them."""
        at = -1
        for number in range(count):
            at = self.wait_for(lambda line: line["kind"] == "registered", f"answer {number + 1} of {count}", limit=limit, start=at + 1)
        answers = self.of_kind("registered")[:count]
        for answer in answers:
            if states and answer.get("state") not in states:
                raise self.failure(f"answered {answer}, expected {' or '.join(states)}")
        return answers

    def wait_end_of(self, pid: int, *, limit: float = 20.0) -> int:
        """Until the end of a process comes: all that happened on its node before it has come by then."""
        # Looked for as bytes first: under a storm this runs once for each line.
        number = str(pid).encode()

        def is_end(text: bytes) -> bool:
            if b"PROCESS_EXIT" not in text or number not in text:
                return False
            line = json.loads(text)
            return bool(line["kind"] == "event" and line["type"] == "PROCESS_EXIT" and line["pid"] == pid)

        return self.wait_line(is_end, f"the end of process {pid}", limit=limit)
