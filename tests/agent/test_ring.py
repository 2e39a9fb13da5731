# SPDX-License-Identifier: Apache-2.0
"""Reading the ring around its end, where records go on at the beginning: against a memory file in the place of the kernel's map."""

from __future__ import annotations

import itertools
import mmap
import os
import random
import select
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kmonitor.agent.maps import CONTROL_DTYPE, Control
from kmonitor.agent.ring import Ring
from kmonitor.wire.record import RING_BUSY, RING_HEADER_SIZE, SLOT_SIZE

SLOTS = 128
SIZE = SLOTS * SLOT_SIZE
LONGEST = 32


class FakeKernel:
    """Writes records as kernel/bpf/ringbuf.c does, each byte of which names its record."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, 2 * mmap.PAGESIZE + SIZE)
        self._bytes = np.frombuffer(self._memory, dtype=np.uint8, offset=2 * mmap.PAGESIZE)
        self._positions = np.frombuffer(self._memory, dtype="<u8", count=mmap.PAGESIZE // 8 + 1)
        self._number = 0

    def start_at(self, position: int) -> None:
        """As if so much had been written and released."""
        self._positions[0] = self._positions[-1] = position

    def room(self) -> int:
        """Slots."""
        return (SIZE - int(self._positions[-1] - self._positions[0])) // SLOT_SIZE

    def write(self, slots: int, *, busy: bool = False) -> bytes:
        """One record: its bytes in the ring, with its header."""
        self._number += 1
        length = slots * SLOT_SIZE - RING_HEADER_SIZE
        record = np.full(slots * SLOT_SIZE, self._number % 251, dtype=np.uint8)
        record[:RING_HEADER_SIZE].view("<u4")[:] = length | (RING_BUSY if busy else 0), 0
        places = (int(self._positions[-1]) + np.arange(len(record))) % SIZE
        self._bytes[places] = record
        self._positions[-1] += np.uint64(len(record))
        return record.tobytes()

    def close(self) -> None:
        del self._bytes, self._positions
        self._memory.close()


class NoWakeups:
    def __init__(self) -> None:
        self.register = self.close = lambda *_: None


Pair = Callable[[int], tuple[FakeKernel, Ring]]
"""Of the slot in which the first record is to lie."""


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr(select, "epoll", NoWakeups)  # it takes no files
    memory, words = os.memfd_create("ring"), os.memfd_create("control")
    os.ftruncate(memory, 2 * mmap.PAGESIZE + SIZE)
    os.ftruncate(words, max(mmap.PAGESIZE, CONTROL_DTYPE.itemsize))
    control, kernel = Control(words), FakeKernel(memory)
    opened: list[Ring] = []

    def at(slot: int) -> tuple[FakeKernel, Ring]:
        kernel.start_at(3 * SIZE + slot * SLOT_SIZE)
        opened.append(Ring(memory, SIZE, control))
        return kernel, opened[-1]

    yield at
    for ring in opened:
        ring.close()
    control.close()
    kernel.close()
    os.close(memory)
    os.close(words)


def drain(ring: Ring, limit: int) -> bytes:
    """All that can be read, in reads that are whole records and no longer than they may be."""
    read = b""
    while (data := ring.read(limit)) is not None:
        assert 0 < len(data) <= max(limit, LONGEST * SLOT_SIZE)
        read += bytes(data)
        assert ring.position % SLOT_SIZE == 0
    return read


@pytest.mark.parametrize("limit", [1, 5, 33, 64, SLOTS])
def test_every_record_at_every_place_around_the_end(pair: Pair, limit: int) -> None:
    for first, slots in itertools.product(range(SLOTS - 2 * LONGEST - 2, SLOTS), (1, 2, 3, 31, 32)):
        kernel, ring = pair(first)
        written = kernel.write(slots) + kernel.write(1) + kernel.write(slots) + kernel.write(2)
        assert drain(ring, limit * SLOT_SIZE) == written, (first, slots)
        assert not ring.has_unread()


def test_a_record_that_is_still_written_ends_a_read(pair: Pair) -> None:
    for first in range(SLOTS - 2 * LONGEST - 2, SLOTS):
        kernel, ring = pair(first)
        before = kernel.write(1) + kernel.write(6)
        kernel.write(4, busy=True)
        kernel.write(1)
        assert drain(ring, SIZE) == before, first
        assert ring.position == ring.consumer + len(before)


@pytest.mark.parametrize("seed", range(4))
def test_many_laps(pair: Pair, seed: int) -> None:
    chance = random.Random(seed)
    kernel, ring = pair(chance.randrange(SLOTS))
    for _ in range(800):
        written = b""
        while (slots := chance.choice((1, 1, 1, 2, 6, 32))) <= kernel.room() and chance.random() < 0.9:
            written += kernel.write(slots)
        assert drain(ring, chance.randrange(SIZE)) == written
        ring.release(ring.position)
