# SPDX-License-Identifier: Apache-2.0
"""An agent that is told to capture with another source than the one that is pinned replaces it, as at an upgrade: it does not refuse to
start for ever."""

from __future__ import annotations

import subprocess

import pytest

from tests.lab.connector import connector_lack
from tests.lab.requires import need
from tests.lab.services import Lab

pytestmark = pytest.mark.capture


def child() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sh", "-c", "read line; exit 7"], stdin=subprocess.PIPE)


def end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait(20)


@pytest.mark.parametrize(("before", "after"), [("core", "bcc"), ("bcc", "core"), ("core", "netlink")])
def test_it_brings_home_what_the_other_has_recorded(lab: Lab, before: str, after: str) -> None:
    if after == "netlink":
        need(connector_lack)
    broker = lab.broker()
    agent = lab.agent("other", broker.address, source=before, pin=True)
    with child() as early, child() as late:
        watch = lab.watch(broker.address, "--node", "other", "--pid", str(early.pid), "--pid", str(late.pid), "--events", "exit")
        watch.wait_registered(2, "RUNNING")
        lab.kill(agent)
        end(early)  # no agent runs: the probe has it
        agent = lab.agent("other", broker.address, source=after, pin=True)
        assert [node["source"] for node in lab.json_lines("nodes", "--json", "--broker", broker.address)] == [after]
        watch.wait_end_of(early.pid)
        # A start time is not the same number for both: nobody is told of a death, and nobody waits for what will not come.
        watch.wait_for(lambda line: line["kind"] == "registered" and bool(line["error"]), "that it is to be registered anew")
        again = lab.watch(broker.address, "--node", "other", "--pid", str(late.pid), "--events", "exit")
        again.wait_registered(1, "RUNNING")
        end(late)
        again.wait_end_of(late.pid)
        lab.expect(again, 0)
        lab.stop(watch)
        told = [(line["pid"], line["exit_code"], line["inferred"]) for seen in (watch, again) for line in seen.events()]
        assert told == [(early.pid, 7, False), (late.pid, 7, False)]
        assert "EXITED" not in [line["state"] for line in watch.of_kind("registered")]
    assert f"the pinned probe is one of source {before}: the broker at" in agent.stderr_text()
    lab.stop(agent)
    folder = lab.pins / "other@host@v1"
    assert folder.exists() == (after != "netlink")
    if folder.exists():
        assert (folder / "prog_kmonitor_tasks").exists() == (after == "core")
