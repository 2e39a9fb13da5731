# SPDX-License-Identifier: Apache-2.0
"""A Pacemaker cluster: real corosync and pacemaker daemons, a machine of the network namespaces for each node.

Each machine has its own /run, /dev/shm and state folders of both daemons, as tmpfs in its mount namespace: nothing of a cluster is to be
seen outside, and nothing is left when the machine ends.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.lab.namespaces import Inside, Machine, Network
from tests.lab.process import LabError
from tests.lab.requires import Lack, tools_lack
from tests.lab.services import Lab

PRIVATE = ("/run", "/dev/shm", "/etc/corosync", "/var/lib/corosync", "/var/lib/pacemaker", "/var/log/corosync", "/var/log/pacemaker")
"""Folders of which every machine has its own."""
OWN_AGENTS = Path(__file__).parent / "ocf"
"""The resource agents of the tests."""
FIRST_CIB = """<cib crm_feature_set="3.16.1" validate-with="pacemaker-3.9" epoch="1" num_updates="0" admin_epoch="0">
<configuration><crm_config><cluster_property_set id="cib-bootstrap-options">
<nvpair id="options-deadtime" name="dc-deadtime" value="2s"/>
<nvpair id="options-stonith" name="stonith-enabled" value="false"/>
<nvpair id="options-quorum" name="no-quorum-policy" value="ignore"/>
</cluster_property_set></crm_config><nodes/><resources/><constraints/></configuration><status/></cib>
"""
"""What every node begins with. `dc-deadtime` is for how long a node looks for a DC before it calls an election: 20 s unless told."""
START_LIMIT = 60.0
COMMAND_LIMIT = 30.0


def pacemaker_lack() -> Lack | None:
    """Why there can be no Pacemaker here; None if there can."""
    return tools_lack(Lack.PACEMAKER, "corosync", "pacemakerd", "crm_mon", "crm_resource", "cibadmin", "crmadmin", "attrd_updater")


class Node:
    """A machine that is a node of the cluster."""

    def __init__(self, machine: Machine, lab: Lab) -> None:
        self.machine = machine
        self.name = machine.name
        self.lab = lab
        self.corosync: Inside | None = None
        self.pacemaker: Inside | None = None

    @property
    def prefix(self) -> list[str]:
        """What to run a command with, so that it runs on the node."""
        return [*self.machine.prefix, "--"]

    def call(self, *words: str, limit: float = COMMAND_LIMIT, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command there to its end, whatever that is."""
        return subprocess.run([*self.prefix, *words], input=stdin, capture_output=True, text=True, check=False, timeout=limit)

    def do(self, *words: str, limit: float = COMMAND_LIMIT, stdin: str = "") -> str:
        """Run a command there; what it printed. Raises LabError if it fails."""
        done = self.call(*words, limit=limit, stdin=stdin)
        if done.returncode != 0:
            raise LabError(f"{self.name}: {shlex.join(words)}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def file(self, path: str) -> Path:
        """A file of the node, as the test can reach it."""
        return self.machine.root / path.lstrip("/")

    def prepare(self, corosync_conf: str) -> None:
        """Private folders, and corosync's configuration."""
        do = self.machine.shell.do
        for folder in PRIVATE:
            do(f"mount -t tmpfs -o mode={1777 if folder == '/dev/shm' else 755} kmonitor-test {folder}")
        do("mkdir -p /run/lock /run/resource-agents /var/log/pacemaker/bundles")
        do("mkdir -p /var/lib/pacemaker/cib /var/lib/pacemaker/pengine /var/lib/pacemaker/cores /var/lib/pacemaker/blackbox")
        do("chown -R hacluster:haclient /var/lib/pacemaker /var/log/pacemaker && chmod -R u=rwX,g=rX,o= /var/lib/pacemaker")
        # Agents of the tests lie beside the distribution's: Pacemaker looks nowhere else.
        do(
            "mkdir -p /run/ocf/kmonitor /run/ocf-upper && for d in /usr/lib/ocf/resource.d/*; do ln -s /run/ocf-upper/${d##*/} /run/ocf/; done"
        )
        do("mount --bind /usr/lib/ocf/resource.d /run/ocf-upper && mount --bind /run/ocf /usr/lib/ocf/resource.d")
        for agent in sorted(OWN_AGENTS.iterdir()):
            do(f"install -m 755 {shlex.quote(str(agent))} /run/ocf/kmonitor/{agent.name}")
        self.file("/etc/corosync/corosync.conf").write_text(corosync_conf, encoding="ascii")
        cib = self.file("/var/lib/pacemaker/cib/cib.xml")
        cib.write_text(FIRST_CIB, encoding="ascii")
        cib.chmod(0o600)
        do("chown hacluster:haclient /var/lib/pacemaker/cib/cib.xml")

    def start(self) -> None:
        """Both daemons, without waiting for the cluster."""
        self.corosync = self.lab.keep(Inside(f"corosync {self.name}", [*self.prefix, "corosync", "-f"]))
        self.until(lambda: self.call("corosync-cfgtool", "-s").returncode == 0, "corosync answers")
        reaper = [sys.executable, "-I", Path(__file__).parent / "reaper.py"]
        self.pacemaker = self.lab.keep(Inside(f"pacemakerd {self.name}", [*self.prefix, *reaper, "pacemakerd", "-f"]))

    def kill(self) -> None:
        """Both daemons, at once: what they started ends with the machine."""
        for daemon in (self.pacemaker, self.corosync):
            if daemon is not None:
                self.lab.kill(daemon)

    def until(self, reached: Callable[[], bool], what: str, limit: float = START_LIMIT) -> None:
        """Wait for a state of the daemons, which tell nobody of it."""
        until = time.monotonic() + limit
        while not reached():
            if time.monotonic() > until:
                raise LabError(f"{self.name}: not in {limit:g} s: {what}\n{self.log()[-4000:]}")
            time.sleep(0.05)

    def log(self) -> str:
        """Pacemaker's log of this node."""
        with contextlib.suppress(OSError):
            return self.file("/var/log/pacemaker/pacemaker.log").read_text(encoding="utf-8", errors="replace")
        return ""


class PacemakerCluster:
    """Two nodes or more, started and with a DC."""

    def __init__(self, lab: Lab, network: Network, names: Sequence[str]) -> None:
        self.nodes = [Node(network.machine(lab, name), lab) for name in names]
        conf = _corosync_conf([(node.name, node.machine.address) for node in self.nodes])
        for node in self.nodes:
            node.prepare(conf)
            node.start()
        first = self.nodes[0]
        first.until(self._complete, "all nodes online, and a DC")

    def close(self) -> None:
        """End the daemons."""
        for node in self.nodes:
            node.kill()

    def __getitem__(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    def _complete(self) -> bool:
        with contextlib.suppress(LabError, ET.ParseError):
            top = self.state()
            online = [node for node in top.findall("nodes/node") if node.get("online") == "true" and node.get("pending") == "false"]
            return len(online) == len(self.nodes) and top.find("summary/current_dc[@name]") is not None
        return False

    def state(self) -> ET.Element:
        """What crm_mon says."""
        return ET.fromstring(self.nodes[0].do("crm_mon", "--output-as=xml", "--inactive"))

    def configure(self, section: str, xml: str) -> None:
        """Add to a section of the CIB: "resources", "constraints", ..."""
        self.nodes[0].do("cibadmin", "--create", "--scope", section, "--xml-text", xml)

    def active_on(self, resource: str) -> list[str]:
        """The nodes on which a primitive is started, and nothing of it is pending; of a group's or clone's, too."""
        found = []
        for each in self.state().iter("resource"):
            if each.get("id") == resource and each.get("role") in ("Started", "Promoted") and each.get("pending") is None:
                found += [node.get("name", "") for node in each.findall("node")]
        return found

    def idle(self) -> bool:
        """Whether the cluster has nothing to do."""
        said = self.nodes[0].call("crmadmin", "--status", self.dc).stdout
        return "S_IDLE" in said

    @property
    def dc(self) -> str:
        """The name of the node that decides."""
        found = self.state().find("summary/current_dc")
        return "" if found is None else found.get("name", "")

    def wait_active(self, resource: str, *nodes: str, limit: float = START_LIMIT) -> None:
        """Until it is started just there."""
        self.nodes[0].until(lambda: sorted(self.active_on(resource)) == sorted(nodes), f"{resource} active on {nodes}", limit)

    def wait_idle(self, limit: float = START_LIMIT) -> None:
        """Until the cluster has nothing more to do."""
        self.nodes[0].until(self.idle, "the cluster is idle", limit)

    def failures(self, resource: str) -> int:
        """How often a resource was failed with `crm_resource --fail`, as the controllers of all nodes logged it."""
        asked = "Simulated failure"
        return sum(
            1 for node in self.nodes for line in node.log().splitlines() if asked in line and "asyncmon" in line and resource in line
        )


def primitive(name: str, agent: str, parameters: Mapping[str, str], *, interval: str = "10s", meta: Mapping[str, str] | None = None) -> str:
    """The XML of an ocf primitive: agent "heartbeat:anything"."""
    provider, kind = agent.split(":")

    def pairs(kind: str, values: Mapping[str, str]) -> str:
        inner = "".join(f'<nvpair id="{name}-{kind}-{key}" name="{key}" value="{value}"/>' for key, value in values.items())
        return f'<{kind}_attributes id="{name}-{kind}">{inner}</{kind}_attributes>' if inner else ""

    return (
        f'<primitive id="{name}" class="ocf" provider="{provider}" type="{kind}">{pairs("instance", parameters)}{pairs("meta", meta or {})}'
        f'<operations><op id="{name}-monitor" name="monitor" interval="{interval}" timeout="20s"/></operations></primitive>'
    )


def _corosync_conf(nodes: Sequence[tuple[str, str]]) -> str:
    members = "\n".join(
        f"    node {{\n        ring0_addr: {address}\n        name: {name}\n        nodeid: {number}\n    }}"
        for number, (name, address) in enumerate(nodes, 1)
    )
    return f"""
system {{
    sched_rr: no
    move_to_root_cgroup: no
}}
totem {{
    version: 2
    cluster_name: kmonitor-test
    transport: udpu
    crypto_cipher: none
    crypto_hash: none
    token: 3000
}}
nodelist {{
{members}
}}
quorum {{
    provider: corosync_votequorum
    two_node: 1
    wait_for_all: 0
}}
logging {{
    to_stderr: yes
    to_syslog: no
}}
"""
