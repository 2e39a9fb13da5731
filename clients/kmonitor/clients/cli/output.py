# SPDX-License-Identifier: Apache-2.0
"""Standard output and standard error of `kmon`, when they are full, gone, or of a narrow encoding.

What cannot be written to standard error is dropped, and nothing waits for its reader: a tool that a failover hangs on must outlive its log.
What cannot be written to standard output ends a command with one line, unless the command has more to do than to print (`outlive_stdout`).
"""

from __future__ import annotations

import io
import os
import select
import sys
from typing import TYPE_CHECKING

from kmonitor.wire.errors import KmonitorError
from kmonitor.wire.plain import plain_text

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_AT_ONCE = 4096
"""Bytes. A pipe that is ready to be written takes so many without a wait (PIPE_BUF)."""


class OutputError(KmonitorError):
    """Standard output cannot be written."""


class ReaderGoneError(OutputError):
    """Whoever read standard output has had enough: an end in order, of which nothing is said."""

    exit_status = 0


class _Output(io.FileIO):
    """A descriptor to write to. `is_lossy`: what cannot be written at once is dropped."""

    def __init__(self, descriptor: int, *, is_lossy: bool) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.is_lossy = is_lossy

    def write(self, data: ReadableBuffer, /) -> int:
        """Of `data` how much was written, or dropped. Raises ReaderGoneError, OutputError."""
        view = memoryview(data)
        try:
            if self.is_lossy:
                return (super().write(view[:_AT_ONCE]) if self._is_ready(0) else None) or len(view)
            while (written := super().write(view)) is None:  # somebody made it non-blocking
                self._is_ready(None)
        except OSError as error:
            if self.is_lossy:
                return len(view)
            if isinstance(error, BrokenPipeError):
                raise ReaderGoneError("the reader of standard output is gone") from None
            raise OutputError(f"cannot write to standard output: {error.strerror}") from None
        return written

    def _is_ready(self, limit: float | None) -> bool:
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        return bool(poll.poll(limit))


def install() -> None:
    """Take over this process's standard streams, those too that it was started without."""
    _open_closed()
    sys.stdout = _text(1, is_lossy=False)
    sys.stderr = _text(2, is_lossy=True)


def outlive_stdout() -> None:
    """From now on drop what standard output does not take, instead of raising."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, _Output):
        raw.is_lossy = True


def say(text: str) -> None:
    """Show people a line, on standard error: standard output is the events'. Others' text may be part of it."""
    print(f"kmon: {plain_text(text)}", file=sys.stderr, flush=True)


def _text(descriptor: int, *, is_lossy: bool) -> io.TextIOWrapper:
    before = sys.stdout if descriptor == 1 else sys.stderr
    encoding = "utf-8" if before is None else before.encoding
    binary = io.BufferedWriter(_Output(descriptor, is_lossy=is_lossy))
    return io.TextIOWrapper(binary, encoding=encoding, errors="backslashreplace", line_buffering=is_lossy or os.isatty(descriptor))


def _open_closed() -> None:
    """Take descriptors that are free: else the next file or socket would get them, and with them what is meant for people. They are taken
    in a direction in which every use fails as on a closed one."""
    for descriptor, way in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, way), True)
