# SPDX-License-Identifier: Apache-2.0
"""What is known of each process that somebody asked for: from /proc when it is first met, from the messages from then on."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from kmonitor.agent.processes import comm_bytes
from kmonitor.agent.procfs import TICK_NS, Stat, is_gone, read_stat, thread_ids


@dataclass(slots=True, eq=False)
class Kin:
    """One process. Bytes and numbers as in the records."""

    tgid: int
    start_ns: int
    """Boot time, in whole clock ticks."""
    ppid: int
    """As of the last message that named the parent: nothing tells of a new one."""
    uid: int
    gid: int
    comm: bytes
    live: set[int] = field(default_factory=set)
    """Threads whose end was not told. Adding one twice, or taking one away that is not there, does no harm: a thread may be listed in
    /proc before the message of its creation is read, and not be listed any more before the message of its end is."""
    thread_comms: dict[int, bytes] = field(default_factory=dict)
    """Names of threads that differ from the process's."""
    status: int | None = None
    """What waitpid(2) will report, as well as the ends of its threads tell it so far: see `ended`."""
    met_ns: int = 0
    """Boot time from which on its children are known."""

    def ended(self, tid: int, status: int) -> None:
        """One of its threads.

        All threads that end with their group have its status, and a signal always ends the group; the one that dumped core is the
        only one to have the bit that says so. Else it is the last one's: for sure if it ended the group by exit(3), and
        from Linux 5.17 on if it just ended (synchronize_group_exit() in kernel/exit.c). If two threads end themselves at once,
        each with a code of its own, then which of them the kernel takes is not known.
        """
        self.live.discard(tid)
        if self.status is None or _rank(status) >= _rank(self.status):
            self.status = status


def _rank(status: int) -> int:
    return 0 if not status & 0x7F else 1 + (status & 0x80)


def from_proc(tgid: int) -> Kin | None:
    """As /proc has it; None if it is not there, or hidden. Its set of live threads is empty if all have begun to end."""
    first = read_stat(f"/proc/{tgid}/stat")
    if first is None:
        return None
    ids = _real_ids(tgid)
    live, comms = live_threads(tgid, first)
    again = read_stat(f"/proc/{tgid}/stat")
    if ids is None or again is None or again.start_boottime_ns != first.start_boottime_ns:
        return None
    comm = comm_of(first)
    others = {tid: name for tid, name in comms.items() if name != comm}
    return Kin(tgid, first.start_boottime_ns, first.ppid, *ids, comm, live, others, met_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME))


def live_threads(tgid: int, leader: Stat) -> tuple[set[int], dict[int, bytes]]:
    """Threads that have not begun to end, and the names of all but the first."""
    if leader.threads == 1:
        return (set() if leader.exiting else {tgid}), {}
    live: set[int] = set()
    comms: dict[int, bytes] = {}
    for tid in thread_ids(tgid):
        stat = read_stat(f"/proc/{tgid}/task/{tid}/stat")
        if stat is not None and not stat.exiting:
            live.add(tid)
            if tid != tgid:
                comms[tid] = comm_of(stat)
    return live, comms


def lives(tgid: int, start_ns: int) -> bool:
    """Whether it is the same process as ever, and has a thread that has not begun to end."""
    stat = read_stat(f"/proc/{tgid}/stat")
    if stat is None:
        return not is_gone(tgid)  # hidden: nothing is inferred from that
    if stat.start_boottime_ns != start_ns:
        return False
    return not stat.exiting or bool(live_threads(tgid, stat)[0])


def all_pids() -> list[int]:
    """Of everything that runs."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]  # noqa: PTH208 - strings are wanted


def start_of(tgid: int, created_ns: int) -> int:
    """Start time of a process whose creation was told with this time of the boot-time clock.

    The kernel takes the start time a moment before it sends the message: only /proc tells for sure on which side of a
    tick it was. For a process that is gone by now nobody can look that up any more.
    """
    stat = read_stat(f"/proc/{tgid}/stat")
    if stat is not None and is_same(stat.start_boottime_ns, created_ns):
        return stat.start_boottime_ns
    return created_ns // TICK_NS * TICK_NS


def is_same(start_ns: int, created_ns: int) -> bool:
    """Whether a process that was found in /proc is the one whose creation is told only now. A fork takes far less than a second, and
    the pids do not come round in one."""
    return abs(created_ns - start_ns) < 1_000_000_000


def comm_of(stat: Stat) -> bytes:
    """As in the records."""
    return comm_bytes(stat.comm)


def running(tgid: int) -> tuple[bytes, bytes] | None:
    """(file name, arguments each ended by NUL) of what a process runs; None if that cannot be read, or any more."""
    try:
        filename = os.fsencode(os.readlink(f"/proc/{tgid}/exe"))  # noqa: PTH115 - bytes are wanted
        fd = os.open(f"/proc/{tgid}/cmdline", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        args = os.read(fd, 1 << 16)
    except OSError:
        return None
    finally:
        os.close(fd)
    # A process that has begun to end has no memory, and so no arguments, any more.
    return (filename + b"\0", args) if args else None


def _real_ids(tgid: int) -> tuple[int, int] | None:
    """Real user and group."""
    try:
        fd = os.open(f"/proc/{tgid}/status", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        text = os.read(fd, 1 << 16)
    except OSError:
        return None
    finally:
        os.close(fd)
    uid, gid = text.index(b"\nUid:\t") + 6, text.index(b"\nGid:\t") + 6
    return int(text[uid:].split(None, 1)[0]), int(text[gid:].split(None, 1)[0])
