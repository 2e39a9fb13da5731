# SPDX-License-Identifier: Apache-2.0
"""What was: the blocks of all nodes in the order in which they came, so that a session that is behind can read on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from kmonitor.broker.block import Block

DEFAULT_LOG_BYTES = 256 << 20


class EventLog(Protocol):
    """Blocks by offset. Offsets count blocks: 0, 1, 2, ... over all nodes, never used twice.

    A form on disk keeps of a block node, boot_id, epoch, position, data and boottime_to_unix_ns; all else is computed from them.
    """

    on_evict: Callable[[Block], None] | None
    """Called with each block right before it is dropped, oldest first: while it is called, `oldest` is still its offset."""

    @property
    def oldest(self) -> int:
        """Offset of the first block that is still there; `end` if there is none."""
        ...

    @property
    def end(self) -> int:
        """Offset that the next block will get."""
        ...

    def append(self, block: Block) -> int:
        """Put a block in, set its `offset` and return it."""
        ...

    def read(self, offset: int, max_bytes: int) -> list[Block]:
        """Blocks from `offset` (or `oldest`, if that is later) on, about `max_bytes` of them; at least one if there is one."""
        ...

    def end_of(self, node: str) -> tuple[int, int] | None:
        """(epoch, position behind the last byte) of what came from a node; None if nothing did."""
        ...


class MemoryLog:
    """The log in memory: at most `max_bytes`, the newest block always. Gone with the broker."""

    def __init__(self, max_bytes: int = DEFAULT_LOG_BYTES) -> None:
        self.on_evict: Callable[[Block], None] | None = None
        self.max_bytes = max_bytes
        self.bytes = 0
        self._blocks: dict[int, Block] = {}
        self._oldest = 0
        self._end = 0
        self._ends: dict[str, tuple[int, int]] = {}

    @property
    def oldest(self) -> int:
        return self._oldest

    @property
    def end(self) -> int:
        return self._end

    def append(self, block: Block) -> int:
        block.offset = self._end
        self._blocks[block.offset] = block
        self._end += 1
        self.bytes += block.size
        self._ends[block.node] = (block.epoch, block.end)
        while self.bytes > self.max_bytes and self._oldest < self._end - 1:
            self._evict()
        return block.offset

    def read(self, offset: int, max_bytes: int) -> list[Block]:
        found: list[Block] = []
        size = 0
        for at in range(max(offset, self._oldest), self._end):
            block = self._blocks[at]
            if found and size + block.size > max_bytes:
                break
            found.append(block)
            size += block.size
        return found

    def end_of(self, node: str) -> tuple[int, int] | None:
        return self._ends.get(node)

    def _evict(self) -> None:
        block = self._blocks[self._oldest]
        if self.on_evict is not None:
            self.on_evict(block)
        del self._blocks[self._oldest]
        self._oldest += 1
        self.bytes -= block.size
