# SPDX-License-Identifier: Apache-2.0
"""The ring of a source that has none in the kernel: the same slots, headers and positions, in the agent's memory.

It is filled when it is read, and when its `wakeups` are answered, by the source's `take_in`. Nothing here is shared with another
thread or with the kernel, so a record that can be seen is whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import struct
from collections.abc import Callable
from typing import NamedTuple

from kmonitor.agent.maps import LOST_NODE, LOST_PROCESS, TYPE_BITS
from kmonitor.agent.sources.memory_tables import MemoryControl
from kmonitor.wire.record import F_ARGS_TRUNCATED, F_MATCH_PROCESS, RECORD_VERSION, RING_HEADER_SIZE, SLOT_SIZE, readable, slots_of

FILENAME_MOST = 1024
ARGS_MOST = 2944
_LONGEST_RECORD_SLOTS = 32
_ABORT = 0x10
_EXIT = 0x40
_INDEX = {bit: index for index, bit in enumerate(TYPE_BITS)}

# Ring's length and page; version, type, flags, filename_len, args_len; times and groups; ids; status; comm.
_RECORD = struct.Struct("<IIBBHHHQQQQIIIIII16s")
_CHILD_AT = _RECORD.size
_CHILD = struct.Struct("<QII")
_REST = bytes(SLOT_SIZE - _RECORD.size)

_libc = ctypes.CDLL(None, use_errno=True)
_TIMER_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC  # TFD_NONBLOCK, TFD_CLOEXEC


class Pause(NamedTuple):
    """When to take in again: as soon as the descriptor given to `listen` is readable, but not before `least_s`, and after `most_s` in any
    case. Seconds; 0 is no such limit."""

    least_s: float = 0.0
    most_s: float = 0.0


class MemoryRing:
    """Reads ahead of the consumer position, which moves only by `release`: what was not released can be read again.

    When more than three quarters are taken, all but the ends of watched processes is dropped, as in the probe; when all is, everything.
    Each record that is dropped is counted in `control`.
    """

    def __init__(self, size: int, control: MemoryControl, take_in: Callable[[], Pause]) -> None:
        """`size`: bytes, a power of two. `take_in` appends what there is."""
        self.size = size
        self.position = 0
        """Where the next read begins."""
        self.consumer = 0
        """All before it was released."""
        self.producer = 0
        """Where the next record will lie."""
        self.behind = False
        """The source has not taken in all that there was."""
        self._memory = bytearray(size)  # zero pages: taken when they are written
        self._mark = size // 4 * 3
        self._control = control
        self._take_in = take_in
        self._pause = Pause()
        self._fill = 0
        """While the reader naps: so many unread bytes end that."""
        self._calm = False
        self._urgent = False
        """Something that a reader who naps is to be woken for lies behind `position`."""
        self._listening: int | None = None
        self._timer = _libc.timerfd_create(ctypes.c_int(1), ctypes.c_int(_TIMER_FLAGS))  # CLOCK_MONOTONIC; timerfd_create(2)
        if self._timer < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self.wakeups = select.epoll()
        self.wakeups.register(self._timer, select.EPOLLIN)

    def append(
        self,
        kind: int,
        flags: int,
        boottime_ns: int,
        start_ns: int,
        tgid: int,
        tid: int,
        ppid: int,
        uid: int,
        gid: int,
        comm: bytes,
        *,
        status: int = 0,
        child: tuple[int, int, int] | None = None,
        filename: bytes = b"",
        args: bytes = b"",
    ) -> None:
        """A record, or a loss that is counted. `child`: start time, tgid, tid. `filename` and each of `args` with their ending NUL."""
        spans = 1
        if filename or args:
            if len(filename) > FILENAME_MOST:
                filename, flags = filename[:FILENAME_MOST], flags | F_ARGS_TRUNCATED
            if len(args) > ARGS_MOST:
                args, flags = args[:ARGS_MOST], flags | F_ARGS_TRUNCATED
            spans += -(-(len(filename) + len(args)) // SLOT_SIZE)
        size = spans * SLOT_SIZE
        taken = self.producer - self.consumer
        first_to_go = kind not in (_ABORT, _EXIT) or not flags & F_MATCH_PROCESS
        if taken + size > self.size or (first_to_go and taken > self._mark):
            self._control.count(LOST_PROCESS if flags & F_MATCH_PROCESS else LOST_NODE, _INDEX[kind], 1)
            return
        at = self.producer % self.size
        memory = self._memory
        # The page number in the ring's header is the kernel's own business.
        _RECORD.pack_into(
            memory, at, size - RING_HEADER_SIZE, 0, RECORD_VERSION, kind, flags, len(filename), len(args),
            boottime_ns, start_ns, 0, 0, tgid, tid, ppid, uid, gid, status, comm,
        )  # fmt: skip
        memory[at + _CHILD_AT : at + SLOT_SIZE] = _REST
        if child is not None:
            _CHILD.pack_into(memory, at + _CHILD_AT, *child)
        if spans > 1:
            tail = (filename + args).ljust(size - SLOT_SIZE, b"\0")
            first = at + SLOT_SIZE
            room = self.size - first
            memory[first : first + len(tail[:room])] = tail[:room]
            if len(tail) > room:
                memory[: len(tail) - room] = tail[room:]
        self.producer += size
        self._urgent |= kind == _EXIT and bool(flags & F_MATCH_PROCESS)

    def has_room(self) -> bool:
        """Whether a record of one slot would get in, one that is dropped last."""
        return self.producer - self.consumer + SLOT_SIZE <= self.size

    def has_unread(self) -> bool:
        """Whether anything lies behind `position`, or may, once it is taken in."""
        if self.producer == self.position:
            self._look()
        return self.producer != self.position or self.behind

    def committed_ahead(self) -> bool:
        """Nothing is ever half written; but what was not taken in yet cannot be read."""
        return self.producer != self.position

    def read(self, limit: int) -> bytes | None:
        """Records from `position` on, at most about `limit` bytes, and step over them; None if there are none."""
        if self.producer == self.position:
            self._look()
        limit -= limit % SLOT_SIZE
        ahead = min(self.producer - self.position, limit + _LONGEST_RECORD_SLOTS * SLOT_SIZE)
        if ahead == 0:
            return None
        first = self.position % self.size
        data = bytes(self._memory[first : first + ahead])
        if len(data) < ahead:
            data += bytes(self._memory[: ahead - len(data)])
        if ahead > limit:
            data = data[: readable(slots_of(data), limit // SLOT_SIZE) * SLOT_SIZE]
        self.position += len(data)
        if self.position == self.producer:
            self._urgent = False
        return data

    def release(self, position: int) -> None:
        """Everything before `position` is not needed any more. Positions that were released already are ignored."""
        if position > self.consumer:
            self.consumer = min(position, self.producer)
        self.position = max(self.position, self.consumer)

    def rewind(self, position: int = 0) -> None:
        """Read again what was not released, from `position` on if that is later."""
        self.position = max(self.consumer, position)

    def prepare_sleep(self) -> bool:
        """Ask to be woken. False if there is something to read already."""
        self._fill = 0
        self._look()
        if self.producer != self.position:
            return False
        self._arm()
        return True

    def prepare_nap(self, fill: int, *, calm: bool) -> bool:
        """Ask to be woken when `fill` bytes can be read, or earlier, unless `calm`, by what is urgent. False if so many can be already."""
        self._look()
        self._fill, self._calm = fill, calm
        self._arm()
        return self.producer - self.position < fill and (calm or not self._urgent)

    def awake(self) -> bool:
        """Forget the wake-ups that came, take in what there is, and ask for the next: whoever calls this whenever `wakeups` is readable
        keeps the source from falling behind, though he may not read. False: the reader may nap on."""
        self.wakeups.poll(0)
        with contextlib.suppress(BlockingIOError):
            os.read(self._timer, 8)
        self._look()
        self._arm()
        if self._fill and self.producer - self.position < self._fill and (self._calm or not self._urgent):
            return False
        self._fill = 0
        return True

    def listen(self, fd: int | None) -> None:
        """Wake up when this descriptor is readable; None: when none is."""
        if self._listening is not None:
            self.wakeups.unregister(self._listening)
        self._listening = fd
        if fd is not None:
            self.wakeups.register(fd, select.EPOLLIN | select.EPOLLONESHOT)

    def close(self) -> None:
        """Give the descriptors back."""
        self.wakeups.close()
        os.close(self._timer)

    def _look(self) -> None:
        self._pause = self._take_in()

    def _arm(self) -> None:
        """By the clock while much is coming, as a network driver does (NAPI), and at the first message otherwise."""
        pause = self._pause
        seconds = pause.least_s or pause.most_s
        if seconds:
            nanoseconds = int(seconds * 1e9)
            value = (ctypes.c_long * 4)(0, 0, nanoseconds // 1_000_000_000, nanoseconds % 1_000_000_000)
            _libc.timerfd_settime(ctypes.c_int(self._timer), ctypes.c_int(0), value, None)
        if self._listening is not None:
            self.wakeups.modify(self._listening, 0 if pause.least_s else select.EPOLLIN | select.EPOLLONESHOT)
