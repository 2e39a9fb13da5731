# SPDX-License-Identifier: Apache-2.0
"""What the tests of the log share: entries made by hand, compared by what they hold, and waiting for a commit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from kmonitor.broker.block import Block
from kmonitor.broker.log import Entry, EventLog
from kmonitor.broker.log.memory import MemoryLog
from kmonitor.broker.log.sqlite import SqliteLog
from kmonitor.broker.mark import Mark, MarkKind
from tests.broker.records import EXEC, EXIT, Rec, build, rec

LIMIT_S = 20.0
"""For what comes by itself: the machine may be busy."""

BOOT = "0f7a2f55-3d5e-4c0e-9d3a-0e1a9bb7a001"


def block(node: str = "a", position: int = 0, records: int = 1, *, epoch: int = 1, shift: int = 1_000, pid: int = 100) -> Block:
    """So many exits of one process."""
    return Block(node, epoch, position, build([rec(EXIT, pid, boottime_ns=at) for at in range(records)]), shift, BOOT)


def execs(node: str, position: int, count: int, *, epoch: int = 1) -> Block:
    """Records that take several slots each."""
    made: list[Rec] = [rec(EXEC, 7, filename=b"/bin/x", args=(b"y" * 200,), boottime_ns=at) for at in range(count)]
    return Block(node, epoch, position, build(made), -5, "")


def mark(kind: MarkKind, node: str = "a", position: int = 0, end: int = 0, *, epoch: int = 1, times: tuple[int, int] = (3, 4)) -> Mark:
    """With counts, if it is one of LOST."""
    counts = {(0x40, True): 2, (0x08, False): 1} if kind == MarkKind.LOST else {}
    return Mark(kind, node, BOOT, epoch, position, end, *times, counts, rebooted=kind == MarkKind.EPOCH)


def content(entry: Entry) -> tuple[Any, ...]:
    """All that must come back."""
    common = (entry.offset, entry.node, entry.boot_id, entry.epoch, entry.position, entry.end)
    if isinstance(entry, Block):
        return (*common, entry.data, entry.boottime_to_unix_ns)
    return (*common, entry.kind, entry.time_ns, entry.end_time_ns, entry.counts, entry.rebooted)


def contents(log: EventLog, offset: int = 0) -> list[tuple[Any, ...]]:
    """Of all that is there, read in small steps."""
    out = []
    while found := log.read(offset, 5_000):
        out += [content(entry) for entry in found]
        offset = found[-1].offset + 1
    return out


class Told:
    """What a log says by itself."""

    def __init__(self, log: EventLog) -> None:
        self.log = log
        self.troubles: list[str] = []
        self.evictions: list[int] = []
        self._news = asyncio.Event()
        log.on_commit = lambda _: self._news.set()
        log.on_trouble = self._trouble
        log.on_evict = self._evict

    def _trouble(self, line: str) -> None:
        assert "\n" not in line
        self.troubles.append(line)
        self._news.set()

    def _evict(self, until: int) -> None:
        assert self.log.read(self.log.oldest, 1)[0].offset < until, "while it is told, it can still be read"
        self.evictions.append(until)
        self._news.set()

    async def committed(self, offset: int | None = None) -> None:
        """Until all below an offset is committed; below the end, if it is not given."""
        wanted = self.log.end if offset is None else offset
        await self.until(lambda: self.log.committed >= wanted)

    async def until(self, reached: Any) -> None:
        """Until a condition holds that changes with what is told."""
        async with asyncio.timeout(LIMIT_S):
            while not reached():
                self._news.clear()
                await self._news.wait()


@asynccontextmanager
async def opened(path: Path, **options: Any) -> AsyncIterator[tuple[SqliteLog, Told]]:
    """The log in a file, closed behind it."""
    log = SqliteLog(path, **options)
    try:
        yield log, Told(log)
    finally:
        await log.close()


def make(form: str, folder: Path, max_bytes: int) -> EventLog:
    """A log of a form: "memory" or "sqlite"."""
    return MemoryLog(max_bytes) if form == "memory" else SqliteLog(folder / "log.db", max_bytes=max_bytes)
