# SPDX-License-Identifier: Apache-2.0
"""`kmon watch --resume`: keeps the cursor in its file, so that whatever ends kmon, what was shown does not come again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from kmonitor.clients.cursor import Cursor

SAVE_EVERY_S = 0.05
"""At most. A save takes a millisecond on a good disk, most of it for fsync; beside the loop, so that a bad disk holds up no event."""


class Keeper:
    """Saves as soon as the cursor has moved: what is shown between that and the end of a kmon that is killed is shown again."""

    def __init__(self, path: Path, cursor: Cursor) -> None:
        """`cursor` is looked at again whenever it is said to have moved."""
        self._path = path
        self._cursor = cursor
        self._saved = cursor.copy()
        self._news = asyncio.Event()
        self._hurry = asyncio.Event()
        self._stopping = False
        self._saving: asyncio.Task[None] | None = None

    def moved(self, *, at_once: bool = False) -> None:
        """Save it, now or soon. Raises UsageError if saving has failed."""
        if self._saving is not None and self._saving.done():
            self._saving.result()  # it ends before it is told to by raising only
        self._news.set()
        if at_once:
            self._hurry.set()

    @contextlib.asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Until the end of the block; all is saved then. Raises UsageError if it cannot be."""
        self._saving = asyncio.create_task(self._save_all(), name="kmon keeper")
        try:
            yield
        finally:
            self._stopping = True
            self._news.set()
            self._hurry.set()
            await self._saving

    async def _save_all(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            self._hurry.clear()
            stopping = self._stopping  # before the copy is made: what moved later is saved in the next round
            copy = self._cursor.copy()
            if copy != self._saved:
                await asyncio.to_thread(copy.save, self._path)
                self._saved = copy
            if stopping:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SAVE_EVERY_S):
                    await self._hurry.wait()
