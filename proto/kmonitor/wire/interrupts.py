# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C while a program starts: it ends by the signal, as programs do, and not with a traceback of half an import."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_start() -> Iterator[None]:
    """Let SIGINT end the process within, unless it is ignored, as by nohup(1) and in a shell's background."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before)
