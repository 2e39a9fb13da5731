# SPDX-License-Identifier: Apache-2.0
"""The log in memory. Gone with the broker."""

from __future__ import annotations

import asyncio
import bisect
import secrets
from collections import deque
from collections.abc import Callable, Iterable

from kmonitor.broker.block import Block
from kmonitor.broker.log import DEFAULT_LOG_BYTES, End, Entry, Page
from kmonitor.broker.log.ends import Ends, dropped_of


class MemoryLog:
    """At most `max_bytes`, the newest entry always. What is appended is committed at once. See EventLog."""

    def __init__(self, max_bytes: int = DEFAULT_LOG_BYTES) -> None:
        self.on_evict: Callable[[int], int | None] | None = None
        self.is_missed: Callable[[int], bool] | None = None
        self.on_commit: Callable[[int], None] | None = None
        self.on_trouble: Callable[[str], None] | None = None
        self.max_bytes = max_bytes
        self.bytes = 0
        self._id = secrets.randbits(62) | 1
        self._entries: deque[Entry] = deque()
        self._oldest = 0
        self._end = 0
        self._ends = Ends()
        self._index: dict[tuple[str, int], _Index] = {}
        self._values: dict[str, dict[str, bytes]] = {}

    @property
    def log_id(self) -> int:
        return self._id

    @property
    def durable(self) -> bool:
        return False

    @property
    def oldest(self) -> int:
        return self._oldest

    @property
    def end(self) -> int:
        return self._end

    @property
    def committed(self) -> int:
        return self._end

    def append(self, entry: Entry) -> int:
        entry.offset = self._end
        self._entries.append(entry)
        self._end += 1
        self.bytes += entry.size
        reach = self._ends.advance(entry)
        self._index.setdefault((entry.node, entry.epoch), _Index()).add(reach, entry.offset)
        self._evict()
        if self.on_commit is not None:
            self.on_commit(self._end)
        return entry.offset

    def read(self, offset: int, max_bytes: int) -> list[Entry]:
        found: list[Entry] = []
        size = 0
        for at in range(max(offset, self._oldest), self._end):
            entry = self._entries[at - self._oldest]
            if found and size + entry.size > max_bytes:
                break
            found.append(entry)
            size += entry.size
        return found

    def fetch(self, offset: int, max_bytes: int) -> Page | asyncio.Future[Page]:
        found = self.read(offset, max_bytes)
        return Page(found, found[-1].offset + 1 if found else self._end)

    def locate(self, places: Iterable[tuple[str, int, int]]) -> asyncio.Future[None] | None:
        return None

    def offset_behind(self, node: str, epoch: int, position: int) -> int | None:
        end = self._ends.get(node, epoch)
        if end is None:
            return None
        if position >= end.position:
            return end.offset + 1
        if end.dropped is not None and position < end.dropped.last:
            return -1
        index = self._index.get((node, epoch))
        if index is None:
            return end.offset + 1  # all of it was dropped, and maybe more
        # All of the node that is still there lies behind what was dropped.
        return index.behind(position, self._oldest if end.dropped is not None else None)

    def ends(self, node: str) -> dict[int, End]:
        return self._ends.of(node)

    def nodes(self) -> list[str]:
        return self._ends.nodes()

    def forget(self, node: str) -> None:
        self._ends.forget(node)

    def put(self, space: str, key: str, value: bytes | None) -> None:
        if value is None:
            self._values.get(space, {}).pop(key, None)
        else:
            self._values.setdefault(space, {})[key] = value

    def values(self, space: str) -> dict[str, bytes]:
        return dict(self._values.get(space, {}))

    def forget_values(self) -> None:
        pass  # they are nowhere else

    def give_up(self, node: str, epoch: int, position: int) -> None:
        pass  # nothing ever waits

    async def flush(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def _evict(self) -> None:
        if self.bytes <= self.max_bytes or len(self._entries) == 1:
            return
        size, until = self.bytes, self._oldest
        for entry in self._entries:
            if size <= self.max_bytes or until == self._end - 1:
                break
            size -= entry.size
            until += 1
        while self._oldest < until and self.on_evict is not None and (self.is_missed is None or self.is_missed(until)):
            self._drop_until(min(self.on_evict(until) or until, until))  # what was appended has to find room at once
        self._drop_until(until)

    def _drop_until(self, until: int) -> None:
        while self._oldest < until:
            entry = self._entries.popleft()
            self._oldest += 1
            self.bytes -= entry.size
            self._drop(entry)

    def _drop(self, entry: Entry) -> None:
        key = (entry.node, entry.epoch)
        index = self._index[key]
        index.drop()
        if not len(index):
            del self._index[key]
        dropped = dropped_of(entry)
        if dropped is not None:
            self._ends.drop(entry.node, entry.epoch, dropped)
        if isinstance(entry, Block):
            entry.trim()


class _Index:
    """How far the entries of one node and epoch reach, ascending, and their offsets."""

    def __init__(self) -> None:
        self._reaches: list[int] = []
        self._offsets: list[int] = []
        self._dropped = 0

    def __len__(self) -> int:
        return len(self._reaches) - self._dropped

    def add(self, reach: int, offset: int) -> None:
        self._reaches.append(reach)
        self._offsets.append(offset)

    def drop(self) -> None:
        self._dropped += 1
        if self._dropped > 1024 and self._dropped * 2 > len(self._reaches):
            del self._reaches[: self._dropped], self._offsets[: self._dropped]
            self._dropped = 0

    def behind(self, position: int, otherwise: int | None) -> int:
        """The offset behind the last entry that reaches no further than a position. If none does so: `otherwise`, or the first's."""
        at = bisect.bisect_right(self._reaches, position, lo=self._dropped) - 1
        if at >= self._dropped:
            return self._offsets[at] + 1
        return self._offsets[self._dropped] if otherwise is None else otherwise
