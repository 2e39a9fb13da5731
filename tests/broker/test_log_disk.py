# SPDX-License-Identifier: Apache-2.0
"""A disk that is full, files that are no logs, retention, and what is given up."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kmonitor.broker.block import Block
from kmonitor.broker.log import Entry
from kmonitor.broker.log import sqlite as sqlite_module
from kmonitor.broker.log.database import LogFileError
from kmonitor.broker.log.memory import MemoryLog
from kmonitor.broker.log.sqlite import SqliteLog
from kmonitor.broker.mark import Mark, MarkKind
from tests.broker.logs import LIMIT_S, Told, block, content, contents, mark, opened


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """2 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "kmonitor-test", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def full(folder: Path, pages: int = 0) -> Iterator[None]:
    """No more than so many pages are free meanwhile."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(file.tell() - pages * 4096)
    try:
        yield
    finally:
        filler.unlink()


class Feed:
    """Appends blocks of node a, one behind the other."""

    def __init__(self, log: SqliteLog) -> None:
        self.log = log
        self.position = 0
        self.made: list[Entry] = []

    def add(self, count: int, records: int = 40, node: str = "a") -> None:
        for _ in range(count):
            made = block(node, self.position, records)
            self.log.append(made)
            self.made.append(made)
            self.position = made.end


async def trouble(told: Told) -> None:
    """Until it is said."""
    await told.until(lambda: told.troubles and told.troubles[-1])


async def test_full_disk(small_disk: Path) -> None:
    path = small_disk / "log.db"
    async with opened(path) as (log, told):
        feed = Feed(log)
        feed.add(3)
        await told.committed()
        with full(small_disk):
            for _ in range(30):
                feed.add(3)
                log.put("x", "at", str(log.end).encode())
                await asyncio.sleep(0)
            await trouble(told)
            stood = log.committed
            assert stood < log.end
            feed.add(10)
            await asyncio.wait_for(log.flush(), 5)  # says that it cannot be
            await asyncio.wait_for(log.flush(), 5)
            assert contents(log) == [content(entry) for entry in feed.made]
            assert log.values("x") == {"at": b"93"}
            assert log.committed == stood
            assert log.offset_behind("a", 1, feed.made[-2].end) == log.end - 1
            assert len(told.troubles) == 1
            assert told.troubles[0] == (
                f"the log cannot be written: disk full: make room for {path}; acknowledgements wait; events go on live"
            )
        await told.committed()
        await told.until(lambda: told.troubles[-1] == "")
        assert len(told.troubles) == 2
        assert contents(log) == [content(entry) for entry in feed.made]
    async with opened(path) as (log, _):
        assert contents(log) == [content(entry) for entry in feed.made]
        assert log.values("x") == {"at": b"93"}


async def test_opened_and_closed_on_a_full_disk(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = small_disk / "log.db"
    async with opened(path) as (log, told):
        Feed(log).add(4)
        await told.committed()
    with full(small_disk), pytest.raises(LogFileError) as caught:  # no room for SQLite's index beside the file
        SqliteLog(path)
    assert str(caught.value) == f"the log {path} cannot be opened: disk full: make room there, or name another file"
    with full(small_disk, 8):  # for that, and nothing else
        log = SqliteLog(path)
        told = Told(log)
        assert len(log.read(0, 1 << 20)) == 4
        log.append(block("b", 0, 3000))
        log.put("x", "y", b"z")
        await trouble(told)
        async with asyncio.timeout(4):
            await log.close()
        assert "1 blocks and marks of 1 nodes (b), 1 values: disk full" in caplog.text
    async with opened(path) as (log, _):
        assert len(log.read(0, 1 << 20)) == 4


async def test_give_up(small_disk: Path) -> None:
    path = small_disk / "log.db"
    async with opened(path) as (log, told):
        feed = Feed(log)
        feed.add(2)
        await told.committed()
        with full(small_disk):
            feed.add(60, 40)
            lost = mark(MarkKind.LOST, "a", feed.position - 128, feed.position)
            log.append(lost)
            feed.add(40, 40)
            other = block("b", 0, 5)
            log.append(other)
            await trouble(told)
            middle, position = log.committed, feed.position
            waiting = [entry for entry in feed.made if entry.offset >= middle]
            log.give_up("a", 1, position - 1)  # all but the last
            log.give_up("b", 7, 1 << 60)
            await asyncio.wait_for(log.flush(), 5)
            gone = waiting[:-1]
            found = log.read(middle, 1 << 40)
            assert [entry.offset for entry in found] == [lost.offset, gone[-1].offset, waiting[-1].offset, other.offset]
            one = found[1]
            assert isinstance(one, Mark)
            assert (one.kind, one.offset, one.boot_id) == (MarkKind.UNLOGGED, gone[-1].offset, gone[-1].boot_id)
            assert (one.position, one.end) == (gone[0].position, gone[-1].end)
            assert (one.time_ns, one.end_time_ns) == (1_000, 1_039)
            assert log.committed < log.end
            # More of the same.
            feed.add(50, 40)
            log.give_up("a", 1, feed.position)
            await asyncio.wait_for(log.flush(), 5)
            found = log.read(middle, 1 << 40)
            assert [type(entry) for entry in found] == [Mark, Block, Mark]
            assert (found[2].position, found[2].end, found[2].offset) == (gone[0].position, feed.position, log.end - 1)
            assert log.offset_behind("a", 1, gone[0].position) is not None
        await told.committed()
        before = contents(log)
        assert len(before) == 2 + len([entry for entry in feed.made[2:] if entry.offset < middle]) + 3
    async with opened(path) as (log, _):
        assert contents(log) == before
        assert log.read(found[2].offset - 3, 1)[0].offset == found[2].offset
        assert log.ends("a")[1].position == feed.position


async def test_nothing_is_given_up_that_is_written(tmp_path: Path) -> None:
    async with opened(tmp_path / "log.db") as (log, told):
        feed = Feed(log)
        feed.add(2)
        await told.committed()
        log.give_up("a", 1, feed.position)
        await asyncio.sleep(0)
        feed.add(1)
        await told.committed()
        assert contents(log) == [content(entry) for entry in feed.made]


async def test_memory_gives_nothing_up() -> None:
    log = MemoryLog()
    log.append(block())
    log.give_up("a", 1, 1 << 60)
    await log.flush()
    assert len(log.read(0, 1)) == log.committed == 1
    await log.close()


async def test_slow_disk_is_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program holds the file: as a disk that does not answer."""
    monkeypatch.setattr(sqlite_module, "SLOW_S", 0.2)
    path = tmp_path / "log.db"
    async with opened(path) as (log, told):
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        feed = Feed(log)
        feed.add(2)
        await trouble(told)
        assert "has not answered for 0.2 s; acknowledgements wait" in told.troubles[0]
        feed.add(2)  # these wait, and can be given up at once
        log.give_up("a", 1, feed.position)
        await asyncio.sleep(0)
        assert [type(entry) for entry in log.read(0, 1 << 20)] == [Block, Block, Mark]
        other.execute("ROLLBACK")
        other.close()
        await told.committed()
        await told.until(lambda: told.troubles[-1] == "")
        assert [type(entry) for entry in log.read(0, 1 << 20)] == [Block, Block, Mark]


async def test_closing_does_not_wait_for_a_disk_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sqlite_module, "CLOSE_S", 0.2)
    path = tmp_path / "log.db"
    log = SqliteLog(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    Feed(log).add(2)
    async with asyncio.timeout(4):  # SQLite waits for longer
        await log.close()
    assert "2 blocks and marks of 1 nodes (a), 0 values: the disk has not answered for 0.2 s" in caplog.text
    other.execute("ROLLBACK")
    other.close()
    # Its thread ends when it can, and only then others may have the file.
    with path.with_name("log.db-lock").open() as lock:
        await asyncio.wait_for(asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX), LIMIT_S)


@pytest.mark.parametrize("records", [1, 60, 2000])
async def test_retention_by_bytes(tmp_path: Path, records: int) -> None:
    path, limit = tmp_path / "log.db", 2 << 20
    async with opened(path, max_bytes=limit) as (log, told):
        feed = Feed(log)
        total = 0
        while total < 4 * limit:
            feed.add(max(1, 100_000 // (128 * records)), records)
            total = sum(len(entry.data) + 200 for entry in feed.made if isinstance(entry, Block))
            await log.flush()
            assert path.stat().st_size < 1.5 * limit
            assert path.with_name("log.db-wal").stat().st_size < 32 << 20
        assert told.evictions == sorted(set(told.evictions))
        assert log.oldest == told.evictions[-1] > 0
        here = contents(log)
        assert here == [content(entry) for entry in feed.made[log.oldest :]]
        assert sum(len(each[6]) + 200 for each in here) > limit // 3
        dropped = log.ends("a")[1].dropped
        assert dropped is not None
        gone = feed.made[log.oldest - 1]
        assert isinstance(gone, Block)
        assert (dropped.last, dropped.end, dropped.time_ns) == (gone.end - 128, gone.end, gone.unix_ns(records - 1))
    async with opened(path, max_bytes=limit) as (log, _):
        assert contents(log) == here
        assert log.ends("a")[1].dropped == dropped
    # A smaller bound, and only the newest stays.
    async with opened(path, max_bytes=1) as (log, told):
        await log.flush()
        log.put("x", "y", b"z")
        await told.until(lambda: log.oldest == feed.made[-1].offset)
        assert contents(log) == here[-1:]


async def test_retention_by_age(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    async with opened(path, max_age_s=3600) as (log, told):
        Feed(log).add(10_000, 1)
        await told.committed()
        assert not told.evictions
    async with opened(path, max_age_s=0.1) as (log, told):
        await told.until(lambda: log.oldest == 9999)  # nothing comes: it looks by itself
        assert len(told.evictions) > 1, "not all at once"
        assert log.ends("a")[1].offset == 9999


async def test_while_it_is_evicted_it_can_be_read(tmp_path: Path) -> None:
    read: list[int] = []
    async with opened(tmp_path / "log.db", max_bytes=1 << 20) as (log, told):

        def evict(until: int) -> None:
            offset = log.oldest
            while offset < until:
                found = log.read(offset, 50_000)
                read.extend(entry.offset for entry in found if entry.offset < until)
                offset = found[-1].offset + 1
            told.evictions.append(until)

        log.on_evict = evict
        feed = Feed(log)
        for _ in range(60):
            feed.add(20, 20)
            await log.flush()
        assert read == list(range(log.oldest))
        assert read


async def test_two_at_once(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    async with opened(path) as (log, _):
        with pytest.raises(LogFileError, match=rf"is in use by another broker \(pid {os.getpid()}\): stop that one") as caught:
            SqliteLog(path)
        assert "\n" not in str(caught.value)
        log.append(block())
        await log.flush()
    async with opened(path) as (log, _):
        assert len(log.read(0, 1)) == 1


def text(path: Path) -> str:
    path.write_text("all my notes\n" * 1000)
    return "is damaged, or no log (file is not a database): move it and"


def garbled(path: Path) -> str:
    log = sqlite3.connect(path)
    log.execute("CREATE TABLE t (x)")
    log.close()
    data = bytearray(path.read_bytes())
    data[100:3000] = b"\xee" * 2900
    path.write_bytes(data)
    return "is damaged, or no log (database disk image is malformed): move it and"


def other_database(path: Path) -> str:
    log = sqlite3.connect(path)
    log.execute("CREATE TABLE t (x)")
    log.close()
    return "is a database, but no log of kmonitor: name another file"


def later_version(path: Path) -> str:
    async def make() -> None:
        async with opened(path):
            pass

    asyncio.run(make())
    log = sqlite3.connect(path)
    log.execute("PRAGMA user_version = 2")
    log.close()
    return "is of version 2, this broker writes version 1: use the broker that made it, or move"


def no_meta(path: Path) -> str:
    later_version(path)
    log = sqlite3.connect(path, isolation_level=None)
    log.execute("PRAGMA user_version = 1")
    log.execute("DELETE FROM meta")
    log.close()
    return "is damaged, or no log (KeyError 'log_id'): move it and"


def a_folder(path: Path) -> str:
    path.mkdir()
    return "cannot be opened: is a directory: name a file that this user may make and write"


@pytest.mark.parametrize("make", [text, garbled, other_database, later_version, no_meta, a_folder])
def test_bad_files(tmp_path: Path, make: object) -> None:
    assert callable(make)
    path = tmp_path / "log.db"
    expected = make(path)
    before = path.read_bytes() if path.is_file() else b""

    async def inside() -> None:
        threads = threading.active_count()
        for _ in range(2):  # the first one gives the lock back
            with pytest.raises(LogFileError) as caught:
                SqliteLog(path)
            assert expected in str(caught.value)
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)
        assert threading.active_count() == threads

    asyncio.run(inside())
    assert (path.read_bytes() if path.is_file() else b"") == before, "it is left as it was"


async def test_bad_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path / "file" / "log.db", "not a directory|file exists"),
        (Path("/proc/nowhere/log.db"), "no such file or directory"),
    ):
        with pytest.raises(LogFileError, match=f"^the log {path} cannot be opened: ({reason}): name a file that this user may"):
            SqliteLog(path)


async def test_read_only_disk(small_disk: Path) -> None:
    async with opened(small_disk / "log.db"):
        pass
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)  # noqa: ASYNC221 -- at once
    with pytest.raises(LogFileError, match="cannot be opened: read-only file system: name"):
        SqliteLog(small_disk / "log.db")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_use() -> tuple[int, int]:
    """Descriptors and threads."""
    return len(names(Path("/proc/self/fd"))), threading.active_count()


async def test_nothing_is_left_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "kmonitor"):
        before = in_use()
        for _ in range(3):
            async with opened(tmp_path / "log.db") as (log, _):
                Feed(log).add(10)
            await log.close()
        assert in_use() == before
    assert names(tmp_path) == ["log.db", "log.db-lock"]
    assert not caplog.records
