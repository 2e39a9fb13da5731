# SPDX-License-Identifier: Apache-2.0
"""How long the probe's programs run, by the kernel's own clock: far below what a timed loop can tell on a virtual machine.

The kernel counts runs and nanoseconds of each program while somebody asks for it (BPF_ENABLE_STATS, Linux 5.8), and tells them in
/proc/self/fdinfo of the program's descriptor. Two readings of the clock are part of each run, so what it says is a little too much;
the jump into the program and what it takes from the caches of others is not part of it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from kmonitor.agent import libbpf

_RUN_TIME = 0
"""BPF_STATS_RUN_TIME of the kernel's include/uapi/linux/bpf.h."""


class KernelTime:
    """Of some loaded programs."""

    def __init__(self, programs: Sequence[int]) -> None:
        """`programs` are descriptors, which stay the caller's."""
        self._infos = [Path(f"/proc/self/fdinfo/{program}") for program in programs]

    def spent(self) -> tuple[int, int]:
        """(nanoseconds, runs) of all of them together, so far."""
        nanoseconds = runs = 0
        for info in self._infos:
            told = dict(line.split(":", 1) for line in info.read_text(encoding="ascii").splitlines())
            nanoseconds += int(told["run_time_ns"])
            runs += int(told["run_cnt"])
        return nanoseconds, runs


@contextlib.contextmanager
def kernel_time(programs: Sequence[int]) -> Iterator[KernelTime]:
    """The kernel counts until this ends. Raises OSError if it will not."""
    counting = libbpf.library.bpf_enable_stats(_RUN_TIME)
    if counting < 0:
        raise OSError(-counting, f"the kernel does not count the time of BPF programs: {os.strerror(-counting)}")
    try:
        yield KernelTime(programs)
    finally:
        os.close(counting)
