# SPDX-License-Identifier: Apache-2.0
"""The machine's own tools that namespaces are made with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from kmonitor.clients.lab.init import NODE
from kmonitor.wire.errors import KmonitorError, NotAuthorisedError, UsageError

PACKAGES = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}
"""What is needed, and the Debian package that has it."""


def check() -> None:
    """Raises NotAuthorisedError or UsageError if there can be no lab here."""
    if os.geteuid() != 0:
        raise NotAuthorisedError("a lab is made of namespaces, which takes root: run it with sudo")
    if Path(NODE).exists():
        raise UsageError("this is a node of a lab, from which labs cannot be seen: run it on the machine outside")
    missing = [name for name in PACKAGES if shutil.which(name) is None]
    if missing:
        packages = " ".join(dict.fromkeys(PACKAGES[name] for name in missing))
        raise UsageError(f"{' and '.join(missing)} is not on the PATH: install {packages}")


def ip(*words: str) -> str:
    """Run ip(8); what it prints. Raises KmonitorError."""
    try:
        done = subprocess.run(["ip", *words], check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise UsageError("ip is not on the PATH: install iproute2") from None
    if done.returncode != 0:
        raise KmonitorError(f"ip {' '.join(words)}: {' '.join(done.stderr.split())}")
    return done.stdout


def ip_json(*words: str) -> list[dict[str, Any]]:
    """What ip(8) tells as JSON. Raises KmonitorError."""
    found: list[dict[str, Any]] = json.loads(ip("-json", *words) or "[]")
    return found
