# SPDX-License-Identifier: Apache-2.0
"""Track files and cursors in folders where others were first: links, FIFOs and others' files are one line, and are not touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kmonitor.clients import Cursor, UsageError
from tests.clients.conftest import Kmon
from tests.clients.fake_broker import FakeBroker
from tests.clients.test_watch import ended

CURSOR = '{"version": 1, "positions": []}\n'


def plant(path: Path, kind: str) -> str:
    """Put it there; the words that name it."""
    if kind == "link":
        path.with_name("target").write_text("precious", encoding="ascii")
        path.symlink_to("target")
        return "it is a symbolic link"
    if kind == "fifo":
        os.mkfifo(path)
        return "it is no regular file"
    path.write_text(CURSOR, encoding="ascii")
    os.chown(path, 65534, 65534)
    return "it belongs to another user (uid 65534)"


def check_untouched(path: Path, kind: str) -> None:
    if kind == "link":
        assert path.is_symlink()
        assert path.with_name("target").read_text(encoding="ascii") == "precious"
    elif kind == "fifo":
        assert path.is_fifo()
    else:
        assert (path.read_text(encoding="ascii"), path.stat().st_uid) == (CURSOR, 65534)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
KINDS = pytest.mark.parametrize("kind", ["link", "fifo", pytest.param("other", marks=needs_root)])


@KINDS
@pytest.mark.parametrize("more", [(), ("--write-blind",)])
async def test_a_track_file(broker: FakeBroker, kmon: Kmon, tmp_path: Path, kind: str, more: tuple[str, ...]) -> None:
    path = tmp_path / "web.track"
    words = plant(path, kind)
    tool = await kmon("ha", "keepalived", "--file", str(path), "--process", "web1:pid=3", "--when-blind", "keep", *more)
    assert await ended(tool) == (2, "", f"kmon: {path} cannot be a track file: {words}; remove it, or name another\n")
    check_untouched(path, kind)


@KINDS
async def test_a_track_file_s_lock(broker: FakeBroker, kmon: Kmon, tmp_path: Path, kind: str) -> None:
    words = plant(tmp_path / ".web.track.kmon-lock", kind)
    tool = await kmon("ha", "keepalived", "--file", str(tmp_path / "web.track"), "--process", "web1:pid=3", "--when-blind", "keep")
    status, out, err = await ended(tool)
    assert (status, out, err.count("\n"), words in err) == (2, "", 1, True), err
    check_untouched(tmp_path / ".web.track.kmon-lock", kind)


@KINDS
async def test_a_cursor(broker: FakeBroker, kmon: Kmon, tmp_path: Path, kind: str) -> None:
    words = plant(tmp_path / "cursor", kind)
    watching = await kmon("watch", "--resume", str(tmp_path / "cursor"))
    assert await ended(watching) == (2, "", f"kmon: cannot read the cursor in {tmp_path}/cursor: {words}\n")
    check_untouched(tmp_path / "cursor", kind)


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_what_lies_where_a_cursor_is_written_first(tmp_path: Path, kind: str) -> None:
    """Beside the file, by a name that can be foreseen."""
    beside = tmp_path / f".cursor.{os.getpid()}"
    plant(beside, kind)
    Cursor({"web1": (7, 128)}).save(tmp_path / "cursor")
    assert Cursor.load(tmp_path / "cursor") == Cursor({"web1": (7, 128)})
    assert not beside.exists()
    if kind == "link":
        assert (tmp_path / "target").read_text(encoding="ascii") == "precious"


def test_a_cursor_without_end(tmp_path: Path) -> None:
    """A file of many holes is not read to its end."""
    with (tmp_path / "cursor").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UsageError, match="holds no cursor of this version"):
        Cursor.load(tmp_path / "cursor")
