# SPDX-License-Identifier: Apache-2.0
"""Nodes of `kmon lab` for tests: the same namespaces, each with what a test needs of it.

A node's process 1 is held by its input, which is the test's. The end of that ends it, and with it all that runs in the node: also if
the test run itself is killed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Network
from pathlib import Path

from kmonitor.clients.lab import machine as lab_machine
from kmonitor.clients.lab import network as lab_network
from kmonitor.clients.lab.processes import comm, first_child
from tests.lab.process import END_LIMIT, LabError, Running
from tests.lab.requires import Lack, tools_lack
from tests.lab.services import Agent, Lab
from tests.lab.workload import Root

SUBNET = IPv4Network("10.213.77.0/24")
HUB = str(SUBNET[1])

_networks = itertools.count()


def namespaces_lack() -> Lack | None:
    """Why there can be no machines here; None if there can."""
    return tools_lack(Lack.NAMESPACES, "ip", "unshare", "nsenter")


class Inside(Running):
    """Started with nsenter, which stays outside and ends as its child does. Signals are for the child."""

    @property
    def host_pid(self) -> int:
        """Of the process itself, as the initial namespace has it. Only once it has said something."""
        child = first_child(self.process.pid)
        if child is None:
            raise self.failure("nothing runs inside")
        return child

    def wait_exec(self, limit: float = END_LIMIT) -> None:
        """Until it is the program that it was to be, whether it says something or not. Nobody is told of that."""
        until = time.monotonic() + limit
        while (child := first_child(self.process.pid)) is None or comm(child) == "nsenter":
            if time.monotonic() > until or self.process.poll() is not None:
                raise self.failure("nothing runs inside")
            time.sleep(0.001)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, if it still runs."""
        child = first_child(self.process.pid)
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)


class InsideAgent(Inside, Agent):
    """An agent in a machine."""


class InsideRoot(Inside, Root):
    """A workload in a machine."""


class Idler(Inside):
    """A process in a machine that does nothing until it is told how to end. `pid` is the machine's."""

    def __init__(self, prefix: Sequence[str | Path]) -> None:
        super().__init__("idler", [*prefix, "sh", "-c", "echo $$; read code; exit ${code:-0}"])
        self._pid = 0

    @property
    def pid(self) -> int:
        """As its namespace has it."""
        return self._pid

    def wait_ready(self) -> None:
        """Until it runs: from then on it makes no event but those of its end."""
        self._pid = int(self.lines[self.wait_line(lambda _: True, "its pid")])

    def end(self, code: int) -> None:
        """Make it end with that code, and wait until it has."""
        self.say(str(code))
        if self.wait() != code:
            raise self.failure(f"expected exit status {code}")

    def stop(self, number: signal.Signals = signal.SIGTERM, limit: float = END_LIMIT) -> int:
        """The end of its input ends it with 0."""
        self.close_input()
        with contextlib.suppress(LabError):
            self.wait(limit)
        return super().stop(number, limit)


class Init(Running):
    """A machine's process 1. Its Popen is unshare, which ends when that does."""

    def __init__(self, name: str, namespace: str) -> None:
        super().__init__(f"machine {name}", lab_machine.init_command(name, namespace))

    def wait_ready(self) -> None:
        """Until the machine is there."""
        if self.lines[self.wait_line(lambda _: True, "a word")] != lab_machine.READY.encode():
            raise self.failure("has no machine")

    def set_last_pid(self, pid: int) -> None:
        """The next process of the machine gets the one above it, if that is free. It is not done by a process of the machine's."""
        start = len(self.lines)
        self.say(f"last-pid {pid}")
        self.wait_line(lambda text: text == b"done", "its answer", start=start)

    def stop(self, number: signal.Signals = signal.SIGTERM, limit: float = END_LIMIT) -> int:
        """Not by a signal, which unshare does not hear."""
        self.close_input()
        with contextlib.suppress(LabError):
            self.wait(limit)
        return super().stop(signal.SIGKILL, limit)


class Machine(lab_machine.Machine):
    """One node."""

    def __init__(self, name: str, network: Network, address: str, init: Init) -> None:
        init.wait_ready()
        host_pid = first_child(init.process.pid)
        if host_pid is None:
            raise init.failure("has no process 1")
        super().__init__(host_pid)
        self.name = name
        self.namespace = network.namespace(name)
        self.address = address
        self._network = network
        self._init = init

    def agent(
        self, lab: Lab, broker: str, *options: str, node: str = "", pin: bool = False, wait: bool = True, within: Sequence[str] = ()
    ) -> InsideAgent:
        """Start an agent here, by default of the machine's name; wait until it is connected. `within`: a command to run it with.

        Pins are in the machine's own bpf file system, and go with it.
        """
        name = node or self.name
        command = lab.agent_command(name, broker, *options, scope="pidns", pin=pin)
        agent = lab.keep(InsideAgent(name, [*self.prefix, "--", *within, *command]))
        if wait:
            agent.wait_connected()
        return agent

    def idler(self, lab: Lab, pid: int | None = None) -> Idler:
        """Start a process; `pid` is the one that it shall have here, if it is free."""
        for _ in range(20):
            if pid is not None:
                self._init.set_last_pid(pid - 1)
            idler = lab.keep(Idler([*self.prefix, "--"]))
            idler.wait_ready()
            if pid in (None, idler.pid):
                return idler
            lab.stop(idler)  # another one was faster
        raise LabError(f"no process of machine {self.name} got pid {pid}")

    def workload(self, lab: Lab, folder: Path, *argv: str | Path) -> InsideRoot:
        """A workload that waits for the word."""
        root = lab.keep(InsideRoot(argv, folder, [*self.prefix, f"--wdns={folder}", "--"]))
        root.wait_ready()
        return root

    def beside_it(self, *argv: str | Path) -> None:
        """Run a command that sees the machine's files and is none of its processes. Raises LabError if it fails."""
        done = subprocess.run([*self.beside, *argv], check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise LabError(f"{argv[0]} in machine {self.name}: {done.stderr}")

    def do(self, command: str) -> None:
        """The same for a line of the shell's."""
        self.beside_it("sh", "-c", command)

    def link(self, state: str) -> None:
        """Take its network "down", or bring it "up"."""
        self._network.link(self.name, state)


class Network(lab_network.Network):
    """A hub, and machines at it."""

    def __init__(self) -> None:
        super().__init__(f"kmt{os.getpid()}-{next(_networks)}", SUBNET)
        self._numbers = itertools.count(2)

    def machine(self, lab: Lab, name: str) -> Machine:
        """A new one; `lab` stops it."""
        address = self.add(name, next(self._numbers))
        return Machine(name, self, address, lab.keep(Init(name, self.namespace(name))))


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Made, and removed again. All that runs there must have ended before."""
    made = Network()
    try:
        made.make()
        yield made
    finally:
        made.close()
