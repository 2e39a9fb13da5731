# SPDX-License-Identifier: Apache-2.0
"""gRPC for Node.js, as npm gives it out, and a client that loads our .proto files with it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.lab.process import Running
from tests.lab.requires import Lack, need, skip, tools_lack
from tests.lab.services import Lab

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
INSTALL_LIMIT = 45.0
"""Seconds; below pytest's own limit, so that a registry that hangs is told as what it is."""


class JavaScript(Running):
    """A program of this folder as it runs."""

    def __init__(self, argv: Sequence[str | Path], modules: Path) -> None:
        env = {"KMONITOR_NODE_MODULES": str(modules), "KMONITOR_PROTO": str(ROOT / "proto")}
        super().__init__(Path(argv[0]).name, ["node", *argv], env=env)

    @property
    def notifications(self) -> list[dict[str, Any]]:
        """All so far; the stream's status is the last."""
        return [json.loads(line) for line in self.lines]

    def wait_for(self, kind: str, number: int = 1) -> dict[str, Any]:
        """The notification that is the `number`th of its kind."""
        at = -1
        for _ in range(number):
            at = self.wait_line(lambda line: json.loads(line)["kind"] == kind, f"{number} of kind {kind}", start=at + 1)
        found: dict[str, Any] = json.loads(self.lines[at])
        return found

    def wait_status(self) -> tuple[str, str]:
        """The name and text of the stream's status, after its end."""
        found = self.wait_for("status")
        self.wait_closed()
        if self.wait() != 0:
            raise self.failure("expected exit status 0")
        return found["status"], found["details"]


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """The folder that has them. Kept from run to run below build/, by what package.json asks for."""
    need(partial(tools_lack, Lack.NODE, "node", "npm"))
    package = (HERE / "package.json").read_bytes()
    folder = ROOT / "build" / "interop" / hashlib.sha256(package).hexdigest()[:16]
    if folder.exists():
        return folder
    being_made = folder.with_name(f"{folder.name}.{os.getpid()}")
    being_made.mkdir(parents=True)
    (being_made / "package.json").write_bytes(package)
    try:
        command = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--silent"]
        done = subprocess.run(command, cwd=being_made, check=False, capture_output=True, text=True, timeout=INSTALL_LIMIT)
        if done.returncode == 0:
            being_made.replace(folder)
            return folder
        skip(Lack.NPM_REGISTRY, " ".join((done.stderr or done.stdout).split()))
    except subprocess.TimeoutExpired:
        skip(Lack.NPM_REGISTRY, f"not in {INSTALL_LIMIT:g} s")
    finally:
        shutil.rmtree(being_made, ignore_errors=True)
    raise AssertionError  # skip raises


@pytest.fixture
def javascript(lab: Lab, node_modules: Path) -> Callable[..., JavaScript]:
    """Starts a program of this folder: its name, then its arguments."""

    def start(program: str, *arguments: str) -> JavaScript:
        return lab.keep(JavaScript([HERE / program, *arguments], node_modules))

    return start
