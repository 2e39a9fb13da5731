# SPDX-License-Identifier: Apache-2.0
"""Very many monitors in one process, each of the client library with a connection of its own. They count what they are told.

    python -m tests.robustness.crowd HOST:PORT MONITORS EACH AGENTS

Each makes so many registrations of its own: see tests/robustness/fleet.py. Prints a line of JSON when all are answered, and another one
when that is so again after the broker was started anew. A line on standard input has it print what was told so far.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter

from kmonitor.clients import (
    Batch,
    Disconnected,
    EventType,
    Gap,
    KmonitorError,
    Monitor,
    NodeChange,
    NodeState,
    Notice,
    Registered,
    connect,
)
from kmonitor.wire.descriptors import raise_file_limit
from tests.robustness.fleet import place

_TOGETHER = 20
"""Monitors that begin at once: how a crowd comes for the first time is not what is looked at."""
_EXIT = int(EventType.PROCESS_EXIT)


class Counting:
    """One monitor's account."""

    def __init__(self, crowd: Crowd, number: int) -> None:
        self.number = number
        self.answered: set[int] = set()
        """Registrations that were answered on this connection."""
        self.ends: Counter[tuple[str, int]] = Counter()
        self.told: Counter[str] = Counter()
        self._crowd = crowd

    async def register(self, monitor: Monitor) -> None:
        """All of its registrations."""
        each = self._crowd.each
        places = [place(number, self._crowd.agents) for number in range(self.number * each, (self.number + 1) * each)]
        await monitor.register_all([{"node": node, "pid": pid, "events": "exit"} for node, pid in places])

    async def listen(self, monitor: Monitor) -> None:
        """For as long as the stream lives, or comes back."""
        try:
            async for item in monitor.batches():
                self._take(item)
        except KmonitorError as error:
            self.told["refused"] += 1
            self._crowd.say(refused=f"{type(error).__name__}: {error}")

    def _take(self, item: Batch | Notice) -> None:
        if isinstance(item, Batch):
            self.ends.update((item.node, event.pid) for event in item.events if event.type == _EXIT)
        elif isinstance(item, Disconnected):
            self.answered.clear()
            self._crowd.gone(self, item.reason)
        elif isinstance(item, Gap):
            self.told["gaps"] += 1
        elif isinstance(item, NodeChange):
            self.told["unreachable"] += item.state is NodeState.UNREACHABLE
        elif isinstance(item, Registered):
            self.answered.add(item.registration_id)
            if len(self.answered) == self._crowd.each:
                self._crowd.here(self)


class Crowd:
    """All of them."""

    def __init__(self, address: str, monitors: int, each: int, agents: int) -> None:
        self.each = each
        self.agents = agents
        self._address = address
        self._all = [Counting(self, number) for number in range(monitors)]
        self._away: set[Counting] = set(self._all)
        self._reasons: Counter[str] = Counter()
        """Why streams were lost."""

    def say(self, **line: object) -> None:
        """One line out."""
        print(json.dumps(line), flush=True)

    def gone(self, monitor: Counting, reason: str) -> None:
        """It has lost the broker."""
        self._away.add(monitor)
        self._reasons[reason] += 1

    def here(self, monitor: Counting) -> None:
        """All that it registered was answered."""
        if monitor in self._away:
            self._away.discard(monitor)
            if not self._away:
                self.say(answered=time.monotonic())

    def count(self) -> None:
        """What all were told."""
        told, ends = Counter[str](), Counter[tuple[str, int]]()
        for each in self._all:
            told.update(each.told)
            ends.update(each.ends)
        gaps = [each.told["gaps"] for each in self._all]
        self.say(
            away=len(self._away),
            refused=told["refused"],
            lost=self._reasons,
            gaps=told["gaps"],
            monitors_with_gaps=sum(map(bool, gaps)),
            unreachable=told["unreachable"],
            ends=len(ends),
            twice=ends.total() - len(ends),
        )

    async def run(self) -> None:
        """Until the end of standard input."""
        monitors: list[Monitor] = []
        listening: list[asyncio.Task[None]] = []
        for first in range(0, len(self._all), _TOGETHER):
            some = self._all[first : first + _TOGETHER]
            opened = await asyncio.gather(*(connect(self._address).open() for _ in some))
            monitors += opened
            pairs = list(zip(some, opened, strict=True))
            listening += [asyncio.create_task(counting.listen(monitor)) for counting, monitor in pairs]
            await asyncio.gather(*(counting.register(monitor) for counting, monitor in pairs))
        loop = asyncio.get_running_loop()
        while await loop.run_in_executor(None, sys.stdin.readline):
            self.count()
        for task in listening:
            task.cancel()
        await asyncio.gather(*listening, return_exceptions=True)
        await asyncio.gather(*(monitor.close() for monitor in monitors))


if __name__ == "__main__":
    raise_file_limit()
    asyncio.run(Crowd(sys.argv[1], *map(int, sys.argv[2:5])).run())
