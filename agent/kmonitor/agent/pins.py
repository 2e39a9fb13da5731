# SPDX-License-Identifier: Apache-2.0
"""The folder in bpffs that keeps a node's ring, maps and links alive while no agent runs, and the lock on it.

    ROOT/NODE@SCOPE@vN/    map_events  map_control  ...  prog_kmonitor_tasks  ...  link_kmonitor_exit  ...

N is the record's version: an agent of another version takes a folder of its own. bpffs has no regular files, so the lock
is on the folder itself: flock(2) on a directory is enough for that. What the names are is fixed for ever: by them an agent finds
what one of another version has left (predecessor.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import stat
from pathlib import Path

from kmonitor.agent.errors import PinError
from kmonitor.wire.record import RECORD_VERSION

DEFAULT_ROOT = Path("/sys/fs/bpf/kmonitor")
_BPF_FS_MAGIC = 0xCAFE4A11  # include/uapi/linux/magic.h
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


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
        """Make the folder if need be, and lock it. Raises PinError; also if somebody else could have made what is there, or could change it
        later."""
        self._lock = open_folder(self.path, make=True)
        self._take()

    def open_to_remove(self) -> bool:
        """Lock the folder, whose ever it is; False if there is none. Nothing but what is in this very folder can be removed by it.

        Raises PinError.
        """
        try:
            self._lock = open_folder(self.path, make=False, trusted=False)
        except NoFolderError:
            return False
        self._take()
        return True

    def _take(self) -> None:
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
        return set(os.listdir(self._lock if self._lock >= 0 else self.path))  # noqa: PTH208 - of a descriptor, too

    def detach(self) -> None:
        """Unpin the links: the probe ends, and its ring stays."""
        for name in self.names():
            if name.startswith("link_"):
                os.unlink(name, dir_fd=self._lock)

    def clear(self) -> None:
        """Unpin everything: the probe is detached, and what was not read is gone."""
        self.detach()  # first: no event is to be made that has nowhere to go
        for name in self.names():
            os.unlink(name, dir_fd=self._lock)

    def remove(self) -> None:
        """Unpin everything, and take the folder away, if somebody else has not."""
        with contextlib.suppress(FileNotFoundError):
            self.clear()
            self.path.rmdir()
        if self.path.parent == DEFAULT_ROOT:  # another one is not ours to remove
            with contextlib.suppress(OSError):
                DEFAULT_ROOT.rmdir()  # other nodes' pins may be in there

    def remove_if_empty(self) -> None:
        """Take the folder away if nothing was pinned in it: a start that was refused leaves nothing."""
        with contextlib.suppress(OSError):
            self.path.rmdir()
            if self.path.parent == DEFAULT_ROOT:
                DEFAULT_ROOT.rmdir()

    def close(self) -> None:
        """Unlock."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


class UnusableFolderError(PinError):
    """This agent cannot have a folder of pins: there is no bpffs, or it may not write there."""


class NoFolderError(UnusableFolderError):
    """There is no such folder."""


def open_folder(path: Path, *, make: bool, trusted: bool = True) -> int:
    """A descriptor of a folder that, if `trusted`, only root and this user can have made, and can change. What is missing is made, if
    that is wanted, in a bpffs only, and for this user alone.

    In a bpffs that everybody may write to, as many are, anybody can make this folder before us, and a link as well: nothing is followed,
    and each folder on the way is looked at. The caller owns the descriptor. Raises NoFolderError, PinError.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links
    at, here = os.open("/", _FOLDER), Path("/")
    try:
        for name in path.parts[1:]:
            here /= name
            try:
                following = _enter(at, name, make=make and is_bpffs(at))
            except NotADirectoryError:
                raise PinError(f"{here} is a symbolic link, or no folder at all: give --pin-root the path of the folder itself") from None
            os.close(at)
            at = following
            if trusted:
                _check(here, os.fstat(at), last=here == path)
        if make and not is_bpffs(at):
            raise PinError(f"{path.parent} is not in a bpffs: {_advice(path.parent)}")
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise NoFolderError(f"{path.parent} is not in a bpffs: {_advice(path.parent)}") from None
        advice = f"run as root, give --pin-root a folder in a bpffs that this user may write to, or use --no-pin ({path.parent})"
        kind = UnusableFolderError if isinstance(error, PermissionError) else PinError
        raise kind(f"cannot {'make' if make else 'open'} {path}: {error.strerror}: {advice}") from None
    finally:
        os.close(at)


def _enter(at: int, name: str, *, make: bool) -> int:
    try:
        return os.open(name, _FOLDER, dir_fd=at)
    except FileNotFoundError:
        if not make:
            raise
    with contextlib.suppress(FileExistsError):  # made by another agent just now
        os.mkdir(name, 0o700, dir_fd=at)
    return os.open(name, _FOLDER, dir_fd=at)


def _check(path: Path, found: os.stat_result, *, last: bool) -> None:
    """Of the folder of pins, or, unless `last`, one above it. In one that is sticky nobody moves or removes what is another's."""
    if found.st_uid not in (0, os.geteuid()):
        raise PinError(f"{path} belongs to another user, uid {found.st_uid}: run the agent as that one, or give --pin-root another folder")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and (last or not found.st_mode & stat.S_ISVTX):
        raise PinError(f"others may write to {path}, mode {stat.S_IMODE(found.st_mode):04o}: see what is in there, then chmod go-w {path}")


def is_bpffs(folder: Path | int) -> bool:
    """Whether a folder, by its path or a descriptor, is in a bpffs."""
    return filesystem_of(folder) == _BPF_FS_MAGIC


def filesystem_of(there: Path | int) -> int:
    """The kind of the file system that something is in, by its path or a descriptor: a number of include/uapi/linux/magic.h; 0 if that is
    not known. statfs(2) is not in os; unlike the mount table it needs no /proc."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = (ctypes.c_long * 32)()  # struct statfs begins with f_type, a long, on 64-bit machines
    result = libc.fstatfs(there, buffer) if isinstance(there, int) else libc.statfs(os.fsencode(there), buffer)
    return buffer[0] & 0xFFFFFFFF if result == 0 else 0


def _advice(root: Path) -> str:
    return f"run 'mount -t bpf bpf /sys/fs/bpf', give --pin-root a folder in a bpffs that you may write to ({root}), or use --no-pin"
