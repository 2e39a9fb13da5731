# SPDX-License-Identifier: Apache-2.0
"""What `kmon up --demo` has to show on a quiet machine: a workload of some seconds that ends in the ways in which processes end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

from kmonitor.clients.cli.output import say
from kmonitor.clients.cli.view import Sink
from kmonitor.clients.events import Batch
from kmonitor.clients.notifications import Gap, Notice, Registered
from kmonitor.wire.masks import TYPE_NAMES

_SCRIPT = """\
read go
/bin/true; sleep 0.3
sh -c 'exit 3'; sleep 0.3
"$PYTHON" -S -c 'import ctypes; ctypes.string_at(0)'; sleep 0.3
sleep 60 & kill -TERM $!; wait; sleep 0.3
[ -z "$GROUP" ] || sh -c 'echo $$ > "$GROUP/cgroup.procs" && exec "$PYTHON" -S -c "bytearray(1 << 30)"'
exit 0
"""
_STEPS = "a program that runs, one that fails, a null pointer, a process that is killed"
_MEMORY = 16 << 20
"""Bytes that the group of the last one may have."""


@contextlib.asynccontextmanager
async def workload() -> AsyncIterator[Process]:
    """Start it; it does nothing before its standard input is closed. It is ended with the block."""
    with _small_group() as group:
        also = ", and one that runs out of memory" if group is not None else ""
        say(f"a small workload runs now: {_STEPS}{also}")
        process = await asyncio.create_subprocess_exec(
            *("sh", "-c", f"ulimit -c 0; {_SCRIPT}"),
            env={"PATH": os.defpath, "PYTHON": sys.executable, "GROUP": str(group or "")},
            stdin=PIPE,
            stdout=DEVNULL,
            stderr=DEVNULL,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


@contextlib.contextmanager
def _small_group() -> Iterator[Path | None]:
    """Make a control group with little memory, of either version; None where that cannot be had."""
    for root, limit in ((Path("/sys/fs/cgroup"), "memory.max"), (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes")):
        group = root / f"kmonitor-demo-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if _limit(group / limit):
                yield group
                return
        finally:
            with contextlib.suppress(OSError):
                group.rmdir()
    yield None


def _limit(memory: Path) -> bool:
    """Write a group's limit of memory. Whether it can be."""
    try:
        descriptor = os.open(memory, os.O_WRONLY | os.O_CLOEXEC)  # not made: a group without this controller has no such file
        try:
            os.write(descriptor, b"%d" % _MEMORY)
        finally:
            os.close(descriptor)
    except OSError:
        return False
    with contextlib.suppress(OSError):
        memory.with_name("memory.swap.max").write_text("0", encoding="ascii")
    return True


class Counting:
    """Shows what another sink shows, and counts it."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._counts: Counter[int] = Counter()
        self._gaps = 0
        self.on_armed: Callable[[], None] = lambda: None
        """Called when the kernel is armed for what is shown."""

    def batch(self, batch: Batch, limit: int) -> None:
        """Show the first `limit` events. Raises OutputError."""
        self._counts.update(event.type for event in batch.events[:limit])
        self._sink.batch(batch, limit)

    def notice(self, notice: Notice) -> None:
        """Show anything else. Raises OutputError."""
        self._sink.notice(notice)
        if isinstance(notice, Registered):
            self.on_armed()
        self._gaps += isinstance(notice, Gap)

    def summary(self) -> str:
        """Return one line for people: how many events of which type."""
        shown = ", ".join(f"{count} {TYPE_NAMES[kind].removeprefix('PROCESS_')}" for kind, count in sorted(self._counts.items()))
        missing = "some are missing: see GAP" if self._gaps else "none missing"
        return f"that was {self._counts.total()} events: {shown or 'none'}; {missing}"
