# SPDX-License-Identifier: Apache-2.0
"""A process of a test: its lines of output as they come, all waits with a limit, and an end that leaves nothing."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

END_LIMIT = 15.0
"""Seconds that a command may take to stop."""


class LabError(AssertionError):
    """A process did not do what the test needs of it. Carries what it printed."""


class Running:
    """A started process. A thread of its own takes its standard output, so that it never waits for the test.

    Standard output is kept as lines of bytes, standard error as a file. `stop` must be called (the lab does).
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        own_group: bool = False,
    ) -> None:
        self.name = name
        self.lines: list[bytes] = []
        self._news = threading.Condition()
        self._closed = False
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by stop()
        self.process = subprocess.Popen(
            [os.fspath(word) for word in argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=None if env is None else {**os.environ, **env},
            cwd=cwd,
            process_group=0 if own_group else None,
        )
        self._reader = threading.Thread(target=self._read, name=f"stdout of {name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Of the process itself."""
        return self.process.pid

    def _read(self) -> None:
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        rest = b""
        while chunk := os.read(fd, 1 << 20):
            *whole, rest = (rest + chunk).split(b"\n")
            if whole:
                with self._news:
                    self.lines.extend(whole)
                    self._news.notify_all()
        with self._news:
            if rest:
                self.lines.append(rest)
            self._closed = True
            self._news.notify_all()

    def wait_line(self, wanted: Callable[[bytes], bool], what: str, *, limit: float = 20.0, start: int = 0) -> int:
        """The index of the first line from `start` on that is `wanted`. LabError if the output ends or the time is up first."""
        until = time.monotonic() + limit
        at = start
        with self._news:
            while True:
                while at < len(self.lines):
                    if wanted(self.lines[at]):
                        return at
                    at += 1
                left = until - time.monotonic()
                if self._closed or left <= 0:
                    why = "ended" if self._closed else f"said nothing of it in {limit:g} s"
                    raise self.failure(f"waited for {what}; it {why}")
                self._news.wait(left)

    def wait_closed(self, limit: float = 30.0) -> None:
        """Until nobody has its standard output any more: neither it nor what it started."""
        self._reader.join(limit)
        if self._reader.is_alive():
            raise self.failure(f"its output did not end in {limit:g} s")

    def wait(self, limit: float = END_LIMIT) -> int:
        """Its return code, as subprocess has it: negative for a signal."""
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise self.failure(f"did not end in {limit:g} s") from None

    def say(self, text: str) -> None:
        """Write a line to its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def close_input(self) -> None:
        """The end of its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def stderr_text(self) -> str:
        """What it has written to standard error so far."""
        if self._stderr.closed:
            return self._stderr_at_end
        # pread: the descriptor's own position is the one that the process writes at.
        fd = self._stderr.fileno()
        return os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")

    _stderr_at_end = ""

    def wait_stderr(self, pattern: str, limit: float = 20.0) -> str:
        """Until standard error has something that matches; the match. It is a file, of which nobody is told."""
        until = time.monotonic() + limit
        while not (found := re.search(pattern, self.stderr_text())):
            if time.monotonic() > until:
                raise self.failure(f"said nothing like {pattern!r} in {limit:g} s")
            time.sleep(0.01)
        return found[0]

    def failure(self, what: str) -> LabError:
        """An error that shows the process's last words."""
        tail = b"\n".join(self.lines[-8:]).decode(errors="replace")
        state = self.process.poll()
        return LabError(
            f"{self.name} (pid {self.pid}, returncode {state}): {what}\n-- stdout ends:\n{tail}\n-- stderr:\n{self.stderr_text()}"
        )

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, if it still runs."""
        self.process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM, limit: float = END_LIMIT) -> int:
        """End it, and give back all that it holds here. Its return code; LabError if it had to be killed."""
        late = False
        if self.process.poll() is None:
            self.send(number)
            try:
                self.process.wait(limit)
            except subprocess.TimeoutExpired:
                late = True
                self.process.kill()
                self.process.wait()
        failure = self.failure(f"did not stop in {limit:g} s after {number.name}") if late else None
        self._release()
        if failure:
            raise failure
        return self.process.returncode

    def _release(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if not self._stderr.closed:
            self._stderr_at_end = self.stderr_text()
            self._stderr.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        # Something that it started may hold its output open: then the thread is left to that one's end.
        self._reader.join(5)
        if not self._reader.is_alive():
            self.process.stdout.close()
