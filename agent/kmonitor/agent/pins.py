# SPDX-License-Identifier: Apache-2.0
"""The folder in bpffs that keeps a node's ring, maps and links alive while no agent runs, and the lock on it.

    ROOT/NODE@SCOPE@vN/    map_events  map_control  ...  prog_kmonitor_tasks  ...  link_kmonitor_exit  ...

N is the record's version: an agent of another version takes a folder of its own. bpffs has no regular files, so the lock
is on the folder itself: flock(2) on a directory is enough for that. What the names are is fixed for ever: by them an agent finds
what one of another version has left (predecessor.py).
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

    def __init__(self, root: Path, node: str, scope: str, version: int = RECORD_VERSION) -> None:
        self.version = version
        """Of the records."""
        self._prefix = f"{node.replace('.', '%2e')}@{scope}@v"  # bpffs takes no dots
        self.path = root / f"{self._prefix}{version}"
        self._node = node
        self._scope = scope
        self._lock = -1

    def open(self) -> None:
        """Make the folder if need be, and lock it. Raises PinError."""
        root = self.path.parent
        try:
            root_was_there = root.exists()
            root.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(mode=0o755, exist_ok=True)  # whatever the umask: whoever may write there could put his own secret in
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

    def others(self) -> list[PinFolder]:
        """Those that agents of other versions have left for the same node and scope; not open. None while there is no root."""
        try:
            suffixes = [
                entry.name.removeprefix(self._prefix) for entry in self.path.parent.iterdir() if entry.name.startswith(self._prefix)
            ]
        except OSError:
            return []  # not to be listed by this user: then it has none there
        versions = sorted(int(suffix) for suffix in suffixes if suffix.isdecimal() and int(suffix) != self.version)
        return [PinFolder(self.path.parent, self._node, self._scope, version) for version in versions]

    def names(self) -> set[str]:
        """What is pinned."""
        return {entry.name for entry in self.path.iterdir()}

    def detach(self) -> None:
        """Unpin the links: the probe ends, and its ring stays."""
        for entry in self.path.iterdir():
            if entry.name.startswith("link_"):
                entry.unlink()

    def clear(self) -> None:
        """Unpin everything: the probe is detached, and what was not read is gone."""
        self.detach()  # first: no event is to be made that has nowhere to go
        for entry in self.path.iterdir():
            entry.unlink()

    def remove(self) -> None:
        """Unpin everything, and take the folder away, if somebody else has not."""
        with contextlib.suppress(FileNotFoundError):
            self.clear()
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
