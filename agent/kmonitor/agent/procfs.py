# SPDX-License-Identifier: Apache-2.0
"""What runs on this node, as /proc tells it (proc(5)): for sources that have no iterator in the kernel.

Start times are in clock ticks there: here they are nanoseconds of boot time, in steps of TICK_NS.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from kmonitor.agent.capabilities import effective
from kmonitor.agent.cgroups import hierarchy_root
from kmonitor.agent.errors import CaptureError
from kmonitor.agent.processes import HIDDEN_ADVICE, Found, Look
from kmonitor.wire.selectors import COMM_MOST

TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
ARGS_MOST = 256
"""Bytes of a command line that are listed: tens of thousands of processes must fit in one answer."""


def is_other_grain(one: int, other: int) -> bool:
    """Whether two different start times of a pid are of one process: sources differ in their grain, and the one that captures now need not
    be the one that the process was told from. A pid is not given out twice in a tick."""
    return one != other and one // TICK_NS == other // TICK_NS and 0 in (one % TICK_NS, other % TICK_NS)


_PF_EXITING = 0x4  # include/linux/sched.h; set before the kernel tells anybody of the end of a thread


_UNSEEN = (FileNotFoundError, ProcessLookupError, PermissionError)


class Stat(NamedTuple):
    """Of /proc/PID/stat what is used here."""

    comm: str
    ppid: int
    exiting: bool
    """The thread that was asked for has begun to end, or has ended."""
    threads: int
    """Not yet released; the first one stays until the process was waited for."""
    start_boottime_ns: int


class ProcTable:
    """Looks processes up in /proc."""

    def __init__(self) -> None:
        """Raises CaptureError if /proc is another pid namespace's, or does not show all that runs."""
        try:
            own = os.readlink("/proc/self")  # noqa: PTH115 - the link's text is what is asked for
        except OSError:
            own = ""
        if own != str(os.getpid()):
            raise CaptureError("/proc is not that of this agent's pid namespace: mount -t proc proc /proc")
        self._check_visible()
        try:
            self._cgroup_root: Path | None = hierarchy_root()
        except CaptureError:
            self._cgroup_root = None

    def all(self) -> list[Found]:
        """Every process, zombies too. Raises CaptureError if /proc has come to hide some."""
        self._check_visible()
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]  # noqa: PTH208 - strings are wanted
        return [found for pid in pids if (found := self._find(pid)) is not None]

    def look_up(self, pids: list[int]) -> Look:
        """Those of `pids` that are there. Raises OSError if that cannot be found out now."""
        found: dict[int, Found] = {}
        hidden = []
        for pid in pids:
            one = self._find(pid) or (None if is_gone(pid) else self._find(pid))  # again: the pid may have been given out since
            if one is not None:
                found[pid] = one
            elif not is_gone(pid) and _is_hidden(pid):
                hidden.append(pid)
        return Look(found, hidden)

    @staticmethod
    def _check_visible() -> None:
        if how := how_hidden():
            raise CaptureError(f"/proc hides other users' processes from this agent ({how}): {HIDDEN_ADVICE}")

    def _find(self, pid: int) -> Found | None:
        first = _stat(f"/proc/{pid}/stat")
        if first is None:
            return None
        live = first.threads if not first.exiting else _live_threads(pid)
        status = _read(f"/proc/{pid}/status") or b""
        again = _stat(f"/proc/{pid}/stat")
        if again is None or again.start_boottime_ns != first.start_boottime_ns or b"\nTgid:\t%d\n" % pid not in status:
            return None  # gone meanwhile, or the id of a thread that is not the first
        uid, gid = _real(status, b"\nUid:\t"), _real(status, b"\nGid:\t")
        return Found(pid, first.ppid, uid, gid, first.comm, first.start_boottime_ns, self._cgroup_id(pid), live)

    def _cgroup_id(self, pid: int) -> int:
        """0 if it is not known: there is no version 2, or the group is outside of what is mounted here."""
        if self._cgroup_root is None:
            return 0
        for line in (_read(f"/proc/{pid}/cgroup") or b"").splitlines():
            if line.startswith(b"0::/"):
                try:
                    return Path(os.fsdecode(os.fsencode(self._cgroup_root) + line[3:])).stat().st_ino
                except OSError:
                    return 0
        return 0


def is_gone(pid: int) -> bool:
    """Whether no process or thread has this id, as the kernel says, and not /proc, which may hide it (hidepid=)."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False


def how_hidden() -> str:
    """By what /proc hides processes from this one; empty if it shows them all."""
    for line in reversed(Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()):
        mount, _, rest = line.partition(" - ")
        if mount.split(" ")[4] != "/proc":
            continue
        options = dict(option.partition("=")[::2] for option in rest.split(" ")[2].split(","))
        mode = options.get("hidepid", "off")
        if mode in ("0", "off") or "CAP_SYS_PTRACE" in effective():
            return ""
        if mode not in ("4", "ptraceable") and int(options.get("gid", 0)) in {os.getegid(), *os.getgroups()}:
            return ""
        return f"hidepid={mode}"
    return ""


def _is_hidden(pid: int) -> bool:
    """Of a process that is there and was not found: whether that is since it is hidden. False: it is a thread that is not the first, or
    has ended since. Raises OSError if it could not be read for another reason."""
    return _read(f"/proc/{pid}/stat") is None and not is_gone(pid)


def read_stat(path: str) -> Stat | None:
    """Of a process or thread; None if it is gone, or cannot be read: see is_gone."""
    try:
        return _stat(path)
    except OSError:
        return None


def _stat(path: str) -> Stat | None:
    """Of a process or thread; None if /proc does not show it. Raises OSError if it could not be read for another reason."""
    text = _read(path)
    if text is None:
        return None
    opening, closing = text.index(b"("), text.rindex(b")")  # a name may have any of ") ("
    fields = text[closing + 2 :].split()
    exiting = bool(int(fields[6]) & _PF_EXITING) or fields[0] in (b"Z", b"X")
    # Of a kernel's worker there is more here than its name: what it works on.
    comm = text[opening + 1 : closing][:COMM_MOST].decode(errors="replace")
    return Stat(comm, int(fields[1]), exiting, int(fields[17]), int(fields[19]) * TICK_NS)


def command_line(pid: int, start_boottime_ns: int) -> tuple[list[str], bool]:
    """Return the arguments of a process, and whether there are more bytes of them than ARGS_MOST.

    None of a kernel thread, of one that has ended, and of one that may not be read. Source: proc(5), /proc/PID/cmdline.
    """
    try:
        text = _read(f"/proc/{pid}/cmdline")
        stat = _stat(f"/proc/{pid}/stat") if text else None
    except OSError:
        return [], False
    # The pid may have been given out again meanwhile: sources differ in their grain, and no pid comes twice in a tick.
    if not text or stat is None or stat.start_boottime_ns // TICK_NS != start_boottime_ns // TICK_NS:
        return [], False
    kept = text[:ARGS_MOST].removesuffix(b"\0")
    return [word.decode(errors="replace") for word in kept.split(b"\0")], len(text) > ARGS_MOST


def thread_ids(pid: int) -> list[int]:
    """Of a process's threads, ended ones too that are not released; none if it is gone."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]  # noqa: PTH208 - strings are wanted
    except OSError:
        return []


def _live_threads(pid: int) -> int:
    try:
        names = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208 - strings are wanted
    except _UNSEEN:
        return 0
    found = [_stat(f"/proc/{pid}/task/{name}/stat") for name in names]
    return sum(1 for stat in found if stat is not None and not stat.exiting)


def _real(status: bytes, label: bytes) -> int:
    """The first number behind the label: the real id."""
    return int(status[status.index(label) + len(label) :].split(None, 1)[0])


def _read(path: str) -> bytes | None:
    """None if it is not there, or hidden. Raises OSError if it could not be read for another reason, such as for lack of descriptors."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except _UNSEEN:
        return None
    try:
        return os.read(fd, 1 << 16)
    except _UNSEEN:  # ESRCH: gone since it was opened
        return None
    finally:
        os.close(fd)
