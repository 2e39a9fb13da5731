# SPDX-License-Identifier: Apache-2.0
"""What was committed outlives the broker's death, and damage is told and not taken for events."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sqlite3
import sys
from pathlib import Path

import pytest

from kmonitor.broker.block import Block
from kmonitor.broker.log import Entry
from kmonitor.broker.log.database import PAGE_BYTES
from kmonitor.broker.log.sqlite import SqliteLog
from kmonitor.broker.mark import Mark, MarkKind
from tests.broker.logs import LIMIT_S, block, content, contents, mark, opened

ROOT = Path(__file__).parents[2]


def check_stream(log: SqliteLog) -> None:
    """Both nodes' blocks without a hole, and the values as of the last of them."""
    at = {"a": 0, "b": 0}
    for entry in log.read(0, 1 << 40):
        assert isinstance(entry, Block)
        assert entry.position == at[entry.node]
        at[entry.node] = entry.end
    # In the order in which they were put: a value is of its block or of the one before.
    values = {node: int(value) for node, value in log.values("positions").items()}
    for node, end in at.items():
        assert log.ends(node)[1].position == end
        assert values[node] <= end


@pytest.mark.parametrize("commits", [1, 60])
async def test_killed_while_it_appends(tmp_path: Path, commits: int) -> None:
    path = tmp_path / "new" / "log.db"
    committed = ended = 0
    for _ in range(2):  # the second goes on in what the first has left
        argv = [sys.executable, "-m", "tests.broker.log_appender", str(path)]
        child = await asyncio.create_subprocess_exec(*argv, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
        assert child.stdout is not None
        async with asyncio.timeout(LIMIT_S):
            for _ in range(commits):
                committed = int(await child.stdout.readline())
            child.kill()
            rest = (await child.stdout.read()).decode().split("\n")
            assert await child.wait() == -signal.SIGKILL
        committed = int(rest[-2]) if len(rest) > 1 else committed
        assert committed >= ended
        async with opened(path) as (log, told):
            here = [entry.offset for entry in log.read(0, 1 << 40)]
            assert set(range(ended, committed)) <= set(here), "all that was committed"
            assert here == sorted(set(here))
            check_stream(log)
            assert log.committed == log.end > max(here)
            position = log.ends("a")[1].position
            log.append(block("a", position))
            log.put("positions", "a", str(position + 128).encode())
            await told.committed()
            ended = log.end
            check_stream(log)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o077 == 0


def files(folder: Path, to: Path) -> Path:
    """As a crash leaves them."""
    shutil.copytree(folder, to)
    return to / "log.db"


async def fill(log: SqliteLog, count: int) -> None:
    for at in range(count):
        log.append(block("a", at * 1280, 10))
        await log.flush()


@pytest.mark.parametrize("fault", ["cut off", "cut in a frame", "garbled", "its index is another's"])
async def test_log_in_front_is_torn(tmp_path: Path, fault: str) -> None:
    (tmp_path / "live").mkdir()
    async with opened(tmp_path / "live" / "log.db") as (log, _):
        await fill(log, 30)
        path = files(tmp_path / "live", tmp_path / "crashed")
    wal, shm = path.with_name("log.db-wal"), path.with_name("log.db-shm")
    data = wal.read_bytes()
    if fault == "cut off":
        wal.write_bytes(data[: -4096 - 24])
    elif fault == "cut in a frame":
        wal.write_bytes(data[:-1000])
    elif fault == "garbled":
        wal.write_bytes(data[:-2000] + os.urandom(2000))
    else:
        shm.write_bytes(os.urandom(len(shm.read_bytes())))
    async with opened(path) as (log, told):
        here = [entry.offset for entry in log.read(0, 1 << 40)]
        assert here == list(range(30)) if "index" in fault else 20 <= len(here) < 30
        assert here == list(range(len(here)))
        log.append(block("a", len(here) * 1280))
        await told.committed()
        assert not told.troubles


async def test_rows_that_are_damaged_are_told_as_marks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log.db"
    async with opened(path) as (log, _):
        await fill(log, 6)
        log.append(mark(MarkKind.LOST, "a", 7600, 7680))
    changes = [
        "UPDATE entries SET data = substr(data, 1, 100) || x'ff' || substr(data, 102) WHERE offset = 1",
        "UPDATE entries SET data = x'' WHERE offset = 2",
        "UPDATE entries SET kind = 99 WHERE offset = 3",
        "UPDATE entries SET node = x'ff' WHERE offset = 4",
        "UPDATE entries SET data = 'times' WHERE offset = 6",
    ]
    with sqlite3.connect(path) as database:
        for change in changes:
            database.execute(change)
    database.close()
    async with opened(path) as (log, told):
        with caplog.at_level(logging.WARNING):
            found = log.read(0, 1 << 20)
            again = log.read(0, 1 << 20)
        assert [content(entry) for entry in found] == [content(entry) for entry in again]
        assert [entry.offset for entry in found] == [0, 1, 2, 3, 5, 6]
        marks = [entry for entry in found if isinstance(entry, Mark)]
        assert [(each.kind, each.node, each.position, each.end) for each in marks] == [
            (MarkKind.UNLOGGED, "a", at * 1280, (at + 1) * 1280) for at in (1, 2, 3)
        ] + [(MarkKind.UNLOGGED, "a", 7600, 7680)]
        assert len(caplog.records) == 5, "once for each"
        assert not told.troubles


async def test_pages_that_are_damaged_are_told_as_marks_and_as_trouble(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    async with opened(path) as (log, _):
        await fill(log, 40)
        log.append(block("b", 0, epoch=9))
    data = bytearray(path.read_bytes())
    places = [at for at in range(0, len(data), PAGE_BYTES) if data[at] == 0x0D and at > 8 * PAGE_BYTES]  # leaves of tables
    at = places[len(places) // 2]
    data[at : at + 64] = b"\xee" * 64
    path.write_bytes(data)
    async with opened(path) as (log, told):
        log.append(block("a", 40 * 1280))
        found = []
        offset = 0
        while more := log.read(offset, 4000):
            found += more
            offset = more[-1].offset + 1
        blocks = [entry for entry in found if isinstance(entry, Block)]
        marks = [entry for entry in found if isinstance(entry, Mark)]
        count = len(blocks) - 1
        assert [entry.position for entry in blocks] == [at * 1280 for at in (*range(count), 40)]
        assert 0 < count < 40
        assert {(each.kind, each.node, each.epoch) for each in marks} == {(MarkKind.UNLOGGED, "a", 1), (MarkKind.UNLOGGED, "b", 9)}
        assert max(each.end for each in marks if each.node == "a") == 40 * 1280
        assert len([line for line in told.troubles if "cannot be read" in line]) == 1
        assert log.offset_behind("a", 1, 0) is not None


async def test_values_and_entries_of_64_bits(tmp_path: Path) -> None:
    path, most = tmp_path / "log.db", (1 << 64) - 1
    made: list[Entry] = [
        block("a", most - 127, 0, epoch=most, shift=-(1 << 63)),
        mark(MarkKind.HOLE, "a", 0, most, epoch=most, times=(0, most)),
        mark(MarkKind.HOLE, "a", 1 << 63, most, epoch=1 << 63, times=(1 << 70, most)),
        block("b", most - 128 * 3, 2, epoch=(1 << 63) + 1, shift=(1 << 63) - 1),
    ]
    async with opened(path) as (log, told):
        for entry in made:
            log.append(entry)
        log.put("", "\0", bytes(range(256)))
        await told.committed()
        assert not told.troubles
    async with opened(path) as (log, _):
        assert contents(log) == [content(entry) for entry in made]
        assert log.values("") == {"\0": bytes(range(256))}
        assert {epoch: end.position for epoch, end in log.ends("a").items()} == {most: most, 1 << 63: most}
        assert log.offset_behind("a", most, most) == 2
        assert log.offset_behind("a", most, most - 1) == 1
        assert log.offset_behind("b", (1 << 63) + 1, most - 128) == 4
