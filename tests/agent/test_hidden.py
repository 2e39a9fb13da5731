# SPDX-License-Identifier: Apache-2.0
"""An agent from which /proc hides other users' processes (proc(5), hidepid=): nothing is taken for gone because it cannot be seen."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from tests.bad_input.refusal import refused
from tests.lab.connector import connector_lack
from tests.lab.privileges import as_nobody, need_another_user
from tests.lab.process import Running
from tests.lab.requires import Lack, capture_lack, need, tools_lack
from tests.lab.services import BIN, Lab

pytestmark = pytest.mark.capture

NOBODY_THERE = "127.0.0.1:1"
ENOUGH = {"core": ("bpf", "perfmon"), "bcc": ("bpf", "perfmon"), "netlink": ("net_admin",)}


@pytest.fixture(autouse=True)
def _needs_another_user() -> None:
    need_another_user()
    need(lambda: tools_lack(Lack.NAMESPACES, "unshare", "nsenter"))


def with_proc(options: str, *capabilities: str) -> list[str]:
    """A prefix: as nobody, with a /proc of one's own."""
    script = f'mount -t proc -o {options} proc /proc && exec "$0" "$@"'
    return ["unshare", "--mount", "sh", "-c", script, *as_nobody(*capabilities)]


def remount(agent: Running, options: str) -> Sequence[str]:
    """The command that mounts an agent's /proc anew."""
    return ["nsenter", "--target", str(agent.pid), "--mount", "mount", "-o", f"remount,{options}", "/proc"]


@pytest.mark.parametrize("hidepid", [1, 2, 4])
def test_netlink_is_refused(lab: Lab, hidepid: int) -> None:
    need(connector_lack)
    words = [*with_proc(f"hidepid={hidepid}", "net_admin"), *lab.agent_command("hidden", NOBODY_THERE, source="netlink")]
    refused(lab.run(*words), 2, "/proc hides other users' processes from this agent (hidepid=", "CAP_SYS_PTRACE")


def test_bcc_is_refused(lab: Lab) -> None:
    need(capture_lack)
    words = [*with_proc("hidepid=2", "bpf", "perfmon"), *lab.agent_command("hidden", NOBODY_THERE, source="bcc")]
    refused(lab.run(*words), 2, "/proc hides other users' processes from this agent (hidepid=", "CAP_SYS_PTRACE")


@pytest.mark.parametrize(
    ("source", "options", "capabilities"),
    [
        ("core", "hidepid=2", ()),  # the kernel's own list of processes
        ("netlink", "hidepid=2", ("sys_ptrace",)),
        ("netlink", "hidepid=2,gid=65534", ()),
    ],
)
def test_who_sees_all_the_same(lab: Lab, source: str, options: str, capabilities: tuple[str, ...]) -> None:
    need(connector_lack if source == "netlink" else capture_lack)
    broker = lab.broker()
    lab.agent("sees", broker.address, source=source, prefix=with_proc(options, *ENOUGH[source], *capabilities))
    process = lab.command("cat")
    watch = lab.watch(broker.address, "--node", "sees", "--pid", str(process.pid), "--events", "exit")
    watch.wait_registered(1, "RUNNING")
    process.close_input()
    watch.wait_end_of(process.pid)
    assert [line["inferred"] for line in watch.events()] == [False]
    lab.stop(watch)


def test_hidden_while_the_agent_runs(lab: Lab) -> None:
    """Who lives is not told as gone, to nobody: neither to who asks now, nor to who had asked before."""
    need(connector_lack)
    broker = lab.broker()
    agent = lab.agent("node", broker.address, source="netlink", prefix=with_proc("hidepid=0", "net_admin"))
    process, other = lab.command("cat"), lab.command("cat")
    to = ("--broker", broker.address, "--node", "node")
    before = lab.watch(broker.address, "--node", "node", "--pid", str(process.pid), "--events", "exit")
    before.wait_registered(1, "RUNNING")
    assert lab.run(*remount(agent, "hidepid=2")).code == 0

    done = lab.run("kmon", "watch", *to, "--pid", str(other.pid), "--for", "10s")
    assert done.code != 0
    assert f"process {other.pid} is there, but /proc hides it from the agent" in done.stderr
    done = lab.run("kmon", "ps", *to)
    assert done.code != 0
    assert "/proc hides other users' processes from this agent (hidepid=" in done.stderr
    assert before.events() == []
    process.close_input()
    before.wait_end_of(process.pid)
    assert [(line["type"], line["inferred"]) for line in before.events()] == [("PROCESS_EXIT", False)]
    lab.stop(before)


@pytest.mark.parametrize("hidepid", [0, 2])
def test_the_doctor_says_so(lab: Lab, hidepid: int) -> None:
    done = lab.run(*with_proc(f"hidepid={hidepid}", "net_admin"), BIN / "kmonitor-agent", "--check", "--json")
    lines = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert lines["/proc"]["status"] == ("warn" if hidepid else "ok")
    assert ("hides other users' processes (hidepid=" in lines["/proc"]["found"]) == bool(hidepid)
    assert lines["source netlink"]["works"] == (not hidepid)
