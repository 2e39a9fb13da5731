# SPDX-License-Identifier: Apache-2.0
"""Getting the CPU when everybody wants it: a node that is overloaded is one whose events matter most."""

from __future__ import annotations

import contextlib
import os

DEFAULT_NICE = -10


def raise_priority(nice: int) -> None:
    """Set this process's nice value; call it before threads are started, which inherit it. Without CAP_SYS_NICE nothing is raised."""
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, nice)
