# SPDX-License-Identifier: Apache-2.0
"""Where and with what it was measured."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path


def facts() -> dict[str, str]:
    """Name -> value, for the head of a report."""
    found = {
        "date": datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "kernel": platform.release(),
        "CPU": f"{os.cpu_count()} x {_cpu()}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / (1 << 30):.0f} GiB",
        "system": _system(),
        "Python": platform.python_version(),
    }
    found |= {name: version(name) for name in ("kmonitor", "grpcio", "protobuf", "numpy")}
    found["commit"] = _first_line("git", "describe", "--always", "--dirty") or "unknown"
    for command, argument in (("forkstat", "-h"), ("bpftrace", "--version"), ("nats-server", "--version")):
        said = _first_line(command, argument)
        if said:
            found[command] = re.sub(r"^\D*", "", said)
    return found


def _cpu() -> str:
    names = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return names[1] if names else platform.machine()


def _system() -> str:
    said = platform.freedesktop_os_release()
    return said.get("PRETTY_NAME", said["NAME"])


def _first_line(command: str, *arguments: str) -> str:
    if shutil.which(command) is None:
        return ""
    done = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip().partition("\n")[0]
