# SPDX-License-Identifier: Apache-2.0
"""`kmon ha pacemaker` on a real cluster of two nodes. What it told Pacemaker is counted in the logs of Pacemaker's controllers.

The resources are monitored once a minute: whatever is noticed within seconds was noticed by kmonitor.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kmonitor.clients.lab.tools import ip
from tests.ha.stage import BROKER, Stage
from tests.lab.control_groups import Group, control_group, hierarchy_lack
from tests.lab.namespaces import HUB, namespaces_lack, network
from tests.lab.pacemaker import PacemakerCluster, pacemaker_lack, primitive
from tests.lab.process import LabError
from tests.lab.requires import capture_lack, need
from tests.lab.services import BIN, Lab

pytestmark = [pytest.mark.capture, pytest.mark.timeout(120)]

ROUNDS = int(os.environ.get("KMONITOR_HA_ROUNDS", "2"))
"""How often the scenes that hunt a race are played."""
MINUTE = "60s"
LIKES = {"web": "alpha", "grouped": "alpha", "any": "beta", "slow": "beta"}
"""Resource -> the node that it is on unless it is told otherwise."""


@pytest.fixture(scope="module")
def stage(pins: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A cluster with resources, all guarded."""
    need(capture_lack, namespaces_lack, pacemaker_lack, hierarchy_lack)
    with control_group() as group, network() as net:
        lab = Lab(pins)
        try:
            folder = tmp_path_factory.mktemp("pacemaker")
            rules = folder / "rules.toml"
            rules.write_text(f'[resource.grouped]\ncgroup = "{group.path}"\ncomm = "sl*p"\n', encoding="utf-8")
            made = Stage(lab, net, folder, f"--config={rules}", "--attribute")
            _resources(made.cluster, group)
            for resource, node in LIKES.items():
                made.cluster.wait_active(resource, node)
            made.start_tool()
            for resource, node in LIKES.items():
                made.settled(resource, node)
            yield made
            made.stop_tool()
            made.cluster.close()
        finally:
            lab.close()


def _resources(cluster: PacemakerCluster, group: Group) -> None:
    daemon = {"journal": "/run/journal"}
    cluster.configure("resources", primitive("web", "kmonitor:daemon", {**daemon, "pidfile": "/run/web.pid"}, interval=MINUTE))
    sleeper = {"binfile": "/usr/bin/sleep", "cmdline_options": "1000000", "pidfile": "/run/any.pid"}
    cluster.configure("resources", primitive("any", "heartbeat:anything", sleeper, interval=MINUTE))
    slow = {**daemon, "pidfile": "/run/slow.pid", "start_takes": "0.5", "stop_takes": "0.5", "helper": "yes"}
    cluster.configure("resources", primitive("slow", "kmonitor:daemon", slow, interval=MINUTE))
    grouped = {**daemon, "pidfile": "/run/grouped.pid", "cgroup": str(group.folder)}
    cluster.configure("resources", primitive("grouped", "kmonitor:daemon", grouped, interval=MINUTE))
    for resource, node in LIKES.items():
        cluster.configure("constraints", f'<rsc_location id="{resource}-likes" rsc="{resource}" node="{node}" score="100"/>')


def _meta(stage: Stage, resource: str, name: str, value: str) -> None:
    what = ("--set-parameter", name, "--parameter-value", value) if value else ("--delete-parameter", name)
    stage.cluster.nodes[0].do("crm_resource", "--resource", resource, "--meta", *what)


# ---- deaths


@pytest.mark.parametrize(("resource", "node"), [("web", "alpha"), ("any", "beta"), ("grouped", "alpha")])
def test_killed(stage: Stage, resource: str, node: str) -> None:
    """It is told once, with its cause, and there is a new process."""
    before, start = stage.settled(resource, node), stage.tool.now
    with stage.failing(resource, 1):
        stage.signal(resource, node)
        outcome = stage.tool.next("outcome", resource, start)
        assert (outcome["action"], outcome["node"], outcome["pid"], outcome["exit_signal"]) == ("failed", node, before, 9), outcome
        assert outcome["killed_by"]["comm"] == "sh"
        assert stage.settled(resource, node) != before
    attributes = stage.cluster.nodes[0].do("attrd_updater", "--query", "--all", "--name", f"kmonitor-{resource}")
    assert f"({before}) killed by SIGKILL from pid" in attributes


def test_dies_again_and_again(stage: Stage) -> None:
    """As soon as the cluster is idle the next one is killed too."""
    stage.settled("web", "alpha")
    with stage.failing("web", 3):
        for _ in range(3):
            start = stage.tool.now
            before = stage.signal("web", "alpha", signal.SIGTERM)
            stage.tool.next("outcome", "web", start, action="failed", pid=before, exit_signal=15)
            stage.settled("web", "alpha")


def test_dies_right_after_a_start_elsewhere(stage: Stage) -> None:
    """Before the guard may have come there: it is found, and not first by the monitor of the next minute."""
    before = stage.settled("web", "alpha")
    beta = stage.cluster["beta"]
    killer = beta.command("sh", "-c", "until [ -s /run/web.pid ]; do sleep 0.01; done; sleep 0.3; kill -9 $(cat /run/web.pid)")
    began = time.monotonic()
    stage.cluster.nodes[0].do("crm_resource", "--move", "--resource", "web", "--node", "beta")
    try:
        killer.wait(30)
        first = stage.pid("web", "beta")
        try:
            stage.cluster.nodes[0].until(lambda: _other(stage, "web", "beta", first), "a new process", 20)
        except LabError:
            raise stage.tool.running.failure(f"the end of {first} was not told") from None
        assert time.monotonic() - began < 30
        stage.settled("web", "beta")
    finally:
        stage.cluster.nodes[0].do("crm_resource", "--clear", "--resource", "web")
    assert stage.settled("web", "alpha") != before


# ---- what the cluster does


def test_stopped_and_started(stage: Stage) -> None:
    """By target-role."""
    for _ in range(ROUNDS):
        before, start = stage.settled("web", "alpha"), stage.tool.now
        with stage.failing("web", 0):
            _meta(stage, "web", "target-role", "Stopped")
            assert stage.tool.next("outcome", "web", start, pid=before)["action"] == "left"
            stage.cluster.wait_active("web")
            _meta(stage, "web", "target-role", "")
            stage.settled("web", "alpha")


def test_moved_and_killed_there(stage: Stage) -> None:
    """It is guarded where it is."""
    before, start = stage.settled("web", "alpha"), stage.tool.now
    with stage.failing("web", 1):
        stage.cluster.nodes[0].do("crm_resource", "--move", "--resource", "web", "--node", "beta")
        assert stage.tool.next("outcome", "web", start, pid=before)["action"] == "left"
        there, start = stage.settled("web", "beta"), stage.tool.now
        stage.signal("web", "beta")
        assert stage.tool.next("outcome", "web", start, pid=there)["action"] == "failed"
        stage.settled("web", "beta")
        stage.cluster.nodes[0].do("crm_resource", "--clear", "--resource", "web")
        stage.settled("web", "alpha")


@pytest.mark.parametrize("resource", ["web", "slow"])
def test_restarted(stage: Stage, resource: str) -> None:
    """By crm_resource --restart; of `slow` a helper dies in the middle of the start, whose pid the pidfile had."""
    node = "alpha" if resource == "web" else "beta"
    for _ in range(ROUNDS):
        before = stage.settled(resource, node)
        with stage.failing(resource, 0):
            stage.cluster.nodes[0].do("crm_resource", "--restart", "--resource", resource)
            assert stage.settled(resource, node) != before


def test_restarted_for_a_parameter(stage: Stage) -> None:
    """A change of the configuration, without any word of a stop in it."""
    for number in range(ROUNDS):
        before = stage.settled("web", "alpha")
        with stage.failing("web", 0):
            stage.cluster.nodes[0].do(
                "crm_resource", "--resource", "web", "--set-parameter", "start_takes", "--parameter-value", f"0.0{number + 1}"
            )
            stage.cluster.nodes[0].until(lambda old=before: _other(stage, "web", "alpha", old), "a new process")  # type: ignore[misc]
            stage.settled("web", "alpha")


def _other(stage: Stage, resource: str, node: str, before: int) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return stage.pid(resource, node) != before
    return False


def test_standby(stage: Stage) -> None:
    """All of the node is stopped, and comes back."""
    stage.settled("web", "alpha")
    first = stage.cluster.nodes[0]
    with stage.failing("web", 0), stage.failing("any", 0), stage.failing("slow", 0):
        first.do("crm_attribute", "--node", "beta", "--name", "standby", "--update", "on")
        for resource in ("any", "slow"):
            stage.settled(resource, "alpha")
        first.do("crm_attribute", "--node", "beta", "--name", "standby", "--delete")
        for resource in ("any", "slow"):
            stage.settled(resource, "beta")


# ---- what others do


@pytest.mark.parametrize("how", ["maintenance-mode", "unmanaged"])
def test_hands_off(stage: Stage, how: str) -> None:
    """Killed while the cluster does not look after it, and started again by hand: later it is guarded as before."""
    before, start = stage.settled("web", "alpha"), stage.tool.now
    first = stage.cluster.nodes[0]
    with stage.failing("web", 1):
        if how == "unmanaged":
            _meta(stage, "web", "is-managed", "false")
        else:
            first.do("crm_attribute", "--name", how, "--update", "true")
        stage.signal("web", "alpha")
        outcome = stage.tool.next("outcome", "web", start, pid=before)
        assert (outcome["action"], outcome["killed_by"]["comm"]) == ("left", "sh"), outcome
        by_hand = _start_by_hand(stage, "web", "alpha")
        if how == "unmanaged":
            _meta(stage, "web", "is-managed", "")
        else:
            first.do("crm_attribute", "--name", how, "--delete")
        assert stage.settled("web", "alpha") == by_hand
        start = stage.tool.now
        stage.signal("web", "alpha")
        assert stage.tool.next("outcome", "web", start, pid=by_hand)["action"] == "failed"
        stage.settled("web", "alpha")


def _start_by_hand(stage: Stage, resource: str, node: str, kill: bool = False, after: float = 0) -> int:
    """As an administrator would, who takes his time (`after`, seconds); the pid. The shell stays, to wait for it."""
    pidfile = f"/run/{resource}.pid"
    killing = f"kill -9 $(cat {pidfile}); sleep {after}; " if kill else ""
    command = f"{killing}sleep 1000000 </dev/null >/dev/null 2>&1 & echo $! > {pidfile}.new; mv {pidfile}.new {pidfile}; echo $!; wait"
    shell = stage.cluster[node].command("sh", "-c", command)
    return int(shell.lines[shell.wait_line(lambda line: line.strip().isdigit(), "its pid")])


def test_restarted_by_somebody_else(stage: Stage) -> None:
    """Within milliseconds, and the pidfile names the new one."""
    for _ in range(ROUNDS):
        before, start = stage.settled("web", "alpha"), stage.tool.now
        with stage.failing("web", 0):
            by_hand = _start_by_hand(stage, "web", "alpha", kill=True)
            outcome = stage.tool.next("outcome", "web", start, pid=before)
            assert (outcome["action"], str(by_hand) in outcome["reason"]) == ("left", True), outcome
            assert stage.settled("web", "alpha") == by_hand


def test_its_pid_is_given_again(stage: Stage) -> None:
    """A stranger with the pid of the dead is not the resource; and the next one is guarded although the stranger lives."""
    before, start = stage.settled("web", "alpha"), stage.tool.now
    machine = stage.cluster["alpha"].machine
    with stage.failing("web", 1):
        stage.cluster["alpha"].do("sh", "-c", f"kill -9 {before}; until ! kill -0 {before} 2>/dev/null; do :; done")
        stranger = machine.idler(stage.lab, before)
        assert stranger.pid == before
        stage.tool.next("outcome", "web", start, pid=before, action="failed")
        stage.settled("web", "alpha")
    stage.lab.kill(stranger)  # unless the agent's stop has taken it for its own process


# ---- what happens to kmonitor itself


def test_broker_restarts_in_the_middle(stage: Stage) -> None:
    """It is told when the next broker is there."""
    before, start = stage.settled("web", "alpha"), stage.tool.now
    with stage.failing("web", 1):
        stage.lab.kill(stage.broker)
        stage.signal("web", "alpha")
        stage.broker = stage.start_broker()
        outcome = stage.tool.next("outcome", "web", start, pid=before, limit=40)
        assert (outcome["action"], outcome["exit_signal"]) == ("failed", 9), outcome["reason"]
        stage.settled("web", "alpha")


def test_agent_killed_at_the_moment_of_death(stage: Stage) -> None:
    """The next agent tells it from the ring."""
    before, start = stage.settled("any", "beta"), stage.tool.now
    with stage.failing("any", 1):
        stage.lab.kill(stage.agents["beta"])
        stage.signal("any", "beta")
        stage.agents["beta"] = stage.start_agent(stage.cluster["beta"])
        outcome = stage.tool.next("outcome", "any", start, pid=before, limit=40)
        assert (outcome["action"], outcome["exit_signal"]) == ("failed", 9), outcome["reason"]
        stage.settled("any", "beta")


@contextlib.contextmanager
def _cut_off(stage: Stage, node: str) -> Iterator[None]:
    """From the broker, not from the cluster."""
    namespace = stage.cluster[node].machine.namespace
    ip("-n", namespace, "route", "add", "blackhole", f"{HUB}/32")
    try:
        yield
    finally:
        ip("-n", namespace, "route", "del", "blackhole", f"{HUB}/32")


def test_node_cut_off_from_the_broker(stage: Stage) -> None:
    """Not from the cluster. That it is not heard is no death; one that happens meanwhile is told afterwards."""
    before, start = stage.settled("any", "beta"), stage.tool.now
    with _cut_off(stage, "beta"):
        with stage.failing("any", 0), stage.failing("slow", 0):
            assert stage.tool.next("note", "any", start, blind="unreachable")
        killed = stage.signal("any", "beta")
        assert killed == before
    with stage.failing("any", 1):
        stage.tool.next("outcome", "any", start, pid=before, action="failed", limit=40)
        stage.settled("any", "beta")
    assert stage.settled("slow", "beta")


# ---- in the end


def test_the_books(stage: Stage) -> None:
    """Over all scenes: what the tool says that it told is what Pacemaker was told."""
    for resource in LIKES:
        told = [each for each in stage.tool.said("outcome", resource) if each["action"] == "failed"]
        assert len(told) == stage.cluster.failures(resource)
        ends = [(each["node"], each["pid"], each["start_time"]) for each in stage.tool.said("outcome", resource) if "pid" in each]
        assert len(ends) == len(set(ends)), f"{resource}: a death was dealt with twice"
    assert not [each for each in stage.tool.said("outcome", "slow") if each["action"] == "failed"]
    assert "Traceback" not in stage.tool.running.stderr_text()


def test_dead_before_it_was_started(stage: Stage) -> None:
    """What had died before is left to Pacemaker, and said; what comes then is guarded."""
    stage.settled("web", "alpha")
    said = stage.tool
    stage.stop_tool()
    with stage.failing("web", 1):
        killed = stage.signal("web", "alpha")
        start = stage.start_tool().now
        stage.tool.next("guarding", "web", 0, pid=None)
        stage.cluster.nodes[0].do("crm_resource", "--fail", "--resource", "web", "--node", "alpha")
        assert stage.settled("web", "alpha") != killed
        assert not stage.tool.said("outcome", "web", start)
    assert "Traceback" not in said.running.stderr_text()


def test_act_on_unreachable(stage: Stage) -> None:
    """Failed once for a stretch in which the node is not heard, and not when it is heard again in time."""
    tool = stage.start_tool_anew("--act-on-unreachable", "3s")
    before, start = stage.settled("any", "beta"), tool.now
    stage.settled("slow", "beta")
    with stage.failing("any", 0), stage.failing("slow", 0):
        with _cut_off(stage, "beta"):
            tool.next("note", "any", start, blind="unreachable")
        tool.next("note", "any", start, blind=None)
        assert stage.settled("any", "beta") == before
        assert not tool.said("outcome", "any", start)
    start = tool.now
    with stage.failing("any", 1), stage.failing("slow", 1):
        with _cut_off(stage, "beta"):
            for resource in ("any", "slow"):
                outcome = tool.next("outcome", resource, start)
                assert outcome["action"] == "failed", outcome
                assert outcome["reason"] == "its node has not been heard for 3 s (--act-on-unreachable)"
            stage.cluster.nodes[0].until(lambda: _other(stage, "any", "beta", before), "a new process", 20)
        assert stage.settled("any", "beta") != before  # guarded: what happened meanwhile has been told
        stage.settled("slow", "beta")
    told = tool.said("outcome", "any", start)
    assert [each["pid"] for each in told] == [before], told
    start = tool.now
    with stage.failing("any", 1):  # a death afterwards is one of its own
        killed = stage.signal("any", "beta")
        assert tool.next("outcome", "any", start, pid=killed)["action"] == "failed"
        stage.settled("any", "beta")


def test_dry_run(stage: Stage) -> None:
    """It says what it would do, and the cluster hears nothing of it."""
    tool = stage.start_tool_anew("--dry-run")
    before, start = stage.settled("web", "alpha"), tool.now
    with stage.failing("web", 0):
        stage.signal("web", "alpha")
        outcome = tool.next("outcome", "web", start)
        assert (outcome["action"], outcome["pid"], outcome["exit_signal"]) == ("would-fail", before, 9), outcome
        assert stage.pid("web", "alpha") == before
        by_hand = _start_by_hand(stage, "web", "alpha")
        assert stage.settled("web", "alpha") == by_hand
    assert len(tool.said("outcome", "web", start)) == 1


def test_grace(stage: Stage) -> None:
    """Who starts it again within the grace may be slow; what nobody starts is failed after it."""
    tool = stage.start_tool_anew("--grace", "2s")
    before, start = stage.settled("web", "alpha"), tool.now
    with stage.failing("web", 0):
        by_hand = _start_by_hand(stage, "web", "alpha", kill=True, after=0.7)
        outcome = tool.next("outcome", "web", start, pid=before)
        assert (outcome["action"], str(by_hand) in outcome["reason"]) == ("left", True), outcome
        assert stage.settled("web", "alpha") == by_hand
    start = tool.now
    with stage.failing("web", 1):
        stage.signal("web", "alpha")
        outcome = tool.next("outcome", "web", start, pid=by_hand)
        assert outcome["action"] == "failed", outcome
        assert outcome["seconds"] >= 2
        stage.settled("web", "alpha")


def test_act_on_inferred(stage: Stage) -> None:
    """An agent without pins is killed, and what ends before the next one is there was seen by nobody."""
    stage.stop_tool()
    beta = stage.cluster["beta"]
    stage.lab.stop(stage.agents["beta"])
    unpinned = stage.agents["beta"] = beta.machine.agent(stage.lab, BROKER)
    tool = stage.start_tool("alpha", "--act-on-inferred")
    before, start = stage.settled("any", "beta"), tool.now
    stage.settled("slow", "beta")
    with stage.failing("any", 1), stage.failing("slow", 0):
        stage.lab.kill(unpinned)
        stage.signal("any", "beta")
        stage.agents["beta"] = stage.start_agent(beta)
        outcome = tool.next("outcome", "any", start, pid=before, limit=40)
        assert (outcome["action"], outcome["inferred"], outcome["exit_signal"]) == ("failed", True, None), outcome
        assert stage.settled("any", "beta") != before


def test_as_a_resource_of_the_cluster(stage: Stage) -> None:
    """By its OCF agent: it does its work, is started again when it dies, and moves."""
    stage.stop_tool()
    first = stage.cluster.nodes[0]
    parameters = {
        "program": str(BIN / "kmon"),
        "broker": BROKER,
        "options": "--attribute",
        "logfile": "/run/kmonitor-pacemaker.log",
        "pidfile": "/run/kmonitor-pacemaker.pid",
    }
    stage.cluster.configure("resources", primitive("kmonitor", "kmonitor:kmonitor-pacemaker", parameters, interval="1s"))
    first.until(lambda: len(stage.cluster.active_on("kmonitor")) == 1, "kmonitor is active")
    [where] = stage.cluster.active_on("kmonitor")
    log, since = stage.cluster[where].file("/run/kmonitor-pacemaker.log"), 0
    for _ in range(2):
        _said_in_log(stage, where, "web on alpha: guarded by pidfile", since)
        before = stage.pid("web", "alpha")
        with stage.failing("web", 1):
            stage.signal("web", "alpha")
            _said_in_log(stage, where, f"sleep ({before}) killed by SIGKILL from pid .*: told Pacemaker that it has failed", since)
            stage.cluster.wait_active("web", "alpha")
        tool = int(stage.cluster[where].file("/run/kmonitor-pacemaker.pid").read_text(encoding="ascii"))
        stage.cluster[where].do("kill", "-9", str(tool))  # Pacemaker finds it within its second
        since = log.stat().st_size
    _said_in_log(stage, where, "ready", since)
    other = next(node.name for node in stage.cluster.nodes if node.name != where)
    first.do("crm_resource", "--move", "--resource", "kmonitor", "--node", other)
    stage.cluster.wait_active("kmonitor", other)
    _said_in_log(stage, other, "ready")
    stage.cluster.wait_idle()
    _meta(stage, "kmonitor", "target-role", "Stopped")
    stage.cluster.wait_active("kmonitor")


def _said_in_log(stage: Stage, node: str, pattern: str, since: int = 0) -> None:
    path = stage.cluster[node].file("/run/kmonitor-pacemaker.log")
    pattern = pattern.replace("(", r"\(").replace(")", r"\)")

    def said() -> bool:
        with contextlib.suppress(OSError):
            return re.search(pattern, path.read_bytes()[since:].decode()) is not None
        return False

    stage.cluster.nodes[0].until(said, f"{pattern!r} in the log on {node}", 30)
