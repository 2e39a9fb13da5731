# SPDX-License-Identifier: Apache-2.0
"""Control groups (v2) that a test makes, and removes again."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from tests.lab.requires import Lack, skip


def hierarchy_lack() -> Lack | None:
    """Why there can be no groups here; None if there can."""
    return None if _root() and os.geteuid() == 0 else Lack.CGROUP2


def _root() -> Path | None:
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    return None


class Group:
    """A group of the test. `path` is what a registration takes: from the hierarchy's root."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder = folder
        self.path = "/" + str(folder.relative_to(root))
        self._root = root

    @property
    def id(self) -> int:
        """What the kernel calls it."""
        return self.folder.stat().st_ino

    def group(self, name: str) -> Group:
        """A new group within it, or several levels of them."""
        made = self.folder / name
        made.mkdir(parents=True)
        return Group(made, self._root)

    def again(self) -> Group:
        """Made anew, after it was removed: another group of the same name."""
        self.folder.mkdir()
        return self

    def take(self, *pids: int) -> None:
        """Move processes, with all their threads, into it."""
        for pid in pids:
            (self.folder / "cgroup.procs").write_text(str(pid), encoding="ascii")

    def leave(self, *pids: int) -> None:
        """Move processes out of it, to the top."""
        Group(self._root, self._root).take(*pids)

    def remove(self) -> None:
        """With all groups below it, as soon as the last of their processes have ended."""
        for path, folders, _ in os.walk(self.folder, topdown=False):
            for name in folders:
                remove(Path(path, name))
        remove(self.folder)


@contextlib.contextmanager
def control_group(name: str = "") -> Iterator[Group]:
    """A new group at the top of the hierarchy, gone at the end. Skips where there is no v2 hierarchy."""
    root = _root()
    if root is None:
        skip(Lack.CGROUP2)
        return
    folder = root / (name or f"kmonitor-test-{os.getpid()}")
    folder.mkdir()
    group = Group(folder, root)
    try:
        yield group
    finally:
        if folder.exists():
            group.remove()


@contextlib.contextmanager
def placed_group(path: str) -> Iterator[Group]:
    """A group at this path below the root, where a service manager, say, would make it; gone at the end, as are those of the groups above
    it that were not there. Skips where there is no v2 hierarchy."""
    root = _root()
    if root is None:
        skip(Lack.CGROUP2)
        return
    folder = root / path
    above = [each for each in folder.parents if root in each.parents]
    made = [each for each in above if not each.exists()]
    folder.mkdir(parents=True)
    group = Group(folder, root)
    try:
        yield group
    finally:
        if folder.exists():
            for pid in (folder / "cgroup.procs").read_text(encoding="ascii").split():  # the test has failed
                os.kill(int(pid), signal.SIGKILL)
            group.remove()
        for each in made:
            with contextlib.suppress(OSError):  # another test has a group in there
                each.rmdir()


def remove(group: Path) -> None:
    """A group whose last process has just ended is busy for a moment more; nothing tells when it is over."""
    until = time.monotonic() + 5
    while True:
        try:
            group.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)
        else:
            return
