# SPDX-License-Identifier: Apache-2.0
"""What runs on this node, as the probe's own iterator prints it: the same start times and ids as in the events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from kmonitor.agent import libbpf
from kmonitor.agent.maps import PROCESS_DTYPE

HIDDEN_ADVICE = "give it CAP_SYS_PTRACE, take source core, or mount -o remount,hidepid=0 /proc"

_SCAN_FROM = 32
"""From so many look-ups on one scan of all processes (some 3 us each) is cheaper than an iterator (some 100 us) for each."""


@dataclass(frozen=True, slots=True)
class Found:
    """A process that was there when it was looked up."""

    pid: int
    ppid: int
    uid: int
    gid: int
    comm: str
    start_boottime_ns: int
    cgroup_id: int
    live: int
    """Threads that have not ended. At 0 the process has ended, or is just about to say so."""


class Look(dict[int, Found]):
    """What was found, by pid."""

    def __init__(self, found: Mapping[int, Found] | None = None, hidden: Iterable[int] = ()) -> None:
        super().__init__(found or {})
        self.hidden = frozenset(hidden)
        """Pids that somebody has, of whom nothing can be seen: nobody knows whether it is the one that is meant."""


class ProcessTable:
    """Looks processes up in the kernel."""

    def __init__(self, tasks_fd: int) -> None:
        """`tasks_fd` is the program kmonitor_tasks; it stays the caller's."""
        self._tasks_fd = tasks_fd

    def all(self) -> list[Found]:
        """Every process in scope, zombies too."""
        return _decode(libbpf.read_iterator(self._tasks_fd))

    def look_up(self, pids: list[int]) -> Look:
        """Those of `pids` that are there."""
        if len(pids) >= _SCAN_FROM:
            wanted = set(pids)
            return Look({found.pid: found for found in self.all() if found.pid in wanted})
        result = Look()
        for pid in pids:
            printed = _decode(libbpf.read_iterator(self._tasks_fd, pid))
            if len(printed) > 1:  # this kernel cannot look at one task, and has printed them all
                return Look({found.pid: found for found in printed if found.pid in pids})
            result.update({found.pid: found for found in printed if found.pid == pid})
        return result


def comm_bytes(comm: str) -> bytes:
    """As in the records: at most 15 bytes. What is not UTF-8 was replaced when it was read."""
    return comm.encode(errors="replace")[:15]


def _decode(printed: bytes) -> list[Found]:
    rows = np.frombuffer(printed, dtype=PROCESS_DTYPE).tolist()
    return [
        Found(tgid, ppid, uid, gid, comm.split(b"\0", 1)[0].decode(errors="replace"), start, cgroup, live)
        for start, cgroup, tgid, ppid, uid, gid, live, _status, comm in rows
    ]
