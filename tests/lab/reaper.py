# SPDX-License-Identifier: Apache-2.0
"""Runs a command and, as the init of a machine would, waits for all processes that lose their parent below it.

Process 1 of a machine of the lab is a shell that reads and does not wait for strangers: what daemons leave to it stays there as a zombie,
and a resource agent that asks with `kill -0` takes that for alive.

    python reaper.py COMMAND ...
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType

PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    """The exit status of the command, whose end is ours."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)

    def forward(number: int, _: FrameType | None) -> None:
        os.kill(child, number)

    signal.signal(signal.SIGTERM, forward)
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            return os.waitstatus_to_exitcode(status) & 0xFF


if __name__ == "__main__":
    sys.exit(main())
