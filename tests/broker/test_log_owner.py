# SPDX-License-Identifier: Apache-2.0
"""A log in a folder where others were first: what they made is neither used nor touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kmonitor.broker.log.database import LogFileError
from kmonitor.broker.log.sqlite import SqliteLog
from tests.broker.logs import opened


async def test_a_link_for_a_lock(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious", encoding="ascii")
    (tmp_path / "log.db-lock").symlink_to(target)
    with pytest.raises(LogFileError, match=f"cannot be opened: {tmp_path}/log.db-lock: it is a symbolic link: name a file"):
        SqliteLog(tmp_path / "log.db")
    assert target.read_text(encoding="ascii") == "precious"
    (tmp_path / "log.db-lock").unlink()
    (tmp_path / "log.db-lock").hardlink_to(target)
    with pytest.raises(LogFileError, match="it has another name too"):
        SqliteLog(tmp_path / "log.db")
    assert target.read_text(encoding="ascii") == "precious"


async def test_a_link_for_the_log(tmp_path: Path) -> None:
    async with opened(tmp_path / "there.db"):
        pass
    (tmp_path / "log.db").symlink_to("there.db")
    with pytest.raises(LogFileError, match=r"log\.db cannot be opened: it is a symbolic link"):
        SqliteLog(tmp_path / "log.db")


async def test_a_fifo(tmp_path: Path) -> None:
    for name in ("log.db", "log.db-lock"):
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)
        with pytest.raises(LogFileError, match="it is no regular file"):
            SqliteLog(tmp_path / "log.db")
        (tmp_path / name).unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
@pytest.mark.parametrize("name", ["log.db", "log.db-lock", "log.db-wal", "log.db-shm", "log.db-journal"])
async def test_a_file_of_another_user(tmp_path: Path, name: str) -> None:
    async with opened(tmp_path / "log.db"):
        pass
    (tmp_path / name).touch(mode=0o666)
    os.chown(tmp_path / name, 65534, 65534)
    with pytest.raises(LogFileError, match=r"it belongs to another user \(uid 65534\)"):
        SqliteLog(tmp_path / "log.db")


async def test_a_log_is_for_nobody_else(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        async with opened(tmp_path / "made" / "log.db"):
            found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "made").iterdir()}
    finally:
        os.umask(before)
    assert found == dict.fromkeys(("log.db", "log.db-lock", "log.db-wal", "log.db-shm"), 0o600)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o700
