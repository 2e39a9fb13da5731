# SPDX-License-Identifier: Apache-2.0
"""Files that others may have been first to make."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from kmonitor.wire.files import open_own

pytestmark = pytest.mark.wheel_ok
READ, WRITE = os.O_RDONLY, os.O_RDWR | os.O_CREAT


def test_own_files(tmp_path: Path) -> None:
    path = tmp_path / "x"
    os.close(open_own(path, WRITE))
    assert path.stat().st_mode & 0o777 == 0o600
    descriptor = open_own(path, READ)
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)
    with pytest.raises(FileNotFoundError):
        open_own(tmp_path / "y", READ)


@pytest.mark.parametrize("flags", [READ, WRITE], ids=["read", "write"])
def test_what_is_no_file_of_ours(tmp_path: Path, flags: int) -> None:
    """At once: neither a link's target nor the other end of a FIFO is waited for or touched."""
    (tmp_path / "target").write_text("untouched", encoding="ascii")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "loose").symlink_to("nothing")
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        for name, reason in {
            "link": "it is a symbolic link",
            "loose": "it is a symbolic link",
            "fifo": "it is no regular file",
            "socket": "it is no regular file",
        }.items():
            with pytest.raises(OSError, match=reason):
                open_own(tmp_path / name, flags)
    with pytest.raises(OSError, match="it is no regular file"):
        open_own(Path(os.devnull), flags)
    assert not (tmp_path / "nothing").exists()
    assert (tmp_path / "target").read_text(encoding="ascii") == "untouched"


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
def test_another_user_s(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.touch(mode=0o666)
    os.chown(path, 65534, 65534)
    for flags in (READ, WRITE):
        with pytest.raises(OSError, match=r"it belongs to another user \(uid 65534\)"):
            open_own(path, flags)


def test_a_second_name(tmp_path: Path) -> None:
    """Reading harms nobody."""
    (tmp_path / "x").write_text("untouched", encoding="ascii")
    (tmp_path / "y").hardlink_to(tmp_path / "x")
    os.close(open_own(tmp_path / "y", READ))
    with pytest.raises(OSError, match="it has another name too") as caught:
        open_own(tmp_path / "y", WRITE)
    assert (caught.value.errno, caught.value.filename) == (errno.EPERM, str(tmp_path / "y"))
