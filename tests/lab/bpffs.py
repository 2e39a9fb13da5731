# SPDX-License-Identifier: Apache-2.0
"""The bpf file system for the time of the tests, and a folder of the test run in it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

MOUNT_POINT = Path("/sys/fs/bpf")


def _is_mounted() -> bool:
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, where, kind, *_ = line.split()
        if Path(where) == MOUNT_POINT and kind == "bpf":
            return True
    return False


def remove_pins(folder: Path) -> None:
    """Unpin all below `folder`, and the folder itself. What nobody else holds is gone then."""
    if not folder.exists():
        return
    for path, folders, files in os.walk(folder, topdown=False):
        for name in files:
            Path(path, name).unlink()
        for name in folders:
            Path(path, name).rmdir()
    folder.rmdir()


@contextlib.contextmanager
def mounted() -> Iterator[Path]:
    """A folder in bpffs for the pins of this run. Unmounts at the end what was not mounted before."""
    was_mounted = _is_mounted()
    if not was_mounted:
        subprocess.run(["mount", "-t", "bpf", "bpf", MOUNT_POINT], check=True)
    folder = MOUNT_POINT / f"kmonitor-test-{os.getpid()}"
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        remove_pins(folder)
        if not was_mounted:
            subprocess.run(["umount", MOUNT_POINT], check=True)
