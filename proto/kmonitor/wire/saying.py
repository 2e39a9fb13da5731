# SPDX-License-Identifier: Apache-2.0
"""What agent and broker say on standard output and standard error, for people and for whoever waits until they are ready.

What cannot be written is dropped, and nothing waits for a reader: the work goes on when a journal is full, or gone.
"""

from __future__ import annotations

import io
import os
import select
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_AT_ONCE = 4096
"""Bytes. A pipe that is ready to be written takes so many without a wait (PIPE_BUF)."""


class LossyOutput(io.FileIO):
    """A descriptor to write to. What cannot be written at once is dropped."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)

    def write(self, data: ReadableBuffer, /) -> int:
        """Of `data` how much was written, or dropped."""
        view = memoryview(data)
        try:
            return (super().write(view[:_AT_ONCE]) if self.is_ready(0) else None) or len(view)
        except OSError:
            return len(view)

    def is_ready(self, limit: float | None) -> bool:
        """Wait until it can be written to, so many milliseconds at most; whether it can."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        return bool(poll.poll(limit))


def outlive_stderr() -> None:
    """From now on drop what standard error does not take, instead of raising."""
    open_closed()
    sys.stderr = text_output(LossyOutput(2))


def outlive_stdout() -> None:
    """The same for standard output. What it had not taken yet is dropped."""
    open_closed()
    sys.stdout = text_output(LossyOutput(1))


def text_output(raw: LossyOutput, *, line_buffering: bool = True) -> io.TextIOWrapper:
    """A stream of text for a standard one; what its encoding lacks is written out."""
    before = sys.stdout if raw.fileno() == 1 else sys.stderr
    encoding = "utf-8" if before is None else before.encoding
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", line_buffering=line_buffering)


def open_closed() -> None:
    """Take standard descriptors that are free: else the next file or socket would get them, and with them what is meant for people. They
    are taken in a direction in which every use fails as on a closed one."""
    for descriptor, way in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, way), True)


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)
