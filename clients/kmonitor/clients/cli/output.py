# SPDX-License-Identifier: Apache-2.0
"""Standard output and standard error of `kmon`, when they are full, gone, or of a narrow encoding.

What cannot be written to standard error is dropped, and nothing waits for its reader: a tool that a failover hangs on must outlive its log.
What cannot be written to standard output ends a command with one line, unless the command has more to do than to print (`outlive_stdout`).
"""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING

from kmonitor.wire.errors import KmonitorError
from kmonitor.wire.plain import plain_text
from kmonitor.wire.saying import LossyOutput, open_closed, text_output

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class OutputError(KmonitorError):
    """Standard output cannot be written."""


class ReaderGoneError(OutputError):
    """Whoever read standard output has had enough: an end in order, of which nothing is said."""

    exit_status = 0


class _Output(LossyOutput):
    """A descriptor to write to. Unless it `is_lossy`, what cannot be written is an error."""

    def __init__(self, descriptor: int, *, is_lossy: bool) -> None:
        super().__init__(descriptor)
        self.is_lossy = is_lossy

    def write(self, data: ReadableBuffer, /) -> int:
        """Of `data` how much was written, or dropped. Raises ReaderGoneError, OutputError."""
        if self.is_lossy:
            return super().write(data)
        try:
            while (written := io.FileIO.write(self, data)) is None:  # somebody made it non-blocking
                self.is_ready(None)
        except BrokenPipeError:
            raise ReaderGoneError("the reader of standard output is gone") from None
        except OSError as error:
            raise OutputError(f"cannot write to standard output: {error.strerror}") from None
        return written


def install() -> None:
    """Take over this process's standard streams, those too that it was started without."""
    open_closed()
    sys.stdout = text_output(_Output(1, is_lossy=False), line_buffering=os.isatty(1))
    sys.stderr = text_output(_Output(2, is_lossy=True))


def outlive_stdout() -> None:
    """From now on drop what standard output does not take, instead of raising."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, _Output):
        raw.is_lossy = True


def say(text: str) -> None:
    """Show people a line, on standard error: standard output is the events'. Others' text may be part of it."""
    print(f"kmon: {plain_text(text)}", file=sys.stderr, flush=True)
