# SPDX-License-Identifier: Apache-2.0
"""Slow is not broken: what takes its time is given it, and what does nothing any more is given up."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import pytest

from kmonitor.agent.errors import CaptureError
from kmonitor.agent.sources import bcc
from kmonitor.v1 import agent_pb2
from tests.agent.fake_broker import FakeBroker
from tests.lab.privileges import as_nobody, need_another_user
from tests.lab.requires import capture_lack, need
from tests.lab.services import Agent, Lab

BUSY = 'import time\nwhile time.process_time() < 1.5: pass\nprint(\'{"version": "1"}\', flush=True)'
IN_A_CHILD = f"import subprocess, sys\nsubprocess.run([sys.executable, '-S', '-c', {BUSY!r}])"
IDLE = "import time\ntime.sleep(100)"


def loader(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """In place of an interpreter with bcc: one that does this, whatever it is told to run. What it does nothing for is half a second."""
    (folder / "script.py").write_text(script)
    interpreter = folder / "python"
    interpreter.write_text(f"#!/bin/sh\nexec {sys.executable} -S {folder / 'script.py'}\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(bcc, "INTERPRETERS", (str(interpreter),))
    monkeypatch.setattr(bcc, "STALL_S", 0.5)


@pytest.mark.parametrize("script", [BUSY, IN_A_CHILD])
def test_a_compiler_that_works_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    loader(tmp_path, monkeypatch, script)
    assert bcc.version() == "1"


def test_one_that_does_nothing_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader(tmp_path, monkeypatch, IDLE)
    with pytest.raises(CaptureError, match=r"^bcc has not done anything for 0\.5 s while it compiled the probe$"):
        bcc.version()


@pytest.mark.capture
def test_bcc_in_a_folder_that_its_user_may_not_enter(lab: Lab) -> None:
    """One that the compiler sees and cannot look into: those above are open to all, as they are not in `tmp_path`."""
    need(capture_lack)
    need_another_user()
    agent = lab.agent_command("", "")[0]
    command = [*as_nobody("bpf", "perfmon"), agent, "--check", "--json"]
    with tempfile.TemporaryDirectory(prefix="kmonitor-test-") as closed:
        done = lab.run("sh", "-c", 'cd "$0" && export PWD && exec "$@"', closed, *command, limit=60)
    lines = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert lines["source bcc"]["works"], lines["source bcc"]


@pytest.mark.capture
def test_a_broker_that_takes_its_time_to_answer(lab: Lab) -> None:
    """Longer than an agent waits for a connection, each time."""
    need(capture_lack)
    broker = FakeBroker()

    def slowly(hello: agent_pb2.Hello) -> None:
        del hello
        time.sleep(6)

    broker.refuse = slowly
    try:
        agent = lab.keep(Agent("slow", lab.agent_command("slow", broker.address)))
        agent.wait_line(lambda text: text.startswith(b"kmonitor-agent: slow is connected"), "its connection", limit=40)
        lab.stop(agent)
    finally:
        broker.close()
