# SPDX-License-Identifier: Apache-2.0
"""Files that this program writes and reads again, in folders where others may have been first."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_NO_LINK = "it is a symbolic link"
_NO_FILE = "it is no regular file"


def open_own(path: Path, flags: int, mode: int = 0o600, *, of_root: bool = True) -> int:
    """Open a regular file of this user's, or `of_root`; return the descriptor. No link is followed, and nobody waited for.

    :raises OSError: if that is not possible, or the file is not such a one; its `strerror` says which.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError as error:
        known = {errno.ELOOP: _NO_LINK, errno.ENXIO: _NO_FILE}  # the latter: a FIFO that nobody reads, a socket
        if error.errno in known:
            raise OSError(error.errno, known[error.errno], os.fspath(path)) from None
        raise
    try:
        check_own(path, os.fstat(descriptor), of_root=of_root, writing=flags & os.O_ACCMODE != os.O_RDONLY)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def check_own(path: Path, status: os.stat_result, *, of_root: bool = True, writing: bool = False) -> None:
    """Check a file's status, from lstat(2) or fstat(2), as `open_own` does.

    :raises OSError: if it is not what that opens.
    """
    reason = ""
    if stat.S_ISLNK(status.st_mode):
        reason = _NO_LINK
    elif not stat.S_ISREG(status.st_mode):
        reason = _NO_FILE
    elif status.st_uid != os.geteuid() and not (of_root and status.st_uid == 0):
        reason = f"it belongs to another user (uid {status.st_uid})"
    elif writing and status.st_nlink > 1:
        reason = "it has another name too (a hard link)"
    if reason:
        raise OSError(errno.EPERM, reason, os.fspath(path))
