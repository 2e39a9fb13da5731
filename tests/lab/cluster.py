# SPDX-License-Identifier: Apache-2.0
"""Three nodes a, b and c, each in namespaces of its own, and a broker that they reach over a bridge."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.lab.namespaces import HUB, InsideAgent, Machine, Network, network
from tests.lab.process import Running
from tests.lab.relay import relay
from tests.lab.services import Broker, Lab
from tests.lab.workload import Programs, Root, Stage

ZONES = {"a": "east", "b": "east", "c": "west"}
"""The label `zone` of each node."""
SOURCES = {"c": "bcc"}
"""What captures, where it is not core."""


class Cluster:
    """What its own lab holds lives as long as it does. Tests bring a lab of theirs for what they start."""

    def __init__(self, lab: Lab, net: Network, broker: Broker, address: str) -> None:
        self.lab = lab
        self.net = net
        self.broker = broker.address
        """As agents reach it."""
        self.address = address
        """As monitors reach it."""
        self.machines: dict[str, Machine] = {}
        self.agents: dict[str, InsideAgent] = {}

    def node(self, name: str, *options: str, pin: bool = False, wait: bool = True) -> InsideAgent:
        """The agent of a node, started, and connected if `wait`; its machine is made unless it is there."""
        if name not in self.machines:
            self.machines[name] = self.net.machine(self.lab, name)
        agent = self.machines[name].agent(self.lab, self.broker, *options, pin=pin, wait=wait)
        self.agents[name] = agent
        return agent

    def nodes(self, lab: Lab) -> dict[str, dict[str, Any]]:
        """What `kmon nodes --json` says, by name."""
        return {line["name"]: line for line in lab.json_lines("nodes", "--json", "--broker", self.address)}

    def received(self, lab: Lab) -> dict[str, int]:
        """Bytes of records that came from each node since its agent connected."""
        return {name: node["received_bytes"] for name, node in self.nodes(lab).items()}


@contextlib.contextmanager
def running(pins: Path, *broker_options: str, zones: dict[str, str]) -> Iterator[Cluster]:
    """A cluster of nodes with their labels. All of it is gone at the end."""
    with network() as net:
        lab = Lab(pins)
        try:
            broker = lab.broker(*broker_options, prefix=net.prefix, listen=f"{HUB}:0")
            with relay(net.hub, broker.address) as address:
                cluster = Cluster(lab, net, broker, address)
                for name, zone in zones.items():
                    cluster.node(name, "--label", f"zone={zone}", "--source", SOURCES.get(name, "core"), wait=False)
                for agent in cluster.agents.values():
                    agent.wait_connected()
                yield cluster
        finally:
            lab.close()


class NodeStage(Stage):
    """Plays its scenes inside a node."""

    def __init__(self, lab: Lab, cluster: Cluster, name: str, programs: Programs, folder: Path) -> None:
        super().__init__(lab, cluster.address, name, programs, folder)
        self._machine = cluster.machines[name]

    def fence(self) -> Running:
        """A process of the node."""
        return self._machine.idler(self.lab)

    def prepare(self, program: Path, *arguments: str) -> Root:
        """A workload of the node."""
        return self._machine.workload(self.lab, self.folder, program, *arguments)
