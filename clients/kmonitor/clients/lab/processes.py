# SPDX-License-Identifier: Apache-2.0
"""Processes of this machine that are not our children: who they are, and signals that hit nobody else."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kmonitor.wire.errors import KmonitorError

PROC = Path("/proc")


def _stat(pid: int) -> list[str]:
    """What /proc/PID/stat has behind the name: the third field is [0]. Raises OSError."""
    return (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()


def first_child(parent: int) -> int | None:
    """A process's first child, if it has one. (/proc/PID/task/TID/children needs an option of the kernel.)"""
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if int(_stat(int(entry.name))[1]) == parent:
                    return int(entry.name)
    return None


def comm(pid: int) -> str:
    """A process's name. Raises OSError."""
    return (PROC / str(pid) / "comm").read_text(encoding="utf-8", errors="replace").strip()


def pid_inside(host_pid: int) -> int:
    """A process's pid as its own namespace has it. Raises KmonitorError if it is gone."""
    with contextlib.suppress(OSError):
        for line in (PROC / str(host_pid) / "status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    raise KmonitorError(f"process {host_pid} has no pid in a namespace: it has ended, or this kernel has no pid namespaces")


def send(pid: int, number: signal.Signals, is_it: Callable[[], bool], *, limit: float = 0) -> bool:
    """Send a process a signal if it is the one that is meant; false if it is not.

    `is_it` is asked while a pidfd holds the process, so that the pid cannot become another's in between. With a `limit`, in seconds, wait
    for its end; KmonitorError if it does not come.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if not is_it():
            return False
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, number)
        if limit and not select.select([descriptor], [], [], limit)[0]:
            raise KmonitorError(f"process {pid} does not end, {limit:g} s after {number.name}: it waits for the kernel; try again later")
    finally:
        os.close(descriptor)
    return True


@dataclass(frozen=True)
class Process:
    """One process, and no other that gets its pid later."""

    pid: int
    start: int
    """Clock ticks since the machine's start."""

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The one that has the pid now."""
        try:
            return cls(pid, int(_stat(pid)[19]))
        except OSError:
            return None

    @property
    def state(self) -> str:
        """The kernel's letter: "S", "T" if it is stopped. Empty if it has ended, whether somebody waited for it or not."""
        try:
            fields = _stat(self.pid)
        except OSError:
            return ""
        return "" if int(fields[19]) != self.start or fields[0] in "ZX" else fields[0]

    def parent(self) -> int:
        """Its parent's pid; 0 if it is gone."""
        try:
            return int(_stat(self.pid)[1])
        except OSError:
            return 0

    def send(self, number: signal.Signals, *, limit: float = 0) -> bool:
        """As `send` of this module."""
        return send(self.pid, number, lambda: bool(self.state), limit=limit)
