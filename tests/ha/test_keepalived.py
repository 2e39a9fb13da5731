# SPDX-License-Identifier: Apache-2.0
"""`kmon ha keepalived` and keepalived itself: a pair of balancers, and processes that run on other machines."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import storm
from tests.lab.control_groups import Group, control_group, hierarchy_lack
from tests.lab.keepalived import NOTIFY, VIRTUAL, Balancer, Keepalived, Service, Tool, has_address, keepalived_lack
from tests.lab.namespaces import HUB, Inside, InsideAgent, Machine, namespaces_lack, network
from tests.lab.relay import relay
from tests.lab.requires import capture_lack, need
from tests.lab.services import Broker, Lab
from tests.lab.stopped import stopped
from tests.lab.workload import Programs

pytestmark = pytest.mark.capture

UNIT = Path(__file__).resolve().parents[2] / "deploy/systemd/kmonitor-keepalived.service"
DOCUMENT = UNIT.parents[2] / "docs/ha-keepalived.md"
LATE = ("--file", "/run/kmonitor/late.track", "--when-blind", "down", "--down-value", "5")
LEASE = ("--lease", "2s", "--progress-interval", "200ms")
TRACKS = """\
[[track]]                      # keepalived's
file = "/run/kmonitor/web.track"
processes = [{web1}]
when-blind = "down"
blind-after = "300ms"
up-delay = "400ms"

[[track]]
file = "/run/kmonitor/static.track"
processes = [{web1}]
when-blind = "keep"
blind-after = 0

[[track]]
file = "/run/kmonitor/hasty.track"
processes = [{web2}]
when-blind = "down"
blind-after = 0

[[track]]
file = "/run/kmonitor/two-of-three.track"
processes = [{web1}, {web2}, {web3}]
quorum = 2
when-blind = "keep"
up-value = 7
down-value = -7

[[track]]
file = "/run/kmonitor/group.track"
processes = ["web3:cgroup={group},comm=sleep"]
when-blind = "keep"
"""
WEB, STATIC, HASTY, QUORUM, GROUP = (f"kmonitor/{name}.track" for name in ("web", "static", "hasty", "two-of-three", "group"))


class Site:
    """Machines web1 to web3 with an agent and a process each; balancers lb1 and lb2, of which lb1 goes by the processes."""

    def __init__(
        self, lab: Lab, machines: dict[str, Machine], balancers: list[Balancer], folder: Path, prefix: list[str], group: Group
    ) -> None:
        self.lab = lab
        self.machines = machines
        self.lb1, self.lb2 = balancers
        self.folder = folder
        self.group = group
        self._prefix = prefix
        self._broker: Broker | None = None
        self.address = ""
        self.outside = ""
        """Where the broker is reached from outside of the machines."""
        self.agents: dict[str, InsideAgent] = {}
        self.services = {name: Service(lab, machine, folder) for name, machine in machines.items()}
        self.tool: Tool
        self.keepalived: list[Keepalived]
        self.start_broker()
        for name, service in self.services.items():
            service.start()
            self.start_agent(name, wait=False)
        for agent in self.agents.values():
            agent.wait_connected()
        places = {name: f'"{name}:pidfile={service.pidfile}"' for name, service in self.services.items()}
        self.lb1.path("tracks.toml").write_text(TRACKS.format(**places, group=group.path), encoding="utf-8")
        self.lb2.path("kmonitor/web.track").write_text("0\n", encoding="ascii")

    def start_broker(self) -> None:
        log = ("--log", f"sqlite:{self.folder}/log.db")
        self._broker = self.lab.broker(*LEASE, *log, prefix=self._prefix, listen=self.address or f"{HUB}:0")
        self.address = self._broker.address

    def kill_broker(self) -> None:
        assert self._broker is not None
        self.lab.kill(self._broker)
        self.lab.stop(self._broker)

    def start_agent(self, name: str, *, wait: bool = True) -> None:
        self.agents[name] = self.machines[name].agent(self.lab, self.address, "--ring-size", "64K", wait=wait)

    def kill_agent(self, name: str) -> None:
        self.agents[name].send(signal.SIGKILL)
        self.agents[name].wait()
        self.lab.stop(self.agents[name])

    def start_tool(self) -> None:
        """Until all is well, and lb1 has the address."""
        self.tool = self.lb1.tool("--config", "/run/tracks.toml", "--broker", self.address)
        self.tool.wait_said(r"web\.track: 1 -> 0")
        assert (self.lb1.said(WEB), self.lb1.said(STATIC), self.lb1.said(HASTY), self.lb1.said(QUORUM)) == ("0\n", "0\n", "0\n", "7\n")

    def wait_moved(self, there: Balancer, back: Balancer, state: str) -> int:
        """Until the other one has the address, and only that one. When the first was called with that state."""
        at = back.wait_state(state)
        there.wait_state("MASTER")
        assert has_address(there.machine)
        assert not has_address(back.machine)
        return at

    def wait_back(self) -> None:
        """Until lb1 has it again."""
        self.wait_moved(self.lb1, self.lb2, "BACKUP")


@pytest.fixture(scope="module")
def site(pins: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    need(capture_lack, namespaces_lack, keepalived_lack, hierarchy_lack)
    with network() as net, control_group(f"kmonitor-keepalived-{os.getpid()}") as group:
        lab = Lab(pins)
        try:
            machines = {name: net.machine(lab, name) for name in ("web1", "web2", "web3")}
            balancers = [Balancer(lab, net.machine(lab, name)) for name in ("lb1", "lb2")]
            made = Site(lab, machines, balancers, tmp_path_factory.mktemp("site"), net.prefix, group)
            with relay(net.hub, made.address) as outside:
                made.outside = outside
                made.keepalived = [made.lb1.start(150), made.lb2.start(100)]
                made.lb2.wait_state("MASTER")  # lb1 begins with FAULT, as keepalived's init_file says so
                made.start_tool()
                made.wait_back()
                yield made
        finally:
            lab.close()


def test_a_remote_kill_moves_the_address_and_a_restart_brings_it_back(site: Site) -> None:
    site.services["web1"].kill()
    site.tool.wait_said(r"web1:pidfile=.* has ended: killed by SIGKILL from ")
    site.wait_moved(site.lb2, site.lb1, "FAULT")
    assert site.lb1.said(WEB) == "1\n"
    assert site.lb1.said(STATIC) == "1\n"
    assert site.lb1.said(QUORUM) == "7\n"
    site.services["web1"].start()
    site.tool.wait_said(r"static\.track: 1 -> 0")
    assert site.lb1.said(WEB) == "1\n"  # its delay
    site.wait_back()
    assert site.lb1.said(WEB) == "0\n"


def test_two_of_three(site: Site) -> None:
    site.services["web2"].kill()
    site.tool.wait_said(r"web2:.* has ended")
    site.tool.wait_said(r"hasty\.track: 0 -> 1")
    assert site.lb1.said(QUORUM) == "7\n"
    site.services["web3"].kill()
    site.tool.wait_said(r"two-of-three\.track: 7 -> -7: 1 alive, 2 dead; 2 must be alive")
    assert site.lb1.said(QUORUM) == "-7\n"
    site.services["web2"].start()
    site.tool.wait_said(r"two-of-three\.track: -7 -> 7: 2 alive, 1 dead; 2 must be alive")
    site.services["web3"].start()
    site.tool.wait_said(r"web3:.* is alive")
    assert (site.lb1.said(WEB), site.lb1.said(QUORUM)) == ("0\n", "7\n")


def test_a_control_group(site: Site, lab: Lab) -> None:
    """Alive as long as anything of that name runs in it."""
    machine = site.machines["web3"]
    words = f"echo 0 > {site.group.folder}/cgroup.procs && exec sleep 1000"
    assert site.lb1.said(GROUP) == "1\n"
    first = lab.keep(Inside("first", [*machine.prefix, "--", "sh", "-c", words]))
    site.tool.wait_said(r"group\.track: 1 -> 0: 1 alive")
    second = lab.keep(Inside("second", [*machine.prefix, "--", "sh", "-c", words]))
    site.tool.wait_said(r"web3:cgroup=\S+ is alive: pid \d+, and 1 more")
    lab.kill(first)
    site.tool.wait_said(r"web3:cgroup=\S+ is alive: pid \d+$")
    assert site.lb1.said(GROUP) == "0\n"
    lab.kill(second)
    site.tool.wait_said(r"web3:cgroup=\S+ has ended: killed by SIGKILL")
    site.tool.wait_said(r"group\.track: 0 -> 1: 1 dead")


def test_the_broker_is_killed(site: Site) -> None:
    site.kill_broker()
    site.wait_moved(site.lb2, site.lb1, "FAULT")
    assert (site.lb1.said(WEB), site.lb1.said(STATIC), site.lb1.said(HASTY), site.lb1.said(QUORUM)) == ("1\n", "0\n", "1\n", "7\n")
    site.start_broker()
    site.wait_back()
    assert site.lb1.said(STATIC) == "0\n"


def test_a_process_dies_while_the_broker_is_away(site: Site) -> None:
    site.kill_broker()
    site.tool.wait_said(r"web\.track: 0 -> 1: 1 out of sight for 0.3 s")
    site.services["web1"].kill()
    assert site.lb1.said(STATIC) == "0\n"
    site.start_broker()
    site.tool.wait_said(r"web1:.* has ended: killed by SIGKILL")
    site.tool.wait_said(r"static\.track: 0 -> 1")
    site.services["web1"].start()
    site.lb1.wait_state("FAULT")
    site.lb1.wait_state("MASTER")
    site.lb2.wait_state("MASTER")
    site.lb2.wait_state("BACKUP")


def test_an_agent_is_killed(site: Site) -> None:
    """Without pins: of the time until the next one nothing is known, and it looks."""
    site.kill_agent("web1")
    site.wait_moved(site.lb2, site.lb1, "FAULT")
    assert (site.lb1.said(STATIC), site.lb1.said(QUORUM)) == ("0\n", "7\n")
    site.start_agent("web1")
    site.wait_back()
    site.tool.wait_said(r"web\.track: 0 -> 1: 1 out of sight")
    site.tool.wait_said(r"web\.track: 1 -> 0")
    site.kill_agent("web1")
    site.tool.wait_said(r"web\.track: 0 -> 1: 1 out of sight")
    site.services["web1"].kill()
    site.start_agent("web1")
    assert site.tool.wait_said(r"web1:.* (is alive|has ended: end not seen)")[1] != "is alive"
    site.tool.wait_said(r"static\.track: 0 -> 1")
    site.services["web1"].start()
    site.wait_moved(site.lb2, site.lb1, "FAULT")
    site.wait_back()


def test_a_node_is_cut_off(site: Site) -> None:
    site.machines["web1"].link("down")
    site.wait_moved(site.lb2, site.lb1, "FAULT")
    assert (site.lb1.said(STATIC), site.lb1.said(QUORUM)) == ("0\n", "7\n")
    site.machines["web1"].link("up")
    site.wait_back()


def test_a_ring_runs_full(site: Site, programs: Programs, lab: Lab, tmp_path: Path) -> None:
    """Nobody knows whether it ended in the gap, until the agent has looked."""
    machine = site.machines["web2"]
    folder = tmp_path / "storm"
    folder.mkdir()
    root = machine.workload(lab, tmp_path, programs.storm, "fork", "800", "2", folder)
    wanted = ["--node", "web2", "--pid", str(root.root_pid), "--follow", "--events", "fork,exit"]
    watch = lab.command("kmon", "watch", "--json", "--broker", site.outside, *wanted)
    watch.wait_line(lambda line: b'"RUNNING"' in line, "its registration")
    with stopped(site.agents["web2"]):
        root.say("go")
        storm.read(root, folder)
    watch.wait_line(lambda line: json.loads(line)["kind"] == "gap", "the gap")
    site.tool.wait_said(r"hasty\.track: 0 -> 1: 1 out of sight")
    site.tool.wait_said(r"hasty\.track: 1 -> 0: 1 alive")
    assert site.lb1.said(QUORUM) == "7\n"


def test_its_end_leaves_what_is_right_for_one_who_sees_nothing(site: Site) -> None:
    site.tool.send(signal.SIGTERM)
    assert site.tool.wait() == 143
    site.lab.stop(site.tool)
    site.wait_moved(site.lb2, site.lb1, "FAULT")
    assert (site.lb1.said(WEB), site.lb1.said(STATIC), site.lb1.said(HASTY), site.lb1.said(QUORUM)) == ("1\n", "0\n", "1\n", "7\n")
    site.start_tool()
    site.wait_back()


def test_after_kill_9_the_units_command_does(site: Site) -> None:
    [stop_post] = re.findall(r"^ExecStopPost=/opt/kmonitor/bin/kmon (.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)
    words = stop_post.replace("/etc/kmonitor/keepalived.toml", "/run/tracks.toml").split()
    refused = site.lab.run("kmon", *words, prefix=[*site.lb1.machine.prefix, "--"])
    assert refused.code == 2
    assert "web.track is being written by another kmon ha keepalived" in refused.stderr
    site.tool.send(signal.SIGKILL)
    site.tool.wait()
    site.lab.stop(site.tool)
    assert site.lb1.said(WEB) == "0\n"
    done = site.lab.run("kmon", *words, prefix=[*site.lb1.machine.prefix, "--"])
    assert done.code == 0, done
    site.wait_moved(site.lb2, site.lb1, "FAULT")
    assert (site.lb1.said(WEB), site.lb1.said(STATIC), site.lb1.said(HASTY), site.lb1.said(QUORUM)) == ("1\n", "0\n", "1\n", "7\n")
    site.start_tool()
    site.wait_back()


def test_what_somebody_else_writes_does_not_stay(site: Site) -> None:
    site.lb1.path(WEB).write_text("1\n", encoding="ascii")
    site.tool.wait_said(r"web\.track was changed by somebody else")
    assert site.lb1.said(WEB) == "0\n"
    site.wait_moved(site.lb2, site.lb1, "FAULT")
    site.wait_back()
    site.lb1.path(STATIC).unlink()
    site.tool.wait_said(r"static\.track was changed by somebody else")
    assert site.lb1.said(STATIC) == "0\n"


def test_a_file_that_cannot_be_written_ends_it(site: Site) -> None:
    site.lb1.machine.do("mount --bind /run/kmonitor /run/kmonitor && mount -o remount,bind,ro /run/kmonitor")
    site.services["web1"].kill()
    assert site.tool.wait() == 2
    assert re.fullmatch(r"kmon: cannot write /run/kmonitor/\S+\.track: Read-only file system; .*", site.tool.stderr_text().splitlines()[-1])
    assert "Traceback" not in site.tool.stderr_text()
    site.lab.stop(site.tool)
    site.lb1.machine.do("umount /run/kmonitor")
    assert site.lb1.said(WEB) == "0\n"  # as it was: that is why it ended with a status
    site.services["web1"].start()
    site.start_tool()
    site.wait_moved(site.lb2, site.lb1, "FAULT")
    site.wait_back()


def test_a_weight_lowers_the_priority(site: Site) -> None:
    site.lab.stop(site.keepalived[0])
    site.lb1.wait_state("STOP")
    site.lb2.wait_state("MASTER")
    site.keepalived[0] = site.lb1.start(150, weight="-60")
    site.wait_back()
    site.services["web1"].kill()
    site.wait_moved(site.lb2, site.lb1, "BACKUP")
    assert site.lb1.said(WEB) == "1\n"
    site.services["web1"].start()
    site.wait_back()


def test_a_node_that_joins_later(site: Site, lab: Lab) -> None:
    tool = lab.keep(Tool(site.lb2.machine, *LATE, "--process", f"late:pidfile={site.services['web3'].pidfile}", "--broker", site.address))
    tool.wait_said(r"late:pidfile=\S+ is out of sight: .*late.*; it is asked for again")
    assert site.lb2.said("kmonitor/late.track") == "5\n"
    agent = site.machines["web3"].agent(lab, site.address, node="late")
    tool.wait_said(r"late\.track: 5 -> 0: 1 alive")
    tool.send(signal.SIGHUP)
    assert tool.wait() == 143
    assert site.lb2.said("kmonitor/late.track") == "5\n"
    lab.stop(tool, agent)


def test_the_example_of_the_documents(site: Site) -> None:
    """docs/ha-keepalived.md as it stands there, but for addresses, paths and a notify script."""
    toml, conf = re.findall(r"^```(?:toml)?\n(.+?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for name, service in site.services.items():
        toml = toml.replace(f"{name}:pidfile=/run/nginx.pid", f"{name}:pidfile={service.pidfile}")
    toml, conf = (text.replace("/run/kmonitor-keepalived/web", "/run/kmonitor/web.track") for text in (toml, conf))
    conf = conf.replace("192.0.2.10", VIRTUAL).replace("interface eth0", f"interface eth0\n    notify {NOTIFY}")
    site.lab.stop(site.tool, *site.keepalived)
    for balancer in (site.lb1, site.lb2):
        balancer.wait_state("STOP")
        balancer.path(WEB).unlink()
    site.lb1.path("tracks.toml").write_text(toml, encoding="utf-8")
    site.lb1.start(150, text=conf)
    site.lb1.wait_state("FAULT")  # init_file
    site.lb2.start(100, text=conf.replace("priority 150", "priority 100").replace("init_file 1", "init_file 0"))
    site.lb2.wait_state("MASTER")
    site.tool = site.lb1.tool("--config", "/run/tracks.toml", "--broker", site.address)
    site.wait_back()
    site.services["web1"].kill()
    site.tool.wait_said(r"web1:.* has ended")
    assert site.lb1.said(WEB) == "0\n"
    site.services["web2"].kill()
    site.wait_moved(site.lb2, site.lb1, "FAULT")
    site.tool.wait_said(r"web\.track: 0 -> 1: 1 alive, 2 dead; 2 must be alive")
