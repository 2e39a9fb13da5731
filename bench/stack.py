# SPDX-License-Identifier: Apache-2.0
"""Broker and agent of this checkout as processes of their own, for the time of a measurement."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

NODE = "bench"
_BIN = Path(sys.executable).parent


@contextlib.contextmanager
def stack(*agent_options: str, log: str | None = None, pin_root: Path | None = None) -> Iterator[tuple[str, int, int]]:
    """(address of the broker, its pid, the agent's pid). Needs root. `log` is the broker's option; with `pin_root` the agent has pins
    there, and carries on with a probe that it finds there."""
    with contextlib.ExitStack() as running:
        logs = () if log is None else ("--log", log)
        broker = running.enter_context(command("kmonitor-broker", "--listen", "127.0.0.1:0", *logs))
        address = first_line(broker).rsplit(" ", 1)[1]
        pins = ("--no-pin",) if pin_root is None else ("--pin-root", str(pin_root))
        agent = running.enter_context(command("kmonitor-agent", "--broker", address, "--node", NODE, *pins, *agent_options))
        first_line(agent)
        yield address, broker.pid, agent.pid


@contextlib.contextmanager
def command(*argv: str) -> Iterator[subprocess.Popen[str]]:
    """A command of this checkout, which gets SIGTERM in the end."""
    with subprocess.Popen([_BIN / argv[0], *argv[1:]], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def first_line(process: subprocess.Popen[str]) -> str:
    """What it says when it is ready."""
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise SystemExit("bench: it did not start; see above")
    return line


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far (proc(5): stat, in ticks of 10 ms)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100
