# SPDX-License-Identifier: Apache-2.0
"""Another program that reads the log's file for long: the log in front of it grows meanwhile, and that is said."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from pathlib import Path

import pytest

from kmonitor.broker.block import Block
from kmonitor.broker.log import writer
from tests.broker.logs import block, opened


async def test_the_log_in_front_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(writer, "FRONT_MOST", 40 << 20)
    path = tmp_path / "log.db"
    data = block("a", 0, 8192).data
    position = 0

    async def write(megabytes: int) -> None:
        nonlocal position
        for _ in range(megabytes):
            log.append(Block("a", 1, position, data, 0))
            position += len(data)
            await log.flush()

    with caplog.at_level(logging.WARNING, "kmonitor"):
        async with opened(path, max_bytes=16 << 20) as (log, _):
            await write(30)
            assert not caplog.records
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute("BEGIN")
                other.execute("SELECT count(*) FROM entries").fetchone()
                await write(70)
                (record,) = caplog.records
                assert f"and grows: another program reads {path}, and has not ended its transaction" in record.getMessage()
            await write(30)
    assert [record.getMessage() for record in caplog.records][1:] == [f"{path}-wal is small again"]
