# SPDX-License-Identifier: Apache-2.0
"""Runs of the probe that the kernel has left out: it skips a program that is at work on the same CPU already, and only counts that.

It happens where programs are preempted (bpf/kmonitor.bpf.c, take_turn), or in whatever interrupts them. What a skipped run would have told
nobody knows: of each type that the program makes, as many may be missing as runs were left out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from kmonitor.agent import libbpf
from kmonitor.wire.masks import EventType

SKIPPED = ("kmonitor_fork", "kmonitor_exec", "kmonitor_exit")
"""The programs that make records, as KMONITOR_SKIPPED_* has them. The others lose none: without kmonitor_signal a killer is not known."""
MADE_BY = (
    (EventType.THREAD_CREATE, EventType.PROCESS_FORK),
    (EventType.PROCESS_EXEC,),
    (EventType.THREAD_ABORT, EventType.THREAD_EXIT, EventType.PROCESS_ABORT, EventType.PROCESS_EXIT),
)
"""Which records each of them makes."""
_LOOKS = 8
"""Before it is believed that a run was lost: most often it was made good in the very moment."""


class Misses:
    """Of a probe, since it was loaded: the kernel keeps the count with the program, so that it outlives an agent as the ring does."""

    def __init__(self, programs: Mapping[str, int]) -> None:
        """`programs`: of those in SKIPPED that there are, a descriptor of the first copy; this owns them."""
        self._programs = [(SKIPPED.index(name), fd) for name, fd in programs.items()]

    def count(self, made_good: Any, skipped: Any, missed: Any) -> list[int]:
        """Runs that nothing has made good, by program; the arguments are those of `control`. Raises BpfError.

        A run that is skipped and about to be made good counts too, if this is called in between. And one is made good that was not
        skipped, if its first copy ran just before anybody asked for anything. Neither must hide one that is skipped later: so what is
        added since the last look counts, and what is taken away does not.
        """
        for index, fd in self._programs:
            before = int(skipped[index])
            for _ in range(_LOOKS):
                good = int(made_good[index])  # first: it is counted after what the kernel counts
                now = libbpf.recursion_misses(fd) - good
                if now <= before:
                    break
            if now != before:
                missed[index] += max(now - before, 0)
                skipped[index] = now
        counts: list[int] = missed.tolist()
        return counts

    def close(self) -> None:
        """Give the descriptors back."""
        while self._programs:
            os.close(self._programs.pop()[1])
