# SPDX-License-Identifier: Apache-2.0
"""What `kmon lab` refuses, and what is left when it fails half way: nothing."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bad_input.refusal import refused, run_all
from tests.lab.namespaces import namespaces_lack
from tests.lab.privileges import as_nobody, need_another_user
from tests.lab.process import LabError
from tests.lab.requires import capture_lack, need
from tests.lab.services import BIN, Done, Lab
from tests.lab_command.conftest import LIMIT, identities, namespaces, rest

NAME = f"r{os.getpid()}"
FOLDER = Path("/run/kmonitor-lab", NAME)


@pytest.fixture
def name() -> Iterator[str]:
    """Of a lab that the test may leave in any condition: `kmon lab down` must remove it."""
    need(capture_lack, namespaces_lack)
    yield NAME
    own = Lab(Path("/nowhere"))
    were = identities(NAME)
    done = own.run("kmon", "lab", "down", "--name", NAME, limit=LIMIT)
    own.close()
    assert (done.code, done.stdout, done.stderr) == (0, "", ""), done
    assert rest(NAME, were) == []


def until(wanted: Callable[[], object], what: str) -> None:
    """Of things that nobody tells."""
    end = time.monotonic() + LIMIT
    while not wanted():
        if time.monotonic() > end:
            raise LabError(f"waited for {what}")
        time.sleep(0.002)


def test_what_cannot_be_asked_at_all(name: str, lab: Lab, tmp_path: Path) -> None:
    asked = {
        ("status", "--name", name): f"there is no lab {name}",
        ("exec", "--name", name, "a", "true"): f"there is no lab {name}",
        ("up", "--name", "../x"): "--name '../x'",
        ("up", "--name", name, "--nodes", "27"): "from 1 to 26",
        ("up", "--name", name, "--lease", "soon"): "'soon' is not a duration",
    }
    for done, said in zip(run_all(lab, [("kmon", "lab", *words) for words in asked]), asked.values(), strict=True):
        refused(done, 2, said)
    found = shutil.which("ip")
    assert found is not None
    (tmp_path / "ip").symlink_to(found)
    done = lab.run("kmon", "lab", "up", "--name", name, env={"PATH": str(tmp_path)})
    refused(done, 2, "unshare and nsenter is not on the PATH: install util-linux")
    assert rest(name) == []


def test_without_root(lab: Lab) -> None:
    need_another_user()
    refused(lab.run("kmon", "lab", "up", "--name", NAME, prefix=as_nobody()), 4, "takes root")


def other_programs(folder: Path, **scripts: str) -> Path:
    """A kmon beside which there are other programs; what it is called with."""
    kmon = folder / "kmon"
    for program in ("kmonitor-broker", "kmonitor-agent"):
        script = scripts.get(program.removeprefix("kmonitor-"), f'exec {BIN / program} "$@"')
        (folder / program).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (folder / program).chmod(0o755)
    kmon.write_text(f"#!{sys.executable}\nfrom kmonitor.clients.cli import main\nmain()\n", encoding="utf-8")
    kmon.chmod(0o755)
    return kmon


def run(lab: Lab, kmon: Path, *words: str) -> Done:
    """Any program, by its path."""
    return lab.run("env", kmon, *words, limit=LIMIT)


@pytest.mark.parametrize(
    ("scripts", "words"),
    [
        ({"agent": 'echo "kmonitor-agent: error: no luck today" >&2; exit 2'}, ["the agent of node a ended", "error: no luck today"]),
        ({"broker": 'echo "kmonitor-broker: error: no room" >&2; exit 2'}, ["the broker ended", "error: no room"]),
    ],
    ids=["agent", "broker"],
)
def test_a_program_that_fails(name: str, lab: Lab, tmp_path: Path, scripts: dict[str, str], words: list[str]) -> None:
    """Its last words are told, and what was made until then is removed."""
    refused(run(lab, other_programs(tmp_path, **scripts), "lab", "up", "--name", name), 2, *words)
    assert rest(name) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_interrupted(name: str, lab: Lab, tmp_path: Path, number: signal.Signals) -> None:
    """With an agent that never connects, so that it is half made for as long as we like. It removes what it made."""
    kmon = other_programs(tmp_path, agent="exec sleep 1000")
    making = lab.command("env", kmon, "lab", "up", "--name", name)
    until(lambda: (FOLDER / "c.log").exists() and b"ready" in (FOLDER / "c.log").read_bytes(), "node c")
    were = identities(name)
    assert len(were) == 4
    making.send(number)
    making.send(number)  # impatience
    assert making.wait(LIMIT) == 128 + number
    assert making.stderr_text() == ""
    assert rest(name, were) == []


def test_killed_half_way(name: str, lab: Lab, tmp_path: Path) -> None:
    """Nobody can remove then what was made; `down` does, also where its folder is damaged. Until then it is said to be there."""
    kmon = other_programs(tmp_path, agent="exec sleep 1000")
    making = lab.command("env", kmon, "lab", "up", "--name", name)
    until(lambda: len(namespaces(name)) == 3, "two nodes")
    making.send(signal.SIGKILL)
    making.wait()
    refused(lab.run("kmon", "lab", "status", "--name", name), 2, f"kmon lab down --name {name}")
    refused(lab.run("kmon", "lab", "up", "--name", name), 2, f"there is a lab {name} already")
    (FOLDER / "lab.json").write_text("{", encoding="utf-8")
    refused(lab.run("kmon", "lab", "status", "--name", name), 2, f"kmon lab down --name {name}")
