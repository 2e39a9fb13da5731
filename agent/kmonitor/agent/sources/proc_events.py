# SPDX-License-Identifier: Apache-2.0
"""From the proc connector's messages to records: what the probe does in the kernel, with the same masks and in the same order.

What a message does not say is taken from what is known of its process (lineage.py).
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from kmonitor.agent.maps import LOST_FOLLOW, LOST_PROCESS, WATCHED_FOLLOW, Watched
from kmonitor.agent.procfs import TICK_NS, read_stat
from kmonitor.agent.slices import in_thread
from kmonitor.agent.sources.lineage import Kin, all_pids, comm_of, from_proc, is_same, lives, running, start_of
from kmonitor.agent.sources.memory_ring import MemoryRing
from kmonitor.agent.sources.memory_tables import MemoryControl, WatchedTable
from kmonitor.agent.sources.proc_messages import COMM, EXEC, EXIT, FORK, GID, UID, Messages
from kmonitor.wire.masks import EventType
from kmonitor.wire.record import F_ARGS_TRUNCATED, F_INFERRED, F_MATCH_NODE, F_MATCH_PROCESS

_THREAD_CREATE = int(EventType.THREAD_CREATE)
_THREAD_ABORT = int(EventType.THREAD_ABORT)
_THREAD_EXIT = int(EventType.THREAD_EXIT)
_PROCESS_FORK = int(EventType.PROCESS_FORK)
_PROCESS_ABORT = int(EventType.PROCESS_ABORT)
_PROCESS_EXEC = int(EventType.PROCESS_EXEC)
_PROCESS_EXIT = int(EventType.PROCESS_EXIT)

_TOLD = FORK | EXEC | UID | GID | COMM | EXIT
_NAME = struct.Struct("=4I")
_ENDED_MOST = 4096
_FEW = 32
"""Processes that are looked at on the event loop."""
_LOOKS_MOST = 10


class ProcEvents:
    """Owned by one thread, like all that it is given."""

    def __init__(self, ring: MemoryRing, control: MemoryControl, watched: WatchedTable) -> None:
        self.kins: dict[int, Kin] = {}
        """Every process while something is asked for the whole node; else the watched ones."""
        self.wide = False
        self._ring = ring
        self._control = control
        self._watched = watched
        self._ended: dict[int, None] = {}
        """Processes whose end was told, the oldest first: whatever is still said of them is no news."""
        self._widened_ns = 0
        self._touched: set[int] | None = None
        """While every process is looked at: those of which messages were taken since."""
        self._pids: npt.NDArray[np.uint32] | None = None

    # -- who is of interest

    async def widen(self) -> None:
        """Something is to be asked for the whole node: know every process. Messages must come already, and may be taken meanwhile."""
        self._touched = set()
        try:
            known = await in_thread(lambda: _read(all_pids()))
            # What messages of a process that were taken meanwhile say may be younger than the look at it, or older: look again.
            for _ in range(_LOOKS_MOST):
                if len(self._touched) <= _FEW:
                    break
                touched, self._touched = self._touched, set()
                known.update(await in_thread(partial(_read, touched)))
            known.update(_read(self._touched))
        finally:
            self._touched = None
        self.kins = {tgid: kin for tgid, kin in known.items() if kin is not None} | self.kins
        self.wide = True
        self._widened_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def narrow(self) -> None:
        """Only what is watched."""
        self.wide = False
        self.kins = {tgid: kin for tgid, kin in self.kins.items() if tgid in self._watched.entries}
        self._pids = None

    def watch(self, pid: int, entry: Watched | None) -> None:
        """The table of watched processes was changed from outside."""
        self._pids = None
        kin = self.kins.get(pid)
        if entry is None:
            if kin is not None and not self.wide:
                del self.kins[pid]
        elif kin is None or kin.start_ns != entry.start_boottime_ns:
            fresh = from_proc(pid)
            if fresh is not None and fresh.start_ns == entry.start_boottime_ns:
                self.kins[pid] = fresh

    def clear(self) -> None:
        """Nobody asks for anything."""
        self.kins.clear()
        self._ended.clear()
        self.wide = False
        self._pids = None

    @property
    def follows(self) -> bool:
        """Whether children of some process are to be watched."""
        return any(entry.flags & WATCHED_FOLLOW for entry in self._watched.entries.values())

    def is_followed(self, kin: Kin) -> bool:
        """Whether its children are to be watched."""
        entry = self._entry(kin)
        return entry is not None and bool(entry.flags & WATCHED_FOLLOW)

    # -- messages

    def take(self, messages: Messages, boottime_offset_ns: int) -> None:
        """Make records of what is asked for. `boottime_offset_ns` leads from the messages' clock to the boot-time clock."""
        what = messages["what"]
        keep: npt.NDArray[np.bool_] = what & _TOLD != 0
        words = messages["words"]
        if self._touched is not None:
            self._touched.update(words[keep, 1].tolist(), words[what == FORK, 3].tolist())
        if not self.wide:
            keep &= self._near(what, words)
        rows = np.flatnonzero(keep)
        if len(rows) == 0:
            return
        kinds: list[int] = what[rows].tolist()
        times: list[int] = (messages["monotonic_ns"][rows].astype(np.int64) + boottime_offset_ns).tolist()
        told: list[list[int]] = words[rows].tolist()
        last_exec = {told[at][1]: at for at, kind in enumerate(kinds) if kind == EXEC}
        for at, (kind, boottime_ns, data) in enumerate(zip(kinds, times, told, strict=True)):
            if kind == FORK:
                if data[2] == data[3]:
                    self._fork(boottime_ns, data[0], data[1], data[2])
                else:
                    self._create(boottime_ns, data[1], data[2], data[3])
            elif kind == EXIT:
                self._exit(boottime_ns, data[0], data[1], data[2], data[5])
            elif kind == EXEC:
                self._exec(boottime_ns, data[1], overtaken=last_exec[data[1]] != at)
            elif (kin := self.kins.get(data[1])) is not None:
                self._learn(kin, kind, data)

    def _near(self, what: npt.NDArray[np.uint32], words: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
        """Which messages are about watched processes: the whole batch at once, whatever the number of others."""
        if self._pids is None:
            self._pids = np.array(sorted(self.kins), dtype=np.uint32)
        if len(self._pids) == 0:
            return np.zeros(len(what), dtype=bool)
        whose, childs = words[:, 1], words[:, 3]
        forks = what == FORK
        # A thread's creation names the parent of its process, and then its process.
        near: npt.NDArray[np.bool_] = _within(whose, self._pids) | (forks & _within(childs, self._pids))
        if self.follows:
            # What the children of this batch do is in this batch too.
            pids = self._pids
            while True:
                born = np.setdiff1d(childs[near & forks], pids)
                if len(born) == 0:
                    break
                pids = np.union1d(pids, born)
                near |= _within(whose, pids)
        return near

    def _learn(self, kin: Kin, kind: int, data: list[int]) -> None:
        if kind == UID:
            kin.uid = data[2]
        elif kind == GID:
            kin.gid = data[2]
        else:
            name = _NAME.pack(*data[2:]).split(b"\0", 1)[0]
            if data[0] == data[1]:
                kin.comm = name
            else:
                kin.thread_comms[data[0]] = name

    def _fork(self, boottime_ns: int, parent_tid: int, parent_tgid: int, child: int) -> None:
        parent = self._met(parent_tgid)
        entry = None if parent is None else self._entry(parent)
        flags = 0 if parent is None else self._matches(parent, _PROCESS_FORK)
        follow = entry is not None and entry.flags & WATCHED_FOLLOW
        known = self.kins.get(child)
        if known is not None and not is_same(known.start_ns, boottime_ns):
            self.infer(known, boottime_ns)  # the pid was given out again: the end of who had it was not told
            known = None
        self._ended.pop(child, None)
        if parent is None or not (flags or follow or self.wide):
            return
        start_ns = start_of(child, boottime_ns) if known is None else known.start_ns
        if follow and entry is not None:
            self._follow(child, start_ns, entry)
        if known is None and (follow or self.wide):
            comm = parent.thread_comms.get(parent_tid, parent.comm)
            self.kins[child] = Kin(child, start_ns, parent_tgid, parent.uid, parent.gid, comm, {child}, met_ns=start_ns)
            self._pids = None
        if flags:
            self._tell(parent, _PROCESS_FORK, flags, boottime_ns, parent_tid, child=(start_ns, child, child))

    def _follow(self, child: int, start_ns: int, parents: Watched) -> None:
        old = self._watched.entries.get(child)
        mask = parents.mask
        if old is not None and old.start_boottime_ns == start_ns:
            mask |= old.mask  # it was registered for itself before its creation was read
        if not self._watched.put(child, Watched(start_ns, mask, WATCHED_FOLLOW)):
            self._control.count(LOST_PROCESS, LOST_FOLLOW, 1)

    def _create(self, boottime_ns: int, parent_tgid: int, tid: int, tgid: int) -> None:
        kin = self._met(tgid)
        if kin is None:
            return
        kin.live.add(tid)
        kin.ppid = parent_tgid or kin.ppid
        flags = self._matches(kin, _THREAD_CREATE)
        if flags:  # which thread made it is not known
            self._tell(kin, _THREAD_CREATE, flags, boottime_ns, 0, child=(boottime_ns // TICK_NS * TICK_NS, tgid, tid))

    def _exec(self, boottime_ns: int, tgid: int, *, overtaken: bool) -> None:
        kin = self._met(tgid)
        if kin is None:
            return
        # Only the thread that called exec is left, and has the process's id now.
        kin.live = {tgid}
        kin.thread_comms.clear()
        kin.status = None
        stat = read_stat(f"/proc/{tgid}/stat")
        if stat is not None and stat.start_boottime_ns == kin.start_ns:
            kin.comm, kin.ppid = comm_of(stat), stat.ppid
        else:
            kin.comm = b""  # gone already: nobody knows its new name, and the old one is wrong
        flags = self._matches(kin, _PROCESS_EXEC)
        if not flags:
            return
        runs = None if overtaken else running(tgid)
        if runs is None:
            self._tell(kin, _PROCESS_EXEC, flags | F_ARGS_TRUNCATED, boottime_ns, tgid)
        else:
            self._tell(kin, _PROCESS_EXEC, flags, boottime_ns, tgid, filename=runs[0], args=runs[1])

    def _exit(self, boottime_ns: int, tid: int, tgid: int, status: int, parent_tgid: int) -> None:
        kin = self.kins.get(tgid)
        if kin is None:
            if not self.wide or tgid in self._ended or boottime_ns < self._widened_ns:
                return
            kin = self._met(tgid)
            if kin is None:
                if tid != tgid:
                    return
                # Made and gone while messages were missing: what is known is in this one.
                kin = Kin(tgid, 0, 0, 0, 0, b"")
        if boottime_ns < kin.start_ns:
            return  # of the process that had the pid before
        if tid != tgid:
            comm = kin.thread_comms.pop(tid, kin.comm)
            if status & 0x7F:
                self._tell_end(kin, _THREAD_ABORT, boottime_ns, tid, status, comm)
            self._tell_end(kin, _THREAD_EXIT, boottime_ns, tid, status, comm)
        was_live = tid in kin.live
        kin.ended(tid, status)
        kin.ppid = parent_tgid or kin.ppid
        # A first thread that ends again is one that was to exec: it had taken the first one's id, and exec failed behind the
        # point of no return. No message comes for the id that it had.
        if kin.live and tid == tgid and not was_live and not lives(tgid, kin.start_ns):
            kin.live.clear()
        if not kin.live:
            self._end(kin, boottime_ns, tid)

    def _end(self, kin: Kin, boottime_ns: int, tid: int) -> None:
        status = kin.status or 0
        if status & 0x7F:
            self._tell_end(kin, _PROCESS_ABORT, boottime_ns, tid, status, kin.comm)
        self._tell_end(kin, _PROCESS_EXIT, boottime_ns, tid, status, kin.comm)
        self._forget(kin)

    def infer(self, kin: Kin, boottime_ns: int) -> None:
        """It was found gone: its end is told without a status, and not again if the message still comes."""
        flags = self._matches(kin, _PROCESS_EXIT)
        if flags and kin.live:  # else it had ended when it was met first
            self._tell(kin, _PROCESS_EXIT, flags | F_INFERRED, boottime_ns, kin.tgid)
        self._forget(kin)

    def infer_gone(self, kin: Kin, boottime_ns: int) -> None:
        """The broker has asked for the end of one that is gone: as `infer`, but whatever the masks are, and whatever was told before."""
        self._tell(kin, _PROCESS_EXIT, F_INFERRED | F_MATCH_PROCESS, boottime_ns, kin.tgid)
        self._forget(kin)

    def adopt(self, kin: Kin, boottime_ns: int) -> None:
        """It was found, its creation was not told: watch it if its parent is followed, and say so by a fork without its time."""
        self.kins[kin.tgid] = kin
        self._ended.pop(kin.tgid, None)
        self._pids = None
        parent = self.kins.get(kin.ppid)
        entry = None if parent is None else self._entry(parent)
        if parent is None or entry is None or not entry.flags & WATCHED_FOLLOW:
            return
        kin.met_ns = kin.start_ns
        self._follow(kin.tgid, kin.start_ns, entry)
        flags = self._matches(parent, _PROCESS_FORK)
        if flags:
            self._tell(parent, _PROCESS_FORK, flags | F_INFERRED, boottime_ns, 0, child=(kin.start_ns, kin.tgid, kin.tgid))

    def _forget(self, kin: Kin) -> None:
        if self._entry(kin) is not None:
            del self._watched.entries[kin.tgid]
        if self.kins.get(kin.tgid) is kin:
            del self.kins[kin.tgid]
            self._pids = None
        self._ended[kin.tgid] = None
        if len(self._ended) > _ENDED_MOST:
            del self._ended[next(iter(self._ended))]

    def _met(self, tgid: int) -> Kin | None:
        """What is known of it. While every process is, one that is not was made while messages were missing."""
        kin = self.kins.get(tgid)
        if kin is None and self.wide and tgid not in self._ended:
            kin = from_proc(tgid)
            if kin is not None:
                self.kins[tgid] = kin
        return kin

    # -- records

    def _entry(self, kin: Kin) -> Watched | None:
        """That of the process itself: not of one that has the pid before or after it."""
        entry = self._watched.entries.get(kin.tgid)
        return entry if entry is not None and entry.start_boottime_ns in (0, kin.start_ns) else None

    def _matches(self, kin: Kin, bit: int) -> int:
        flags = F_MATCH_NODE if self._control.all_mask & bit else 0
        entry = self._entry(kin)
        return flags | F_MATCH_PROCESS if entry is not None and entry.mask & bit else flags

    def _tell(self, kin: Kin, bit: int, flags: int, boottime_ns: int, tid: int, **more: Any) -> None:
        self._ring.append(bit, flags, boottime_ns, kin.start_ns, kin.tgid, tid, kin.ppid, kin.uid, kin.gid, kin.comm, **more)

    def _tell_end(self, kin: Kin, bit: int, boottime_ns: int, tid: int, status: int, comm: bytes) -> None:
        flags = self._matches(kin, bit)
        if flags:
            self._ring.append(bit, flags, boottime_ns, kin.start_ns, kin.tgid, tid, kin.ppid, kin.uid, kin.gid, comm, status=status)


def _read(tgids: Iterable[int]) -> dict[int, Kin | None]:
    """Return those processes as /proc has them."""
    return {tgid: from_proc(tgid) for tgid in tgids}


def _within(values: npt.NDArray[np.uint32], ascending: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    at = np.searchsorted(ascending, values)
    found: npt.NDArray[np.bool_] = ascending[np.minimum(at, len(ascending) - 1)] == values
    return found
