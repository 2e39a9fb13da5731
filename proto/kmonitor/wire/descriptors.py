# SPDX-License-Identifier: Apache-2.0
"""How many files a process may have open: as many as it is allowed, and whether that is reached."""

from __future__ import annotations

import contextlib
import errno
import os
import resource


def raise_file_limit() -> int:
    """Raise the soft limit of open files to the hard one, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a sandbox that does not let it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return soft


def can_open(count: int) -> bool:
    """Whether so many more files can be open."""
    with contextlib.ExitStack() as opened:
        for _ in range(count):
            try:
                opened.callback(os.close, os.open("/", os.O_PATH | os.O_CLOEXEC))
            except OSError as error:
                if error.errno in {errno.EMFILE, errno.ENFILE}:
                    return False
                raise
    return True
