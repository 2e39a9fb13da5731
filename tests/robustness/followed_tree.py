# SPDX-License-Identifier: Apache-2.0
"""A followed tree through kill and overflow, again and again, under load: what is rare shows in hundreds of rounds.

    python -m tests.robustness.followed_tree [--times 300] [--load 2] [--log memory|sqlite]

Each round follows two trees on a node with a small ring, kills its agent, lets the ring run over, and starts the next agent: delivered
+ in gaps = generated, for each type, for one who follows and for one who watches the node. `--load`: so many processes that want a CPU all
the while. It prints each round that is wrong, and in the end the figures. Exit status 1 if any was.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.lab import bpffs, workload
from tests.lab.services import Lab
from tests.robustness.overrun import overrun
from tests.robustness.rig import MEMORY, PATIENT, SQLITE, rig
from tests.robustness.soak import show_stderr, terminate

SMALL_RING = ("--ring-size", "64K")
_BUSY = "while True: pass"


@contextlib.contextmanager
def load(count: int) -> Iterator[None]:
    """Within, so many processes are busy."""
    busy = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main(argv: Sequence[str]) -> int:
    """Exit status 0 if the books balance in each round."""
    parser = argparse.ArgumentParser(prog="followed_tree")
    parser.add_argument("--times", type=int, default=300, metavar="N")
    parser.add_argument("--load", type=int, default=2, metavar="N", help="so many busy processes beside it")
    parser.add_argument("--log", choices=("sqlite", "memory"), default="memory")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, terminate)
    began, wrong, lost = time.monotonic(), 0, 0
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kmonitor-tree-")))
        pins = stack.enter_context(bpffs.mounted())
        programs = workload.build(folder)
        log = SQLITE if options.log == "sqlite" else MEMORY
        made = stack.enter_context(rig(pins, programs, folder, *PATIENT, nodes={"s": SMALL_RING}, log=log))
        stack.enter_context(load(options.load))
        for number in range(1, options.times + 1):
            lab = Lab(pins)
            try:
                done = overrun(made, lab, "s")
            except BaseException:
                show_stderr()
                raise
            finally:
                lab.close()
            lost += done.in_gaps > 0
            wrong += bool(done.wrong)
            print(f"{time.monotonic() - began:8.1f}  {number}: {done.summary}", flush=True)
            for text in done.wrong:
                print(f"    WRONG: {text}", flush=True)
    print(f"{options.times} rounds, load {options.load}: the ring ran over in {lost}; {wrong} do not balance", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
