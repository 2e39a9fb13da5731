# SPDX-License-Identifier: Apache-2.0
"""What is written down of a lab, for the commands that come after the one that made it: /run/kmonitor-lab/NAME.

What can be seen is not written down: whether a link is up and a process lives is asked of the kernel. A folder that is damaged or gone
is no obstacle to the lab's end, since all of a lab is found by its name.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kmonitor.clients.lab.detached import Impatience
from kmonitor.clients.lab.processes import Process
from kmonitor.wire.errors import KmonitorError, UsageError

BASE = Path("/run/kmonitor-lab")
_NAME = re.compile(r"[a-z][a-z0-9]{0,19}")
_FILE = "lab.json"


@dataclass
class State:
    """Of one lab."""

    lease: str
    workload: bool
    addresses: dict[str, str] = field(default_factory=dict)
    """Of the nodes, which are in the order of their making."""
    broker: str = ""
    """Where this machine reaches it, HOST:PORT. Empty until the lab is up."""
    processes: dict[str, Process] = field(default_factory=dict)
    """As this machine has them: "broker"; "relay", its port here; "NODE init", process 1 of a node; "NODE agent"."""

    def alive(self, name: str) -> Process | None:
        """One of `processes`, if it has not ended."""
        process = self.processes.get(name)
        return process if process is not None and process.state else None


def check_name(name: str) -> str:
    """Raises UsageError unless it can be a lab's, and is told from another one's where names are made of it."""
    if _NAME.fullmatch(name) is None:
        raise UsageError(f"--name {name!r}: take small letters and digits, at most 20, a letter first")
    return name


def names() -> list[str]:
    """Of the labs that have a folder."""
    return sorted(entry.name for entry in BASE.iterdir() if entry.is_dir()) if BASE.is_dir() else []


class Folder:
    """Where it is kept, beside the logs of broker and nodes."""

    def __init__(self, name: str) -> None:
        self.path = BASE / name

    def load(self) -> State | None:
        """What was saved last; None if nothing was, or nobody can read it."""
        try:
            found = json.loads((self.path / _FILE).read_text(encoding="utf-8"))
            found["processes"] = {name: Process(**process) for name, process in found["processes"].items()}
            return State(**found)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def save(self, state: State) -> None:
        """At once and as a whole: one who reads sees the old or the new."""
        new = self.path / f"{_FILE}.new"
        new.write_text(json.dumps(asdict(state)), encoding="utf-8")
        new.rename(self.path / _FILE)

    def log(self, name: str) -> Path:
        """Of the broker, or of a node."""
        return self.path / f"{name}.log"

    def make(self) -> None:
        """For root only: there are command lines in the broker's log."""
        self.path.mkdir(mode=0o700)

    def remove(self) -> None:
        """If it is there; and what it was in, if that was the last."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self.path.exists():
            raise KmonitorError(f"cannot remove {self.path}: remove it by hand")
        with contextlib.suppress(OSError):
            BASE.rmdir()


@contextlib.contextmanager
def locked(tell: Callable[[str], None]) -> Iterator[None]:
    """Within, nobody else changes a lab: one lock for all of them, so that no two choose the same addresses. `tell` is given a line for
    people when it takes long to get."""
    descriptor = _open_locked(tell)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            BASE.rmdir()  # unless there is a lab in it
        os.close(descriptor)


def _open_locked(tell: Callable[[str], None]) -> int:
    impatience = Impatience(tell)
    while True:
        with contextlib.suppress(FileNotFoundError):  # the last lab went in this moment
            BASE.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(BASE, os.O_RDONLY | os.O_DIRECTORY)
            if _lock(descriptor):
                return descriptor
            os.close(descriptor)
        impatience.waits(f"another kmon lab, which is at work (fuser {BASE} tells which)")
        time.sleep(0.02)  # flock(2) cannot wait and say so meanwhile


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(descriptor).st_ino == BASE.stat().st_ino  # not one that was removed meanwhile
    except OSError:
        return False
