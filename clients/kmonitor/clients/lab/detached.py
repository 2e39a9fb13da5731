# SPDX-License-Identifier: Apache-2.0
"""Programs that outlive the command that starts them, and what they say in their logs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kmonitor.clients.lab.processes import Process
from kmonitor.wire.errors import KmonitorError, UsageError

_LOOK_S = 0.01
PATIENCE_S = 10.0


class Impatience:
    """Says what is waited for, when that takes long, and again each time that it has taken twice as long."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._began = time.monotonic()
        self._next = PATIENCE_S

    def waits(self, what: str, said: str = "") -> None:
        """It still does. `said`: the last words of what is waited for."""
        if time.monotonic() - self._began > self._next:
            self._next *= 2
            self._tell(f"still waiting for {what} (Ctrl-C ends it){f'; it said last: {said}' if said else ''}")


class Started:
    """One that was started just now."""

    def __init__(self, name: str, command: Sequence[str | Path], log: Path) -> None:
        """In a session of its own, with no input, and its output at the end of a file. Raises KmonitorError."""
        self.name = name
        self._log = log
        self._from = log.stat().st_size if log.exists() else 0
        words = [os.fspath(word) for word in command]
        append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.fspath(log), append, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        try:
            pid = os.posix_spawnp(words[0], words, os.environ, file_actions=actions, setsid=True)
        except OSError as error:
            raise KmonitorError(f"cannot start {words[0]}: {error.strerror}") from None
        self.process = Process.of(pid) or Process(pid, 0)  # the latter has ended, and the kernel was told not to keep such for us

    def wait_said(self, word: str, tell: Callable[[str], None]) -> str:
        """Until a line with this word comes; the line. UsageError with its last words if it ends. `tell` is given a line for people when
        it takes long."""
        impatience = Impatience(tell)
        while True:
            ended = not self.process.state  # asked before: what it said last is there then
            lines = self._lines()
            for line in lines:
                if word in line:
                    return line
            if ended:
                raise UsageError(f"{self.name} ended: {lines[-1] if lines else 'it said nothing'}")
            impatience.waits(f"{self.name} to get ready", lines[-1] if lines else "")
            time.sleep(_LOOK_S)  # nobody tells of a file's growth but inotify, which is more than this is worth

    def _lines(self) -> list[str]:
        with self._log.open("rb") as file:
            file.seek(self._from)
            whole, _, _ = file.read().rpartition(b"\n")
        return [line.strip() for line in whole.decode(errors="replace").splitlines() if line.strip()]
