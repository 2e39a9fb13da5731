# SPDX-License-Identifier: Apache-2.0
"""Control groups (v2) by path, and systemd's units by name: to the ids that the kernel gives them.

The id of a control group is the inode number of its folder (kernfs, on 64-bit machines).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from kmonitor.agent.errors import CaptureError


def hierarchy_root() -> Path:
    """Where cgroup2 is mounted. Raises CaptureError on a host that has only the old hierarchies."""
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        _, point, fstype, *_ = line.split(" ")
        if fstype == "cgroup2":
            return Path(point.encode().decode("unicode_escape"))
    raise CaptureError("no cgroup2 is mounted on this node: control groups and units can be watched with version 2 only")


def find_cgroup(path: str) -> tuple[Path, list[int]] | None:
    """The folder of the group at `path` below the root, and its id, then those of the groups above it; None if there is no such group."""
    root = hierarchy_root()
    found = folder = root / path.lstrip("/")
    ids = []
    try:
        while True:
            ids.append(folder.stat().st_ino)
            if folder == root:
                return found, ids
            folder = folder.parent
    except OSError:
        return None


def ids_below(folder: Path) -> list[int]:
    """The id of a group, and of all below it; none if it is gone."""
    ids = []
    for each, _, _ in os.walk(folder):
        with contextlib.suppress(OSError):
            ids.append(Path(each).stat().st_ino)
    return ids


def find_unit(unit: str) -> str | None:
    """Path of a unit's control group below the root; None if it has none now. systemd names the folder after the unit."""
    root = hierarchy_root()
    for folder, names, _ in os.walk(root):
        if unit in names:
            return "/" + str((Path(folder) / unit).relative_to(root))
    return None
