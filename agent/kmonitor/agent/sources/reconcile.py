# SPDX-License-Identifier: Apache-2.0
"""After messages were missed: what is known is held against /proc, and what ended unseen is told as inferred.

A process is seen as ended in /proc a moment before the kernel sends the message of it (exit_notify() comes before proc_exit_connector()
in do_exit()). So who is found gone is a suspect at first, and is told as gone if no message came for a while.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from kmonitor.agent.procfs import is_gone, read_stat
from kmonitor.agent.sources.lineage import Kin, all_pids, comm_of, from_proc, live_threads, lives
from kmonitor.agent.sources.proc_events import ProcEvents

DELIBERATION_NS = 20_000_000
_SHARE = 10
"""At most one part in so many of the time goes into reading /proc, however often messages are missed."""
_SLICE_NS = 5_000_000
"""So long the event loop is held for it at a time."""
_DONE = object()


class Reconciliation:
    """Belongs to a ProcEvents. All times are of the boot-time clock."""

    def __init__(self, events: ProcEvents) -> None:
        self.wanted = False
        """Messages were missed since it was last done."""
        self._events = events
        self._suspects: list[Kin] = []
        self._due_ns = 0
        self._not_before_ns = 0
        self._steps: Iterator[None] | None = None
        """What is left of a look at /proc that was begun."""
        self._spent_ns = 0
        """By it, so far."""

    def clear(self) -> None:
        """Nobody asks for anything."""
        self.wanted = False
        self._suspects.clear()
        self._steps = None

    def due(self, now_ns: int) -> float | None:
        """Seconds until there is something to do; None if there is not."""
        if self._steps is not None:
            return 0.0
        times = []
        if self._suspects:
            times.append(self._due_ns)
        if self.wanted:
            times.append(self._not_before_ns)
        return max(min(times) - now_ns, 0) / 1e9 if times else None

    def look(self, now_ns: int) -> bool:
        """Hold what is known against /proc, if that is wanted, or go on with it for a moment; whether it is done. All messages that were
        there must have been taken."""
        if self._steps is None:
            if not self.wanted or now_ns < self._not_before_ns:
                return False
            self.wanted = False
            self._steps, self._spent_ns = self._look_at_all(), 0
        done = False
        until_ns = now_ns + _SLICE_NS
        while not done and _boottime() < until_ns:
            done = next(self._steps, _DONE) is _DONE
        at_ns = _boottime()
        self._spent_ns += at_ns - now_ns
        if done:
            self._steps = None
            self._due_ns = at_ns + DELIBERATION_NS
            self._not_before_ns = at_ns + _SHARE * self._spent_ns
        return done

    def _look_at_all(self) -> Iterator[None]:
        """A step is a few processes."""
        events = self._events
        before = {id(kin) for kin in self._suspects}
        for kin in list(events.kins.values()):
            if events.kins.get(kin.tgid) is kin and kin.live and id(kin) not in before and not self._refresh(kin):
                self._suspects.append(kin)
            yield
        if events.wide or events.follows:
            yield from self._find_missed()

    def decide(self, now_ns: int) -> None:
        """Tell the end of suspects of whom no message came. All messages that are there must have been taken."""
        if not self._suspects or now_ns < self._due_ns or self._steps is not None:
            return
        suspects, self._suspects = self._suspects, []
        for kin in suspects:
            if self._events.kins.get(kin.tgid) is kin and not lives(kin.tgid, kin.start_ns):
                self._events.infer(kin, now_ns)

    def _refresh(self, kin: Kin) -> bool:
        """What changed unseen; False if it has ended."""
        stat = read_stat(f"/proc/{kin.tgid}/stat")
        if stat is None:
            return not is_gone(kin.tgid)
        if stat.start_boottime_ns != kin.start_ns:
            return False
        live, comms = live_threads(kin.tgid, stat)
        if not live:
            return False
        fresh = from_proc(kin.tgid)
        if fresh is None or fresh.start_ns != kin.start_ns:
            return False
        kin.ppid, kin.uid, kin.gid, kin.comm = fresh.ppid, fresh.uid, fresh.gid, comm_of(stat)
        kin.live = live
        kin.thread_comms = {tid: name for tid, name in comms.items() if name != kin.comm}
        return True

    def _find_missed(self) -> Iterator[None]:
        """Processes that were made unseen: all of them if all are known; else those whose parent is followed, and theirs.

        The child of a process that is gone itself has another parent by now, and is not found for it.
        """
        events = self._events
        unknown: dict[int, list[Kin]] = {}
        for tgid in all_pids():
            yield
            old = events.kins.get(tgid)
            kin = from_proc(tgid) if old is None or read_start(tgid) != old.start_ns else None
            if kin is None or not kin.live:
                continue
            if old is not None:
                events.infer(old, _boottime())  # its pid was given out again
            unknown.setdefault(kin.ppid, []).append(kin)
        parents = [tgid for tgid in unknown if tgid in events.kins]  # the last is looked at first: a parent before its children
        if events.wide:
            parents = [tgid for tgid in unknown if tgid not in events.kins] + parents
        while parents:
            tgid = parents.pop()
            parent = events.kins.get(tgid)
            for kin in unknown.pop(tgid, []):
                if not events.wide and (parent is None or kin.start_ns < parent.met_ns or not events.is_followed(parent)):
                    continue
                # Since it was found its creation may have been told, or its end, which was ignored.
                if kin.tgid not in events.kins and lives(kin.tgid, kin.start_ns):
                    events.adopt(kin, _boottime())
                parents.append(kin.tgid)
                yield


def _boottime() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def read_start(tgid: int) -> int:
    """0 if it is not there."""
    stat = read_stat(f"/proc/{tgid}/stat")
    return 0 if stat is None else stat.start_boottime_ns
