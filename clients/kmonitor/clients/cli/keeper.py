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
        self._stopping = asyncio.Event()

    def moved(self) -> None:
        """Save it, now or soon."""
        self._news.set()

    @contextlib.asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Until the end of the block, which is cancelled if saving fails; all is saved then. Raises UsageError if it cannot be."""
        block = asyncio.current_task()
        assert block is not None
        saving = asyncio.create_task(self._save_all(), name="kmon keeper")
        saving.add_done_callback(lambda done: block.cancel() if not self._stopping.is_set() else None)
        try:
            yield
        except asyncio.CancelledError:
            if saving.done() and not saving.cancelled():
                block.uncancel()
                saving.result()  # raises
            raise
        finally:
            self._stopping.set()
            self._news.set()
            await saving

    async def _save_all(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            stopping = self._stopping.is_set()  # before the copy is made: what moved later is saved in the next round
            copy = self._cursor.copy()
            if copy != self._saved:
                await asyncio.to_thread(copy.save, self._path)
                self._saved = copy
            if stopping:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SAVE_EVERY_S):
                    await self._stopping.wait()
