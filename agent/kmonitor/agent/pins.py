# SPDX-License-Identifier: Apache-2.0
"""The folder in bpffs that keeps a node's ring, maps and links alive while no agent runs, and the lock on it.

    ROOT/NODE@SCOPE@vN/    map_events  map_control  ...  prog_kmonitor_tasks  ...  link_kmonitor_exit  ...

N is the record's version: an agent of another version takes a folder of its own. bpffs has no regular files, so the lock
is on the folder itself: flock(2) on a directory is enough for that.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from kmonitor.agent.errors import PinError
from kmonitor.wire.record import RECORD_VERSION

DEFAULT_ROOT = Path("/sys/fs/bpf/kmonitor")


class PinFolder:
    """Locked from `open` to `close`; the kernel lets go of the lock if the agent dies."""

    def __init__(self, root: Path, node: str, scope: str) -> None:
        self.path = root / f"{node.replace('.', '%2e')}@{scope}@v{RECORD_VERSION}"  # bpffs takes no dots
        self._node = node
        self._lock = -1

    def open(self) -> None:
        """Make the folder if need be, and lock it. Raises PinError."""
        root = self.path.parent
        try:
            root_was_there = root.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise PinError(f"cannot make {self.path}: {os.strerror(error.errno or 0)}: {_advice(root)}") from None
        if not _is_bpffs(self.path):
            self.close()
            with contextlib.suppress(OSError):
                self.path.rmdir()
                if not root_was_there:
                    root.rmdir()
            raise PinError(f"{root} is not in a bpffs: {_advice(root)}")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise PinError(f"another agent runs as node {self._node} on this machine: stop it, or give this one another --node") from None

    def names(self) -> set[str]:
        """What is pinned."""
        return {entry.name for entry in self.path.iterdir()}

    def remove(self) -> None:
        """Unpin everything: the probe is detached, and what was not read is gone."""
        # Links first: no event is to be made that has nowhere to go.
        for entry in sorted(self.path.iterdir(), key=lambda path: not path.name.startswith("link_")):
            entry.unlink()
        self.path.rmdir()
        if self.path.parent == DEFAULT_ROOT:  # another one is not ours to remove
            with contextlib.suppress(OSError):
                DEFAULT_ROOT.rmdir()  # other nodes' pins may be in there

    def close(self) -> None:
        """Unlock."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _advice(root: Path) -> str:
    return f"run 'mount -t bpf bpf /sys/fs/bpf', give --pin-root a folder in a bpffs that you may write to ({root}), or use --no-pin"


def _is_bpffs(path: Path) -> bool:
    """statfs(2) is not in os: the mount table tells. The longest mount point above `path` is its file system's."""
    best, kind = "", ""
    target = str(path.resolve())
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        _, point, fstype, *_ = line.split(" ")
        inside = point in ("/", target) or target.startswith(point + "/")
        if inside and len(point) >= len(best):
            best, kind = point, fstype
    return kind == "bpf"
