# SPDX-License-Identifier: Apache-2.0
"""Machines of a cluster on one kernel: each has a network namespace, a pid namespace and a /proc of its own.

A machine is held by the shell that is process 1 of its pid namespace. The end of the shell's input ends it, and with it all
that runs in the machine: also if the test run itself is killed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.lab.process import END_LIMIT, LabError, Running
from tests.lab.requires import Lack, tools_lack
from tests.lab.services import Agent, Lab
from tests.lab.workload import Root

PREFIX = "10.213.77"
"""Of the addresses, which exist in the network's own namespaces only."""
HUB = f"{PREFIX}.1"

_networks = itertools.count()


def namespaces_lack() -> Lack | None:
    """Why there can be no machines here; None if there can."""
    return tools_lack(Lack.NAMESPACES, "ip", "unshare", "nsenter")


def ip(*words: str) -> None:
    """Run ip(8). Raises LabError."""
    done = subprocess.run(["ip", *words], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise LabError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _child(parent: int) -> int | None:
    """The first child of a process, if it has one. (/proc/PID/task/TID/children needs an option of the kernel.)"""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = Path(entry, "stat").read_text(encoding="utf-8", errors="replace")
                if int(stat.rpartition(")")[2].split()[1]) == parent:
                    return int(entry.name)
    return None


def _comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()


def pid_inside(host_pid: int) -> int:
    """A process's pid as its own namespace has it."""
    for line in Path(f"/proc/{host_pid}/status").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    raise LabError(f"no NSpid in /proc/{host_pid}/status")


class Inside(Running):
    """Started with nsenter, which stays outside and ends as its child does. Signals are for the child."""

    @property
    def host_pid(self) -> int:
        """Of the process itself, as the initial namespace has it. Only once it has said something."""
        child = _child(self.process.pid)
        if child is None:
            raise self.failure("nothing runs inside")
        return child

    def wait_exec(self, limit: float = END_LIMIT) -> None:
        """Until it is the program that it was to be, whether it says something or not. Nobody is told of that."""
        until = time.monotonic() + limit
        while (child := _child(self.process.pid)) is None or _comm(child) == "nsenter":
            if time.monotonic() > until or self.process.poll() is not None:
                raise self.failure("nothing runs inside")
            time.sleep(0.001)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, if it still runs."""
        child = _child(self.process.pid)
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


class Shell(Running):
    """A machine's process 1. Its Popen is unshare, which ends when the shell does."""

    def __init__(self, name: str, namespace: str) -> None:
        unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        super().__init__(f"machine {name}", ["nsenter", f"--net=/run/netns/{namespace}", *unshare, "sh"])
        self._numbers = itertools.count()

    def do(self, command: str) -> None:
        """Run a command of the shell's own: anything else would be a process of the machine. Raises LabError if it fails."""
        said = f"did {next(self._numbers)}: ".encode()
        self.say(f"{command}; echo {said.decode()}$?")
        line = self.lines[self.wait_line(lambda text: text.startswith(said), command)]
        if line != said + b"0":
            raise self.failure(f"{command}: failed")

    def stop(self, number: signal.Signals = signal.SIGTERM, limit: float = END_LIMIT) -> int:
        """Not by a signal, which unshare does not hear."""
        self.close_input()
        with contextlib.suppress(LabError):
            self.wait(limit)
        return super().stop(signal.SIGKILL, limit)


class Machine:
    """One node's namespaces."""

    def __init__(self, name: str, namespace: str, address: str, shell: Shell) -> None:
        self.name = name
        self.namespace = namespace
        self.address = address
        self.shell = shell
        self.shell.do(":")
        host_pid = _child(shell.process.pid)
        if host_pid is None:
            raise shell.failure("has no process 1")
        self.prefix = ["nsenter", "--target", str(host_pid), "--net", "--pid", "--mount"]
        """What to run a command with, so that it runs in the machine."""
        self.beside = ["nsenter", "--target", str(host_pid), "--net", "--mount", "--"]
        """The same for one that keeps its pid: it is in the machine's network, and none of its processes."""
        self.root = Path(f"/proc/{host_pid}/root")
        """The machine's files, as the test can reach them: what is mounted in there too."""

    def agent(
        self, lab: Lab, broker: str, *options: str, node: str = "", pin: bool = False, wait: bool = True, within: Sequence[str] = ()
    ) -> InsideAgent:
        """Start an agent here, by default of the machine's name; wait until it is connected. `within`: a command to run it with."""
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
                self.shell.do(f"echo {pid - 1} > /proc/sys/kernel/ns_last_pid")
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

    def link(self, state: str) -> None:
        """Take its network "down", or bring it "up"."""
        ip("-n", self.namespace, "link", "set", "eth0", state)


class Network:
    """A bridge in a network namespace of its own, the hub, and machines at it."""

    def __init__(self) -> None:
        self._name = f"kmt{os.getpid()}-{next(_networks)}"
        self._made: list[str] = []
        self.hub = self._namespace("hub")
        ip("-n", self.hub, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.hub, "addr", "add", f"{HUB}/24", "dev", "bridge")
        ip("-n", self.hub, "link", "set", "bridge", "up")
        self.prefix = ["nsenter", f"--net=/run/netns/{self.hub}", "--"]
        """What to run a command with, so that it runs at the hub."""

    def _namespace(self, name: str) -> str:
        full = f"{self._name}-{name}"
        ip("netns", "add", full)
        self._made.append(full)
        ip("-n", full, "link", "set", "lo", "up")
        return full

    def machine(self, lab: Lab, name: str) -> Machine:
        """A new one; `lab` stops it."""
        namespace = self._namespace(name)
        address = f"{PREFIX}.{len(self._made)}"
        ip("-n", self.hub, "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", namespace)
        ip("-n", self.hub, "link", "set", f"to-{name}", "master", "bridge", "up")
        ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
        ip("-n", namespace, "link", "set", "eth0", "up")
        return Machine(name, namespace, address, lab.keep(Shell(name, namespace)))

    def close(self) -> None:
        """Remove the namespaces. Raises LabError."""
        wrong: list[str] = []
        while self._made:
            try:
                ip("netns", "del", self._made.pop())
            except LabError as error:
                wrong.append(str(error))
        if wrong:
            raise LabError("\n".join(wrong))


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Made, and removed again. All that runs there must have ended before."""
    made = Network()
    try:
        yield made
    finally:
        made.close()
