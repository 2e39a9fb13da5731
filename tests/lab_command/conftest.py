# SPDX-License-Identifier: Apache-2.0
"""Labs as a user makes them, with `kmon lab`. All tests in here need real kernel events, as those in tests/capture do."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from kmonitor.clients.lab.network import NETNS, Identity, identity, is_in
from tests.lab.namespaces import namespaces_lack
from tests.lab.requires import capture_lack, need
from tests.lab.services import Done, Lab

HERE = Path(__file__).parent
LIMIT = 50.0
"""Seconds that a command may take on a busy machine."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.capture)


class Made:
    """A lab that is up, and its commands."""

    def __init__(self, lab: Lab, name: str, *options: str) -> None:
        self._lab = lab
        self.name = name
        self.up = self.run("up", *options)
        self.broker = self.up.stdout.strip().removeprefix("export KMONITOR_BROKER=")

    def run(self, command: str, *words: str) -> Done:
        """`kmon lab COMMAND --name NAME WORDS...` to its end."""
        return self._lab.run("kmon", "lab", command, "--name", self.name, *words, limit=LIMIT)

    def done(self, command: str, *words: str) -> str:
        """The same; what it prints. It must end with 0, and have nothing to complain about."""
        done = self.run(command, *words)
        assert (done.code, done.stderr) == (0, ""), done
        return done.stdout

    def status(self) -> dict[str, dict[str, Any]]:
        """Node -> what `kmon lab status --json` says of it."""
        return {line["node"]: line for line in map(json.loads, self.done("status", "--json").splitlines())}

    def states(self) -> dict[str, str]:
        """Node -> state."""
        return {node: line["state"] for node, line in self.status().items()}


def namespaces(name: str) -> list[str]:
    """Of a lab, those that have names."""
    folder = Path("/run/netns")
    return sorted(entry.name for entry in folder.iterdir() if entry.name.startswith(f"kmlab-{name}-")) if folder.is_dir() else []


def identities(name: str) -> list[Identity]:
    """Of its namespaces: processes may be in them when they have no names any more."""
    return [found for namespace in namespaces(name) if (found := identity(NETNS / namespace)) is not None]


def rest(name: str, were: list[Identity] = []) -> list[str]:  # noqa: B006 -- it is not changed
    """What there is of a lab. `were` are the `identities` from before its end."""
    mounts = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    found = [*namespaces(name), *(line for line in mounts if f"kmlab-{name}-" in line or f"kmonitor-lab/{name}/" in line)]
    if Path("/run/kmonitor-lab", name).exists():
        found.append("its folder")
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes()
                if f"kmlab-{name}-".encode() in words or f"lab={name}\0".encode() in words or any(is_in(int(entry.name), n) for n in were):
                    found.append(f"process {entry.name}: {words!r}")
    return found


Maker = Callable[..., AbstractContextManager[Made]]


@pytest.fixture(scope="session")
def make_lab() -> Maker:
    """Makes a lab with a name of this run's; nothing is left of it at the end."""
    need(capture_lack, namespaces_lack)

    @contextlib.contextmanager
    def make(suffix: str, *options: str) -> Iterator[Made]:
        name = f"t{os.getpid()}{suffix}"
        lab = Lab(Path("/nowhere"))  # pins are the nodes' own
        try:
            made = Made(lab, name, *options)
            try:
                assert made.up.code == 0, made.up
                yield made
            finally:
                were = identities(name)
                made.done("down")
                assert rest(name, were) == []
        finally:
            lab.close()

    return make
