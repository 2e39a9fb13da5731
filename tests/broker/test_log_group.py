# SPDX-License-Identifier: Apache-2.0
"""What waits for more before it is written, and what does not: decision 17."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path

import pytest

from kmonitor.broker.log import sqlite
from kmonitor.broker.log.sqlite import SqliteLog
from tests.broker.logs import LIMIT_S, block

FOR_EVER = 1000.0


async def remembered(path: Path, key: str) -> None:
    """Until another connection finds a value in the file: nothing tells that it is there."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        async with asyncio.timeout(LIMIT_S):
            while connection.execute("SELECT 1 FROM remembered WHERE key = ?", (key,)).fetchone() is None:  # noqa: ASYNC110
                await asyncio.sleep(0.005)


async def test_what_was_registered_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that is killed right behind its answer must know of it."""
    monkeypatch.setattr(sqlite, "GROUP_S", FOR_EVER)
    path = tmp_path / "log"
    log = SqliteLog(path)
    for key in ("first", "second"):
        log.put("registrations", key, b"x")
        await remembered(path, key)
    await log.close()


async def test_blocks_wait_and_go_together_with_what_they_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "GROUP_S", FOR_EVER)
    path = tmp_path / "log"
    log = SqliteLog(path)
    log.append(block())
    log.put("spans", "caused", b"x")
    log.append(block(position=128))
    await asyncio.sleep(0.1)
    assert log.committed == 0
    async with asyncio.timeout(LIMIT_S):
        await log.flush()
    assert log.committed == 2, "who waits for it does not wait for more"
    await remembered(path, "caused")
    await log.close()
