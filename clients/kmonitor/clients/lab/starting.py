# SPDX-License-Identifier: Apache-2.0
"""The programs of a lab, started so that they outlive the command: broker, relay, process 1 of each node, agents, the workload."""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kmonitor.clients.lab.detached import Impatience, Started
from kmonitor.clients.lab.machine import READY, Machine, init_command
from kmonitor.clients.lab.network import Network
from kmonitor.clients.lab.processes import Process, first_child
from kmonitor.clients.lab.state import Folder, State
from kmonitor.wire.errors import KmonitorError

BROKER = "broker"
"""What can be killed, started, paused and resumed as a node can, and is none."""
RELAY = "relay"
_HERE = Path(__file__).parent
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Programs:
    """Where those of this installation are."""

    broker: str
    agent: str


class Starter:
    """Of one lab. What it starts is written down at once, so that `down` finds it. All raises KmonitorError."""

    def __init__(self, lab: str, folder: Folder, network: Network, broker: str, state: State, programs: Programs, tell: Tell) -> None:
        """`broker` is where it listens in the hub, HOST:PORT. `tell`: see Lab."""
        self._tell = tell
        self._lab = lab
        self._folder = folder
        self._network = network
        self._broker = broker
        self._state = state
        self._programs = programs

    def broker(self) -> Started:
        """On the log of the one before, if there was one."""
        log = f"sqlite:{self._folder.path / 'broker.sqlite'}"
        options = ["--listen", self._broker, "--log", log, "--log-bytes", "64M", "--lease", self._state.lease]
        started = Started("the broker", [*self._network.prefix, self._programs.broker, *options], self._folder.log(BROKER))
        self._note(BROKER, started.process)
        return started

    def relay(self, port: str) -> Started:
        """The broker's port on this machine's loopback; `port` as relay.py takes it."""
        command = [sys.executable, "-I", str(_HERE / "relay.py"), self._network.hub, self._broker, port]
        started = Started("the broker's port", command, self._folder.log(RELAY))
        self._note(RELAY, started.process)
        return started

    def node(self, node: str, number: int, *, first: bool) -> Started:
        """A node's namespaces; its address is the `number`-th. Its first boot is the kernel's own, each other one has an id of its own."""
        self._state.addresses[node] = self._network.add(node, number)
        options = ["--alone"]
        if not first:
            boot_id = self._folder.path / f"{node}.boot_id"
            boot_id.write_text(f"{uuid.uuid4()}\n", encoding="ascii")
            options += ["--boot-id", str(boot_id)]
        return Started(f"node {node}", init_command(node, self._network.namespace(node), *options), self._folder.log(node))

    def within(self, nodes: dict[str, Started]) -> None:
        """What runs in nodes that begin; until their agents are connected."""
        agents = {}
        for node, started in nodes.items():
            said = started.wait_said("init: ", self._tell)
            init = _child_of(started)
            if said != READY or init is None:
                raise KmonitorError(f"node {node}: {said}")
            self._note(f"{node} init", init)
            agents[node] = self.agent(node)
        for node, started in agents.items():
            self.started_agent(node, started, connected=True)
            if self._state.workload:
                Started("the workload", self._machine(node).within(["sh", _HERE / "workload.sh"]), Path(os.devnull))

    def agent(self, node: str) -> Started:
        """In a node that is there. What is started is nsenter(1), whose child it is."""
        command = [self._programs.agent, "--broker", self._broker, "--node", node, "--scope", "pidns", "--label", f"lab={self._lab}"]
        return Started(f"the agent of node {node}", self._machine(node).within(command), self._folder.log(node))

    def started_agent(self, node: str, started: Started, *, connected: bool) -> None:
        """Wait until it is there, or `connected`."""
        if connected:
            started.wait_said(f"kmonitor-agent: {node} is connected to", self._tell)
        impatience = Impatience(self._tell)
        while (agent := _child_of(started)) is None:
            if not started.process.state:
                raise KmonitorError(f"the agent of node {node} did not start: kmon lab logs {node} tells what it said")
            impatience.waits(f"the agent of node {node} to start")
            time.sleep(0.001)
        self._note(f"{node} agent", agent)

    def _machine(self, node: str) -> Machine:
        return Machine(self._state.processes[f"{node} init"].pid)

    def _note(self, name: str, process: Process) -> None:
        self._state.processes[name] = process
        self._folder.save(self._state)


def _child_of(started: Started) -> Process | None:
    """The one that nsenter(1) or unshare(1) started."""
    pid = first_child(started.process.pid)
    return None if pid is None else Process.of(pid)
