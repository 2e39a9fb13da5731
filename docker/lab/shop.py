# SPDX-License-Identifier: Apache-2.0
"""Something to watch: a shop that does what goes wrong on real machines, slowly enough to read along.

Every few seconds it forks a child named `order`. Most run a short command and end with 0; every third dereferences a null pointer, every
fifth ends with code 3. Another child, `leak`, takes memory until the kernel's out-of-memory killer ends it, and is started again.
Both end with the shop (PR_SET_PDEATHSIG). The pid of each child goes to /run/shop.book, for who wants to check what a monitor was told.

    shop.py [--every SECONDS] [--leak MIB_PER_SECOND]
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

_CRASH, _FAIL = 3, 5
_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_PR_SET_PDEATHSIG = 1
_PAUSE_AFTER_LEAK_S = 20.0


def drop_capabilities() -> None:
    """Give up the capabilities that the agent beside needs: linux/capability.h, capset(2). What is run from here on gets none
    back although it is root, since the container has no-new-privileges."""
    header = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def call_me(name: str) -> None:
    """The name that events carry (comm)."""
    with open("/proc/self/comm", "w", encoding="ascii") as comm:  # noqa: PTH123 - pathlib is not worth its import here
        comm.write(name)


def order(number: int) -> NoReturn:
    """A child's life."""
    call_me("order")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if number % _CRASH == 0:
        ctypes.string_at(0)
    if number % _FAIL == 0:
        os._exit(3)
    os.execvp("sleep", ["sleep", "0.3"])


def leak(mib_a_second: int) -> NoReturn:
    """Takes memory until it is killed."""
    call_me("leak")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as score:  # noqa: PTH123
        score.write("1000")  # it, and not the agent beside
    taken = []
    while True:
        taken.append(b"\1" * (mib_a_second << 18))
        time.sleep(0.25)


def fork(life: Callable[..., NoReturn], *arguments: int) -> int:
    """The pid of a child that lives so."""
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        life(*arguments)
    with open("/run/shop.book", "a", encoding="ascii") as book:  # noqa: PTH123
        book.write(f"{pid}\n")
    return pid


def main() -> NoReturn:
    """Forks and waits until it is told to end."""
    parser = argparse.ArgumentParser(description="A process that forks, crashes and leaks.")
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="An order so often.")
    parser.add_argument("--leak", type=int, default=6, metavar="MIB", help="MiB a second; 0: nothing leaks.")
    options = parser.parse_args()
    drop_capabilities()
    call_me("shop")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    number = 0
    leaking = fork(leak, options.leak) if options.leak else 0
    leak_again = 0.0
    while True:
        time.sleep(options.every)
        number += 1
        fork(order, number)
        while True:
            try:
                ended, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if ended == 0:
                break
            if ended == leaking:
                leaking, leak_again = 0, time.monotonic() + _PAUSE_AFTER_LEAK_S
        if options.leak and not leaking and time.monotonic() > leak_again:
            leaking = fork(leak, options.leak)


if __name__ == "__main__":
    main()
