# SPDX-License-Identifier: Apache-2.0
"""A lab: a broker, and nodes that can be cut off, killed and started, all on this machine.

Nothing of it runs in the program that makes it. What is changed is changed under one lock (`state.locked`), which callers hold.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path

from kmonitor.clients.lab import tools
from kmonitor.clients.lab.machine import Machine
from kmonitor.clients.lab.network import NETNS, Network, identity, is_in, pids_in
from kmonitor.clients.lab.processes import Process, send
from kmonitor.clients.lab.starting import BROKER, RELAY, Programs, Starter, Tell
from kmonitor.clients.lab.state import Folder, State, check_name, names
from kmonitor.wire.errors import KmonitorError, UsageError

MOST_NODES = 26
PORT = 7221
_SUBNET = IPv4Network("10.213.0.0/24")
"""Of every lab: it is in none but the lab's own namespaces."""
_PREFIX = "kmlab-"
_END_S = 60.0
"""A process that was killed waits for the kernel alone, which on a busy machine has much to do."""


@dataclass(frozen=True)
class NodeStatus:
    """How a node is, as this machine sees it: what the broker makes of that, `kmon nodes` tells."""

    node: str
    state: str
    """UP, KILLED, CUT (its link is down), AGENT KILLED, AGENT PAUSED; "CUT, AGENT PAUSED"."""
    address: str
    init_pid: int | None
    """Process 1 of the node, as this machine has it; None if there is none."""
    agent_pid: int | None


class Lab:
    """By its name. Making the object makes nothing; all methods raise KmonitorError."""

    def __init__(self, name: str, tell: Tell = lambda _line: None) -> None:
        """`tell` is given a line for people when something takes long."""
        self.name = check_name(name)
        self._tell = tell
        self.folder = Folder(name)
        self._network = Network(f"{_PREFIX}{name}", _SUBNET)
        self.broker_inside = f"{self._network.hub_address}:{PORT}"
        """Where nodes reach the broker, HOST:PORT."""

    # ---- the whole

    def up(self, nodes: int, programs: Programs, *, lease: str = "3s", workload: bool = False) -> State:
        """Make it: a broker and so many nodes, named a, b, c ..., which are connected. What was made is removed again if that fails."""
        if not 1 <= nodes <= MOST_NODES:
            raise UsageError(f"--nodes {nodes}: from 1 to {MOST_NODES}, as they are named a to z")
        tools.check()
        if self.folder.path.exists() or self._network.namespaces():
            raise UsageError(f"there is a lab {self.name} already: kmon lab down --name {self.name} ends it, another --name makes another")
        try:
            return self._make(State(lease, workload), [chr(ord("a") + number) for number in range(nodes)], programs)
        except BaseException:
            with _uninterrupted():
                self.down()
            raise

    def _make(self, state: State, nodes: list[str], programs: Programs) -> State:
        self.folder.make()
        self.folder.save(state)
        self._network.make()
        starter = self._starter(state, programs)
        broker = starter.broker()
        relay = starter.relay(f"{PORT}?")
        inits = {node: starter.node(node, number + 2, first=True) for number, node in enumerate(nodes)}
        broker.wait_said("listening on", self._tell)
        starter.within(inits)
        state.broker = relay.wait_said("listening on", self._tell).split()[-1]
        self.folder.save(state)
        return state

    def down(self) -> None:
        """Remove all of it, in whatever condition it is; nothing is fine too. Whatever runs in its namespaces is ended."""
        tools.check()
        _end_all_in(self._network.hub)  # first: monitors need not be told how the rest ends
        state = self.folder.load()
        if state is not None:
            for name in state.processes:  # a node's first takes all others of the node along
                process = state.alive(name)
                if process is not None:
                    process.send(signal.SIGKILL, limit=_END_S)
        for namespace in self._network.namespaces():
            _end_all_in(namespace)
        self._network.close()
        self.folder.remove()

    # ---- what can be done to a part of it

    def cut(self, node: str) -> None:
        """Take a node's link down. Cut off it may be already."""
        self._with_node(node)
        self._network.link(node, "down")

    def heal(self, node: str) -> None:
        """Bring a node's link up again."""
        self._with_node(node)
        self._network.link(node, "up")

    def kill(self, node: str, *, agent: bool = False) -> None:
        """A power cut: all of a node ends at once, and nothing says good-bye. With `agent`, or for the broker: kill -9 of that alone."""
        state = self._state()
        if agent or node == BROKER:
            process = self._running(state, node)
            process.send(signal.SIGKILL, limit=_END_S)
            return
        self._check_node(state, node)
        network = self._network
        # Cables first: the kernel would send on its own that connections are over, which a machine without power does not.
        if network.is_there(node):
            with contextlib.suppress(KmonitorError):
                network.unplug(node)
        init = state.alive(f"{node} init")
        if init is not None:
            init.send(signal.SIGKILL, limit=_END_S)
        _end_all_in(network.namespace(node))
        if network.is_there(node):
            network.remove(node)

    def start(self, node: str, programs: Programs) -> None:
        """Bring back what is not there: a node that was killed, in another boot; else its agent; or the broker."""
        state = self._state()
        starter = self._starter(state, programs)
        if node == BROKER:
            if state.alive(RELAY) is None:
                starter.relay(state.broker.rpartition(":")[2]).wait_said("listening on", self._tell)
            if state.alive(BROKER) is None:
                starter.broker().wait_said("listening on", self._tell)
            return
        self._check_node(state, node)
        if state.alive(f"{node} init") is None:
            self.kill(node)  # the rest of it, if it did not go by our hand
            starter.within({node: starter.node(node, list(state.addresses).index(node) + 2, first=False)})
        elif state.alive(f"{node} agent") is None:
            # One that is cut off tries until its link is up.
            starter.started_agent(node, starter.agent(node), connected=self._network.is_up(node))

    def pause(self, node: str) -> None:
        """SIGSTOP of a node's agent, or of the broker: it is there, and does nothing."""
        process = self._running(self._state(), node)
        outside = [] if node == BROKER else [_parent(process)]
        process.send(signal.SIGSTOP)
        # nsenter(1) stops itself when its child does. To be continued before that it would not notice.
        for each in (process, *outside):
            until = time.monotonic() + _END_S
            while each.state not in ("T", "") and time.monotonic() < until:
                time.sleep(0.001)

    def resume(self, node: str) -> None:
        """SIGCONT."""
        process = self._running(self._state(), node)
        process.send(signal.SIGCONT)
        if node != BROKER:
            _parent(process).send(signal.SIGCONT)

    # ---- what it is

    def state(self) -> State:
        """Of a lab that is up, or was left half-made."""
        return self._state()

    def status(self) -> list[NodeStatus]:
        """Of each node."""
        state = self._state()
        return [self._status(state, node) for node in state.addresses]

    def machine(self, node: str) -> Machine:
        """A node that runs."""
        state = self._with_node(node)
        return Machine(state.processes[f"{node} init"].pid)

    def log(self, node: str) -> Path:
        """The file with what the broker, or a node's agent, said."""
        state = self._state()
        if node != BROKER:
            self._check_node(state, node)
        return self.folder.log(node)

    def _status(self, state: State, node: str) -> NodeStatus:
        init, agent = state.alive(f"{node} init"), state.alive(f"{node} agent")
        if init is None:
            words = ["KILLED"]
        else:
            words = [] if self._network.is_up(node) else ["CUT"]
            if agent is None or agent.state == "T":
                words.append("AGENT PAUSED" if agent else "AGENT KILLED")
        word = ", ".join(words) or "UP"
        return NodeStatus(node, word, state.addresses[node], *(process.pid if process else None for process in (init, agent)))

    # ---- parts

    def _starter(self, state: State, programs: Programs) -> Starter:
        return Starter(self.name, self.folder, self._network, self.broker_inside, state, programs, self._tell)

    def _state(self) -> State:
        tools.check()
        state = self.folder.load()
        if state is not None and state.broker:
            return state
        if self.folder.path.exists() or self._network.namespaces():
            raise UsageError(
                f"lab {self.name} is not up, or not yet: if nobody makes it now, kmon lab down --name {self.name} removes what there is"
            )
        others = [name for name in names() if name != self.name]
        raise UsageError(f"there is no lab {self.name}: {'there is ' + ', '.join(others) if others else 'kmon lab up makes one'}")

    def _check_node(self, state: State, node: str) -> None:
        if node not in state.addresses:
            more = ": that can be done to its nodes only" if node == BROKER else ""
            raise UsageError(f"lab {self.name} has no node {node}{more or ': it has ' + ', '.join(state.addresses)}")

    def _with_node(self, node: str) -> State:
        state = self._state()
        self._check_node(state, node)
        if state.alive(f"{node} init") is None:
            raise UsageError(f"node {node} does not run: kmon lab start {node} brings it back")
        return state

    def _running(self, state: State, node: str) -> Process:
        if node != BROKER:
            state = self._with_node(node)
        process = state.alive(BROKER if node == BROKER else f"{node} agent")
        if process is None:
            what = "the broker" if node == BROKER else f"the agent of node {node}"
            raise UsageError(f"{what} does not run: kmon lab start {node} brings it back")
        return process


def _parent(process: Process) -> Process:
    """Of an agent: nsenter(1)."""
    parent = Process.of(process.parent())
    if parent is None:
        raise KmonitorError(f"process {process.pid} has no parent: it has just ended")
    return parent


def _end_all_in(namespace: str) -> None:
    """Kill all processes of a network namespace. Raises KmonitorError if one does not end."""
    found = identity(NETNS / namespace)
    if found is None:
        return
    if is_in(os.getpid(), found):
        raise UsageError(f"this very command runs in {namespace}, which is to be removed: run it outside of the lab")
    until = time.monotonic() + _END_S
    while pids := pids_in(found):
        for pid in pids:
            send(pid, signal.SIGKILL, functools.partial(is_in, pid, found), limit=_END_S)
        if time.monotonic() > until:
            raise KmonitorError(f"processes come again and again in {namespace}: {', '.join(map(str, pids))}")


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Within, nobody's impatience leaves half of it behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
