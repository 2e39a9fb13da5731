# SPDX-License-Identifier: Apache-2.0
"""Control groups (v2) by path, and systemd's units by name: to the ids that the kernel gives them.

The id of a control group is the inode number of its folder (kernfs, on 64-bit machines). All of this reads file systems, which takes
tens of milliseconds where there are thousands of groups or mounts: not for the event loop.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from kmonitor.agent.errors import CaptureError
from kmonitor.wire.errors import BadSelectorError
from kmonitor.wire.selectors import check_cgroup_path

_ROOT_ID = 1
"""Inode number of the hierarchy's own root. A mount that shows a part of the hierarchy has another."""
_SLICE = ".slice"
ROOT_SLICE = "-.slice"


def hierarchy_root() -> Path:
    """Return where cgroup2 is mounted, from its very root if that is to be had.

    Raises CaptureError on a host that has only the old hierarchies.
    """
    part = None
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        _, point, kind, *_ = line.split(" ")
        if kind != "cgroup2":
            continue
        folder = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point))
        number = id_of(folder)
        if number == _ROOT_ID:
            return folder
        if number:
            part = part or folder
    if part is not None:
        return part
    raise CaptureError("no cgroup2 is mounted on this node: control groups and units can be watched with version 2 only")


def id_of(folder: Path) -> int:
    """Return the id of the group whose folder this is; 0 if there is none."""
    try:
        return folder.stat().st_ino
    except OSError:
        return 0


def ids_below(folder: Path) -> list[int]:
    """Return the id of a group, and those of all below it; none if it is gone."""
    ids = []
    for each, _, _ in os.walk(folder):
        with contextlib.suppress(OSError):
            ids.append(Path(each).stat().st_ino)
    return ids


class Hierarchy:
    """The groups as they are found in one look. However many units are asked for, the slices are read once."""

    def __init__(self) -> None:
        """Raises CaptureError if there is no v2 hierarchy."""
        self._root = hierarchy_root()
        self._units: dict[str, list[str]] | None = None

    def find_cgroup(self, path: str) -> tuple[Path, list[int]] | None:
        """Return the folder of the group at `path` below the root, and its id, then those of the groups above it; None if there is none.

        Raises CaptureError if no group can have such a path.
        """
        try:
            found = folder = self._root / check_cgroup_path(path).lstrip("/")
        except BadSelectorError as error:
            raise CaptureError(str(error)) from None
        ids = []
        try:
            while True:
                ids.append(folder.stat().st_ino)
                if folder == self._root:
                    return found, ids
                folder = folder.parent
        except (OSError, UnicodeEncodeError):
            return None

    def find_unit(self, unit: str) -> str | None:
        """Return the path of a system unit's group below the root; None if it has none now.

        Raises CaptureError if two groups are named as that unit's.
        """
        if unit == ROOT_SLICE:
            return "/"
        if self._units is None:
            self._units = self._read_slices()
        paths = self._units.get(unit, [])
        if len(paths) > 1:
            first, second, *_ = sorted(paths)
            raise CaptureError(f"unit {unit} has two control groups, {first} and {second}: register the path of the one that is meant")
        return paths[0] if paths else None

    def _read_slices(self) -> dict[str, list[str]]:
        """Return the paths of all system units, by their names.

        The system's manager puts a unit into slices alone, and a slice into that whose name its own begins with: /a.slice/a-b.slice/NAME
        (systemd.slice(5)). Nobody else makes groups there: a slice is never delegated. What looks like a unit in a service or scope is
        that of a user's manager (user@1000.service), of a container, or of whoever was given the group.
        """
        units: dict[str, list[str]] = {}
        slices = [("", "")]
        while slices:
            path, prefix = slices.pop()
            try:
                with os.scandir(f"{self._root}{path}") as entries:
                    names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
            except OSError:
                continue  # gone since it was listed
            for name in names:
                units.setdefault(name.removeprefix("_"), []).append(f"{path}/{name}")
                if name.endswith(_SLICE) and _is_within(name, prefix):
                    slices.append((f"{path}/{name}", name.removesuffix(_SLICE) + "-"))
        return units


def _is_within(name: str, prefix: str) -> bool:
    """Whether a slice of this name belongs right into the one that gives the `prefix`: "a-" for a.slice, nothing for the root."""
    own = name.removesuffix(_SLICE)
    return own.startswith(prefix) and own[len(prefix) :] != "" and "-" not in own[len(prefix) :]
