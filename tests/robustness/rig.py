# SPDX-License-Identifier: Apache-2.0
"""A cluster that can be hurt: its broker in a machine of its own, agents whose rings are pinned, and monitors that keep a journal."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kmonitor.clients.lab.processes import pid_inside
from kmonitor.clients.lab.tools import ip
from tests.lab.namespaces import Idler, InsideAgent, Machine, Network, network
from tests.lab.services import Broker, Lab
from tests.lab.stopped import stopped
from tests.lab.watch import Watch
from tests.lab.workload import Programs
from tests.robustness.account import Truth, ended
from tests.robustness.listener import Listener, Selection
from tests.robustness.pace import EVERYTHING, Pace

MEMORY = "memory"
SQLITE = "sqlite:{}/log.db"
"""A broker's --log; {} is the folder `logs` of its rig."""
PROGRESS = ("--progress-interval", "100ms")
"""So that tests need not wait long for a heartbeat."""
PATIENT = ("--lease", "30s")
"""An agent that waits for a CPU, or is stopped on purpose, is not to be taken for one that is gone."""

BIND = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'

_numbers = itertools.count()


class Rig:
    """Nodes by name, each with its agent, and a broker. What its own lab holds lives as long as it does."""

    def __init__(
        self, lab: Lab, net: Network, programs: Programs, folder: Path, broker_options: Sequence[str], *, log: str, disk: str
    ) -> None:
        """`log` is the broker's --log, where {} stands for the folder `logs`. If `disk` is given, it is a disk of this size."""
        self.lab = lab
        self.net = net
        self.programs = programs
        self.folder = folder
        self.logs = folder / "logs"
        """In the broker's machine a file system of its own may be mounted here."""
        self.logs.mkdir()
        self.forgets = log == MEMORY
        """Nothing of the broker's outlives it."""
        self.machines: dict[str, Machine] = {}
        self.agents: dict[str, InsideAgent] = {}
        self._did: dict[str, Truth] = {}
        self._agent_options: dict[str, tuple[tuple[str, ...], bool]] = {}
        self.hub = net.machine(lab, "broker")
        """The broker's machine. Monitors are outside of it, beyond its link."""
        if disk:
            # In the machine's mount namespace: it goes with the machine.
            self.hub.beside_it("mount", "-t", "tmpfs", "-o", f"size={disk}", "logs", self.logs)
        self.address = f"{self.hub.address}:0"
        self._broker_options = ["--log", log.format(self.logs), *PROGRESS, *broker_options]
        self.broker = self.start_broker()
        self.address = self.broker.address

    # ---- the broker

    def start_broker(self) -> Broker:
        """At the address, and with the log, of the one before."""
        self.broker = self.lab.broker(*self._broker_options, prefix=self.hub.beside, listen=self.address)
        return self.broker

    def kill_broker(self) -> None:
        """SIGKILL."""
        self.lab.kill(self.broker)
        self.lab.stop(self.broker)

    def end_broker(self, limit: float = 15.0) -> int:
        """SIGTERM; its exit status."""
        self.broker.send(signal.SIGTERM)
        code = self.broker.wait(limit)
        self.lab.stop(self.broker)
        return code

    def broker_stopped(self) -> contextlib.AbstractContextManager[None]:
        """Within, it does not run."""
        return stopped(self.broker)

    @contextlib.contextmanager
    def disk_full(self) -> Iterator[None]:
        """Within, there is no room on the disk of its log. Only with a disk of its own."""
        filler = self.hub.root / (self.logs / "filler").relative_to("/")
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            for size in (1 << 20, 1 << 12):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        pass
        try:
            yield
        finally:
            filler.unlink()

    # ---- nodes

    def node(self, name: str, *options: str, pin: bool = True, wait: bool = True) -> InsideAgent:
        """The agent of a node, started; its machine is made unless it is there."""
        if name not in self.machines:
            self.machines[name] = self.net.machine(self.lab, name)
        self._agent_options[name] = options, pin
        return self._start_agent(name, wait=wait)

    def _start_agent(self, name: str, *, wait: bool) -> InsideAgent:
        options, pin = self._agent_options[name]
        agent = self.agents[name] = self.machines[name].agent(self.lab, self.address, *options, pin=pin, wait=wait)
        agent.wait_exec()
        self._did[name] = self._did.get(name, Truth()) + Truth(Counter({"PROCESS_EXEC": 1}))
        return agent

    def kill_agent(self, name: str) -> int:
        """SIGKILL. Its pins stay. The time of the kill, Unix nanoseconds."""
        agent = self.agents.pop(name)
        host_pid = agent.host_pid
        pid = pid_inside(host_pid)
        at = time.time_ns()
        os.kill(host_pid, signal.SIGKILL)
        self.lab.kill(agent)
        self.lab.stop(agent)
        self._did[name] += ended(pid, -signal.SIGKILL)
        return at

    def restart_agent(self, name: str, *, wait: bool = True) -> InsideAgent:
        """As it was started before."""
        return self._start_agent(name, wait=wait)

    def reboot(self, name: str, boot_id: str) -> InsideAgent:
        """What its broker takes for one: an agent without pins, that is shown another boot id. All its processes go on."""
        file = self.folder / f"boot id {next(_numbers)}"
        file.write_text(f"{boot_id}\n", encoding="ascii")
        options, _ = self._agent_options[name]
        within = ["unshare", "--mount", "--", "sh", "-c", BIND, str(file)]
        agent = self.agents[name] = self.machines[name].agent(self.lab, self.address, *options, within=within)
        return agent

    def agents_did(self, name: str) -> Truth:
        """What the node's agents did since this was last asked, as processes of their node: one who watches all of it is told."""
        did, self._did[name] = self._did[name], Truth()
        return did

    def agent_stopped(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Within, it does not run."""
        return stopped(self.agents[name])

    @contextlib.contextmanager
    def cut(self, name: str) -> Iterator[None]:
        """Within, a node's link is down; that of the broker's machine if `name` is "broker"."""
        machine = self.hub if name == "broker" else self.machines[name]
        machine.link("down")
        try:
            yield
        finally:
            machine.link("up")

    def narrow(self) -> None:
        """From here on the kernel buffers little between broker and monitors: what a monitor leaves waits in the broker."""
        for namespace in (self.net.hub, self.hub.namespace):
            for name in ("tcp_rmem", "tcp_wmem"):
                ip("netns", "exec", namespace, "sh", "-c", f"echo '4096 16384 65536' > /proc/sys/net/ipv4/{name}")

    def states(self) -> dict[str, str]:
        """Node -> state, as `kmon nodes` says."""
        done = self.run("nodes", "--json", "--broker", self.address)
        return {line["name"]: line["state"] for line in done}

    def wait_node(self, name: str, wanted: Callable[[dict[str, Any]], bool], limit: float = 30.0) -> None:
        """Until `kmon nodes` says something of a node: of such things nobody is told."""
        until = time.monotonic() + limit
        while not any(wanted(line) for line in self.run("nodes", "--json", "--broker", self.address) if line["name"] == name):
            if time.monotonic() > until:
                raise self.broker.failure(f"node {name} did not become what it was to be in {limit:g} s")

    def run(self, *argv: str) -> list[dict[str, Any]]:
        """JSON lines of a kmon command that ends."""
        return self.lab.json_lines(*argv, prefix=self.net.prefix)

    # ---- what a test brings

    def pace(self, lab: Lab, name: str, *, rate: float = 0, count: int = 0, mix: str = EVERYTHING, seed: int = 1) -> Pace:
        """A workload on a node."""
        return Pace(lab, self.machines[name], self.programs.pace, self.folder, rate=rate, count=count, mix=mix, seed=seed)

    def idler(self, lab: Lab, name: str) -> Idler:
        """A process on a node that ends when it is told."""
        return self.machines[name].idler(lab)

    def watch(self, lab: Lab, *options: str) -> Watch:
        """`kmon watch --json`."""
        return lab.watch(self.address, *options, prefix=self.net.prefix)

    def listener(self, lab: Lab, *selections: Selection, options: Sequence[str] = (), armed: bool = True) -> Listener:
        """A monitor; returns when all that it registered for is answered, if `armed`."""
        journal = self.folder / f"journal {next(_numbers)}"
        made = Listener(lab, self.net.prefix, self.address, journal, selections, *options)
        if armed:
            made.wait_armed()
        return made


@contextlib.contextmanager
def rig(
    pins: Path, programs: Programs, folder: Path, *broker_options: str, nodes: dict[str, tuple[str, ...]], log: str = MEMORY, disk: str = ""
) -> Iterator[Rig]:
    """With these nodes, name -> options of its agent, which are connected. All of it is gone at the end."""
    with network() as net:
        lab = Lab(pins)
        try:
            made = Rig(lab, net, programs, folder, broker_options, log=log, disk=disk)
            for name, options in nodes.items():
                made.node(name, *options, wait=False)
            for agent in made.agents.values():
                agent.wait_connected()
            yield made
        finally:
            lab.close()
