# SPDX-License-Identifier: Apache-2.0
"""The folder of pins in a bpffs that everybody may write to: nobody else's folder is used, nor emptied, and nobody gets into ours."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kmonitor.agent.errors import PinError
from kmonitor.agent.pins import PinFolder
from tests.bad_input.refusal import refused
from tests.lab.privileges import AS_NOBODY, NOBODY, need_another_user
from tests.lab.requires import capture_lack, need
from tests.lab.services import Lab

pytestmark = pytest.mark.capture


@pytest.fixture
def everybodys(pins: Path) -> Iterator[Path]:
    """A folder as the root of a bpffs often is: everybody may make something in it, and remove his own."""
    need(capture_lack)
    need_another_user()
    folder = pins.parent / f"{pins.name}-open"
    folder.mkdir()
    folder.chmod(0o1777)
    yield folder
    for each in sorted(folder.rglob("*"), reverse=True):
        if each.is_symlink() or not each.is_dir():
            each.unlink()
        else:
            each.rmdir()
    folder.rmdir()


def as_another(*command: str | Path) -> None:
    subprocess.run([*AS_NOBODY, *command], check=True)


def test_they_are_this_users_alone_whatever_the_umask(everybodys: Path) -> None:
    before = os.umask(0)
    try:
        folder = PinFolder(everybodys / "kmonitor", "node", "host")
        folder.open()
    finally:
        os.umask(before)
    assert {stat.S_IMODE(each.stat().st_mode) for each in (folder.path, folder.path.parent)} == {0o700}
    folder.close()


@pytest.mark.parametrize("made", ["folder", "link", "node"])
def test_what_another_user_made_before(lab: Lab, everybodys: Path, made: str) -> None:
    root, victim = everybodys / "kmonitor", everybodys / "victim"
    victim.mkdir(mode=0o700)
    (victim / "node@host@v1").mkdir(mode=0o700)
    if made == "link":
        as_another("ln", "-s", victim, root)
        words = [f"{root} is a symbolic link"]
    elif made == "folder":
        as_another("mkdir", root)
        words = [f"{root} belongs to another user, uid {NOBODY}"]
    else:  # the very folder of the node, where the root is everybody's
        root = everybodys
        as_another("mkdir", root / PinFolder(root, "node", "host").path.name)
        words = [f"{root}/node@host@v", f"belongs to another user, uid {NOBODY}"]
    there = sorted(everybodys.rglob("*"))
    refused(lab.run("kmonitor-agent", "--node", "node", "--broker", "127.0.0.1:1", "--pin-root", root), 2, *words)
    assert sorted(everybodys.rglob("*")) == there


@pytest.mark.parametrize(("mode", "where"), [(0o777, "last"), (0o720, "last"), (0o1777, "last"), (0o777, "above"), (0o730, "above")])
def test_where_others_may_write(pins: Path, mode: int, where: str) -> None:
    folder = PinFolder(pins / "root", "node", "host")
    folder.path.mkdir(parents=True)
    changed = folder.path if where == "last" else folder.path.parent
    changed.chmod(mode)
    with pytest.raises(PinError, match=f"others may write to {changed}, mode {mode:04o}"):
        folder.open()
    changed.chmod(0o755)
    folder.open()
    folder.remove()
    folder.close()


@pytest.mark.parametrize("linked", ["root", "node"])
def test_unpin_follows_no_link(lab: Lab, everybodys: Path, linked: str) -> None:
    """What another user has made is removed, if root says so; but nothing that he only points at."""
    name = PinFolder(everybodys, "node", "host").path.name
    victim = everybodys / "victim"
    (victim / name / "of_another").mkdir(parents=True)
    root = everybodys / "kmonitor"
    if linked == "root":
        as_another("ln", "-s", victim, root)
    else:
        as_another("mkdir", root)
        as_another("ln", "-s", victim / name, root / name)
    unpin = ("kmonitor-agent", "--node", "node", "--pin-root", root, "--unpin")
    refused(lab.run(*unpin), 2, "is a symbolic link")
    assert (victim / name / "of_another").exists()


def test_unpin_another_users(lab: Lab, everybodys: Path) -> None:
    """Of a service that runs as a user of its own, say. With none there, there is nothing to do."""
    root = everybodys / "kmonitor"
    as_another("mkdir", "-p", PinFolder(root, "node", "host").path)
    for _ in range(2):
        assert lab.run("kmonitor-agent", "--node", "node", "--pin-root", root, "--unpin").code == 0
        assert list(root.iterdir()) == []
