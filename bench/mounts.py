# SPDX-License-Identifier: Apache-2.0
"""File systems of the kernel that a measurement needs, and that a machine without a service manager may not have mounted."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def mounted(kind: str, where: str) -> Iterator[None]:
    """Mount it for the time, if nothing of its kind is there. Raises SystemExit if it cannot be."""
    if _is_mounted(kind, where):
        yield
        return
    done = subprocess.run(["mount", "-t", kind, kind, where], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bench: {done.stderr.strip()}: this needs {kind} on {where}")
    try:
        yield
    finally:
        subprocess.run(["umount", where], check=False)


def _is_mounted(kind: str, where: str) -> bool:
    lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    return any(line.split()[1:3] == [where, kind] for line in lines)
