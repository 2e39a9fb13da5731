# SPDX-License-Identifier: Apache-2.0
"""A track file: a number, for keepalived to read.

keepalived watches the folder with inotify and reads the file when it was closed after writing, or moved to its name. A file that is
missing, empty or no number is 0 to it, which with weight 0 means that all is well. So the file must never be seen half written: it
is written beside, and renamed. Whoever is killed in between leaves the old number, and a file that the next one removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from kmonitor.wire import files
from kmonitor.wire.errors import UsageError

_MOST = 128
"""Bytes. keepalived reads no more."""
_Mark = tuple[int, int, int]


class TrackFile:
    """One file, locked against a second writer of ours for as long as this is open. All errors are UsageError, one line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._beside = self.path.with_name(f".{self.path.name}.kmon-new")
        self._lock: int | None = None
        self._written: tuple[int, _Mark] | None = None

    def open(self) -> None:
        """Lock it. What lies there must be ours, or keepalived's, to be replaced: not a link (keepalived would go on reading what it
        leads to), and not what another user has put there."""
        if self.path.is_dir():
            raise UsageError(f"{self.path} is a folder: name a file in it for keepalived's track_file")
        try:
            with contextlib.suppress(FileNotFoundError):
                files.check_own(self.path, self.path.lstat())
        except OSError as error:
            raise UsageError(f"{self.path} cannot be a track file: {error.strerror}; remove it, or name another") from None
        try:
            lock = files.open_own(self.path.with_name(f".{self.path.name}.kmon-lock"), os.O_RDONLY | os.O_CREAT)
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise UsageError(f"{self.path} is being written by another kmon ha keepalived: end that, or name another file") from None
        self._lock = lock

    def close(self) -> None:
        """Let others write it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def read(self) -> int | None:
        """The number in it; None if there is none."""
        try:
            with os.fdopen(files.open_own(self.path, os.O_RDONLY), "rb") as file:
                return int(file.read(_MOST))
        except (OSError, ValueError):
            return None

    def write(self, value: int) -> None:
        """Make it say this number. Nothing is synced: after a loss of power the file may be as it was, and is written anew anyway."""
        try:
            with contextlib.suppress(FileNotFoundError):
                self._beside.unlink()  # of one that was killed
            file = os.open(self._beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                os.fchmod(file, 0o644)  # whatever the umask: keepalived may be another user
                os.write(file, b"%d\n" % value)
                mark = _mark(os.fstat(file))
            finally:
                os.close(file)
            self._beside.rename(self.path)
        except OSError as error:
            raise self._unwritable(error) from None
        self._written = value, mark

    def mend(self) -> bool:
        """Write again what was written last, if somebody else has changed or removed it. Whether that was so."""
        if self._written is None:
            return False
        value, mark = self._written
        with contextlib.suppress(OSError):
            if _mark(self.path.lstat()) == mark:
                return False
        self.write(value)
        return True

    def _unwritable(self, error: OSError) -> UsageError:
        return UsageError(
            f"cannot write {self.path}: {error.strerror}; keepalived goes by what it says now: "
            "its folder must be there, have room, and be one that this user may write to"
        )


def _mark(status: os.stat_result) -> _Mark:
    # Not the change time, which the rename sets.
    return status.st_ino, status.st_mtime_ns, status.st_size
