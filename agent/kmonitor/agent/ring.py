# SPDX-License-Identifier: Apache-2.0
"""The kernel's ring, read through its memory map (kernel/bpf/ringbuf.c, Documentation/bpf/ringbuf.rst).

The first page holds the consumer's position, which is ours to write; the second the producer's, then come the data pages. The
kernel offers them twice in a row, so that a record that wraps around lies in one piece; but what is mapped counts as this process's
memory, as often as it is mapped: the few records around the end are put together here. Positions are bytes since the ring was made.
"""

from __future__ import annotations

import contextlib
import mmap
import select
import threading
from typing import Any

import numpy as np

from kmonitor.agent.maps import Control
from kmonitor.wire.record import RING_BUSY, SLOT_DTYPE, SLOT_SIZE, readable

_LONGEST_RECORD_SLOTS = 32
"""Of any version: an exec with all of its arguments."""


class Ring:
    """Reads ahead of the consumer position, which moves only by `release`.

    What was read and not released stays in the kernel: whoever maps the ring next finds it again.
    """

    def __init__(self, fd: int, size: int, control: Control) -> None:
        """`fd` stays the caller's. `size` is that of the data, a power of two of bytes."""
        self.size = size
        self._control = control
        self._consumer_page = mmap.mmap(fd, mmap.PAGESIZE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._pages = mmap.mmap(fd, mmap.PAGESIZE + size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=mmap.PAGESIZE)
        self._consumer: Any = np.frombuffer(self._consumer_page, dtype="<u8", count=1)
        self._producer: Any = np.frombuffer(self._pages, dtype="<u8", count=1)
        self._slots: Any = np.frombuffer(self._pages, dtype=SLOT_DTYPE, offset=mmap.PAGESIZE, count=size // SLOT_SIZE)
        self._fence = threading.Lock()
        self.position = self.consumer
        """Where the next read begins."""
        self.behind = False
        """All that there is can be seen."""
        self._fill = 0
        """While the reader naps: so many unread bytes end that."""
        self._calm = False
        control.set_nap()
        # Data that is not released keeps the ring "ready" for a level-triggered wait: wait for the edge.
        self.wakeups = select.epoll()
        self.wakeups.register(fd, select.EPOLLIN | select.EPOLLET)

    @property
    def consumer(self) -> int:
        """All before it was released."""
        return int(self._consumer[0])

    @property
    def producer(self) -> int:
        """Where the kernel writes next; before it there may be records that are still being written."""
        return int(self._producer[0])

    def has_unread(self) -> bool:
        """Whether anything, committed or not, lies behind `position`."""
        return self.producer != self.position

    def committed_ahead(self) -> bool:
        """Whether the record at `position` is one that can be read: something must lie there."""
        return not int(self._slots["ring_length"][(self.position & (self.size - 1)) // SLOT_SIZE]) & RING_BUSY

    def read(self, limit: int) -> memoryview | None:
        """Committed records from `position` on, at most about `limit` bytes, and step over them; None if there are none.

        It may be the ring's memory: it holds until they are released, and is to be let go of before `close`.
        """
        ahead = self.producer - self.position
        if ahead == 0:
            return None
        first = (self.position & (self.size - 1)) // SLOT_SIZE
        # A record's length is written before the producer's position moves past it (a store-release in the kernel): on
        # x86 the order of loads is kept; elsewhere the lock's acquire orders them.
        with self._fence:
            slots = min(ahead, limit + _LONGEST_RECORD_SLOTS * SLOT_SIZE) // SLOT_SIZE
        left = len(self._slots) - first
        if slots > left <= _LONGEST_RECORD_SLOTS:
            part = self._around_end(first, min(slots, 2 * _LONGEST_RECORD_SLOTS), min(limit // SLOT_SIZE, _LONGEST_RECORD_SLOTS))
        else:
            # So that none of those that are read reaches beyond the end: the first, which is read in any case, does not.
            most = limit // SLOT_SIZE if slots <= left else min(limit // SLOT_SIZE, left - _LONGEST_RECORD_SLOTS)
            window = self._slots[first : first + slots]
            part = window[: readable(window, most)]
        if len(part) == 0:
            return None
        data: memoryview = part.view(np.uint8).data
        self.position += len(data)
        return data

    def _around_end(self, first: int, slots: int, limit: int) -> Any:
        """A copy of the committed ones among so many slots, of which some, or a part of the last record, are at the ring's beginning."""
        count = readable(self._copy(first, slots), limit)
        with self._fence:  # what was not committed then may have been copied half written
            return self._copy(first, slots)[:count]

    def _copy(self, first: int, slots: int) -> Any:
        # As bytes: joined as structures, they would be packed.
        parts = self._slots[first:].view(np.uint8), self._slots[: first + slots - len(self._slots)].view(np.uint8)
        return np.concatenate(parts).view(SLOT_DTYPE)

    def release(self, position: int) -> None:
        """Give the kernel everything before `position` back. Positions that were released already are ignored."""
        if position > self.consumer:
            self._consumer[0] = min(position, self.producer)
        self.position = max(self.position, self.consumer)
        if self._fill:
            self._control.set_nap(self.position - self.consumer + self._fill, calm=self._calm)

    def rewind(self, position: int = 0) -> None:
        """Read again what was not released, from `position` on if that is later."""
        self.position = max(self.consumer, position)

    def prepare_sleep(self) -> bool:
        """Ask to be woken. False if there is something to read already: then nobody will be."""
        self._control.set_sleeping(True)
        # The probe reserves, then reads the flag; we set the flag, then read the producer's position. Both need a full
        # fence in between, or each may miss the other: theirs is the ring's spin lock, ours a lock's atomic exchange.
        with self._fence:
            pass
        if self.has_unread():
            self._control.set_sleeping(False)
            return False
        return True

    def prepare_nap(self, fill: int, *, calm: bool) -> bool:
        """Ask to be woken when `fill` bytes can be read, or earlier, unless `calm`, by what is urgent. False if so many can be already."""
        self._fill, self._calm = fill, calm
        self._control.set_nap(self.position - self.consumer + fill, calm=calm)
        with self._fence:
            return self.producer - self.position < fill

    def awake(self) -> bool:
        """No more wake-ups; forget those that came. True: there was a reason for them."""
        self._fill = 0
        self._control.set_sleeping(False)
        self._control.set_nap()
        self.wakeups.poll(0)
        return True

    def close(self) -> None:
        """Unmap; the ring lives on if it is pinned."""
        self._control.set_sleeping(False)
        self._control.set_nap()
        self.wakeups.close()
        del self._consumer, self._producer, self._slots
        self._consumer_page.close()
        with contextlib.suppress(BufferError):  # somebody still has what he read: it is unmapped when he lets go
            self._pages.close()
