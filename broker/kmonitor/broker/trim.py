# SPDX-License-Identifier: Apache-2.0
"""Memory goes back to the system when those are gone for whom it was taken: the C library keeps what lies between pieces still in use."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
from pathlib import Path

SOON_S = 1.0
"""After a stream has ended: others may end with it."""
_MUCH_PAGES = 32 << 20 >> 12
"""Resident pages more than after the last time: less is not worth it."""


class Trimmer:
    """Make it on a running event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due: asyncio.TimerHandle | None = None
        self._before = _resident_pages()

    def soon(self) -> None:
        """Something was freed that may have been much."""
        if self._due is None:
            self._due = self._loop.call_later(SOON_S, self._begin)

    def stop(self) -> None:
        """Not any more."""
        if self._due is not None:
            self._due.cancel()

    def _begin(self) -> None:
        self._due = None
        if _resident_pages() - self._before > _MUCH_PAGES:
            # It may take some milliseconds for each 100 MB, and holds nobody up who allocates nothing large meanwhile.
            self._loop.run_in_executor(None, self._trim)

    def _trim(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # another C library has no such call
            ctypes.CDLL(None).malloc_trim(0)
        self._before = _resident_pages()


def _resident_pages() -> int:
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
