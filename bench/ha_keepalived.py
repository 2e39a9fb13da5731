# SPDX-License-Identifier: Apache-2.0
"""From kill -9 of a process to the notify script of a real keepalived, by each way in which keepalived can learn of it.

    .venv/bin/python -m bench.ha_keepalived [--count 30] [--only remote,file,process,script]

Needs root, and keepalived. The ways take turns, so that what else the machine does is the same for all. The notify script is a shell's: it
starts date(1) for the time, which is in every figure. Nothing leaves the network namespaces but for `process`: keepalived's
track_process works in the initial ones only, and gets one end of a veth pair there, of which the other end is in a namespace.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kmonitor.clients.ha.keepalived_file import TrackFile
from kmonitor.clients.lab.tools import ip
from tests.lab.keepalived import TRACK, Balancer, Keepalived, Service, config, keepalived_lack
from tests.lab.namespaces import HUB, Inside, Machine, network
from tests.lab.process import END_LIMIT, Running
from tests.lab.services import Lab

_INTERFACE, _ADDRESS = "kmkeepalived", "10.213.78.1"
_NICE = -10
"""As the units have it; the agent sees to it itself."""
_PROGRAM = "kmkbenchd"
"""A name that no other process of the machine has."""
_BY_PROCESS = f"vrrp_track_process served {{\n    process {_PROGRAM}\n    weight 0\n}}\n"
_BY_SCRIPT = 'vrrp_script served {\n    script "/run/check"\n    interval 2\n    weight 0\n    rise 1\n    fall 1\n}\n'
_CHECK = '#!/bin/sh\nread pid < /run/served.pid && kill -0 "$pid" 2>/dev/null\n'

_IN_MOVED_TO = 0x80  # include/uapi/linux/inotify.h

written: list[float] = []
"""Of `remote`: milliseconds until the track file had its number."""

Once = Callable[[], float]
"""Plays it once. Milliseconds."""


class _Host(Machine):
    """The machine itself, but for its mounts."""

    def __init__(self, lab: Lab) -> None:
        shell = lab.keep(_HostShell())
        shell.wait_line(lambda _: True, "a word")
        pid = str(shell.process.pid)
        self.name, self.namespace, self.address = "host", "", _ADDRESS
        self.beside = ["nsenter", "--target", pid, "--mount", "--"]
        # --pid, though it is the same: nsenter stays then, as it does in the other machines.
        self.prefix = ["nsenter", "--target", pid, "--mount", "--pid"]
        self.root = Path(f"/proc/{pid}/root")


class _HostShell(Running):
    """Holds the mounts until the end of its input."""

    def __init__(self) -> None:
        super().__init__("host", ["unshare", "--mount", "sh", "-c", "echo ready; read end; :"])

    def stop(self, number: signal.Signals = signal.SIGTERM, limit: float = END_LIMIT) -> int:
        """As it is held."""
        self.close_input()
        self.wait(limit)
        return super().stop(number, limit)


def _settled(balancer: Balancer, change: Callable[[], object]) -> None:
    """Until it has the address again."""
    change()
    balancer.wait_state("MASTER")


class _Renames:
    """Sees files get their names in a folder (inotify(7)): when the track file was written."""

    def __init__(self, folder: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.inotify_init1(os.O_CLOEXEC)
        if self._libc.inotify_add_watch(self._file, bytes(folder), _IN_MOVED_TO) < 0:
            raise OSError(ctypes.get_errno(), f"inotify: {os.strerror(ctypes.get_errno())}")

    def wait(self) -> int:
        """For the next. Nanoseconds of the wall clock."""
        os.read(self._file, 4096)
        return time.time_ns()


@contextlib.contextmanager
def _remote(lab: Lab, folder: Path) -> Iterator[Once]:
    """kmon ha keepalived: the process is on another machine than keepalived, and the broker on a third."""
    with network() as net:
        inside = Lab(lab.pins)
        try:
            broker = inside.broker(prefix=net.prefix, listen=f"{HUB}:0")
            web, balancer = net.machine(inside, "web"), Balancer(inside, net.machine(inside, "lb"))
            web.agent(inside, broker.address)
            service = Service(inside, web, folder)
            service.start()
            balancer.start(150)
            what = ["--file", TRACK, "--process", f"web:pidfile={service.pidfile}", "--when-blind", "down"]
            tool = balancer.tool(*what, "--broker", broker.address)
            tool.wait_exec()
            for pid in (broker.pid, tool.host_pid):
                os.setpriority(os.PRIO_PROCESS, pid, _NICE)
            balancer.wait_state("MASTER")

            renames = _Renames(balancer.path("kmonitor"))

            def once() -> float:
                at = service.kill()
                written.append((renames.wait() - at) / 1e6)
                taken = balancer.wait_state("FAULT") - at
                _settled(balancer, service.start)
                renames.wait()
                return taken / 1e6

            yield once
        finally:
            inside.close()


@contextlib.contextmanager
def _file(lab: Lab, folder: Path) -> Iterator[Once]:
    """A number written to the track file as kmon does: what keepalived itself takes."""
    with network() as net:
        inside = Lab(lab.pins)
        try:
            balancer = Balancer(inside, net.machine(inside, "lb"))
            file = TrackFile(balancer.machine.root / TRACK.lstrip("/"))
            file.open()
            file.write(0)
            balancer.start(150)
            balancer.wait_state("MASTER")

            def once() -> float:
                at = time.time_ns()
                file.write(1)
                taken = balancer.wait_state("FAULT") - at
                _settled(balancer, lambda: file.write(0))
                return taken / 1e6

            yield once
            file.close()
        finally:
            inside.close()


@contextlib.contextmanager
def _process(lab: Lab, folder: Path) -> Iterator[Once]:
    """keepalived's own track_process: the proc connector, on this host."""
    program = folder / _PROGRAM
    shutil.copy(shutil.which("sleep") or "/bin/sleep", program)
    with network() as net:
        inside = Lab(lab.pins)
        try:
            ip("link", "add", _INTERFACE, "type", "veth", "peer", "name", "far", "netns", net.hub)
            ip("-n", net.hub, "link", "set", "far", "up")
            ip("addr", "add", f"{_ADDRESS}/24", "dev", _INTERFACE)
            ip("link", "set", _INTERFACE, "up")
            machine = _Host(inside)
            balancer = Balancer(inside, machine)
            runs = [inside.command(program, "1000")]
            tracked = "track_process {\n        served\n    }"
            inside.keep(Keepalived(machine, config(machine, priority=150, more=_BY_PROCESS, tracked=tracked, interface=_INTERFACE)))
            balancer.wait_state("MASTER")

            def once() -> float:
                at = time.time_ns()
                inside.kill(runs[0])
                taken = balancer.wait_state("FAULT") - at
                inside.stop(runs.pop())
                _settled(balancer, lambda: runs.append(inside.command(program, "1000")))
                return taken / 1e6

            yield once
        finally:
            inside.close()


@contextlib.contextmanager
def _script(lab: Lab, folder: Path) -> Iterator[Once]:
    """keepalived's track_script every 2 s, which looks for a process of its own machine."""
    with network() as net:
        inside = Lab(lab.pins)
        try:
            balancer = Balancer(inside, net.machine(inside, "lb"))
            machine = balancer.machine
            check = machine.root / "run/check"
            check.write_text(_CHECK, encoding="ascii")
            check.chmod(0o755)
            runs: list[Inside] = []

            def start() -> None:
                idler = machine.idler(inside)
                (machine.root / "run/served.pid").write_text(f"{idler.pid}\n", encoding="ascii")
                runs.append(idler)

            start()
            tracked = "track_script {\n        served\n    }"
            inside.keep(Keepalived(machine, config(machine, priority=150, more=_BY_SCRIPT, tracked=tracked)))
            balancer.wait_state("MASTER")

            def once() -> float:
                time.sleep(random.uniform(0, 2))  # at any point of its interval
                [served] = runs
                pid = served.host_pid
                at = time.time_ns()
                os.kill(pid, signal.SIGKILL)
                served.wait()
                taken = balancer.wait_state("FAULT") - at
                inside.stop(runs.pop())
                _settled(balancer, start)
                return taken / 1e6

            yield once
        finally:
            inside.close()


_WAYS = {
    "remote": ("`kmon ha keepalived`, process on another node", _remote),
    "file": ("a number written to the track file", _file),
    "process": ("`track_process`, process on the same host", _process),
    "script": ("`track_script`, interval 2, process on the same node", _script),
}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="bench.ha_keepalived")
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--only", default=",".join(_WAYS))
    asked = parser.parse_args()
    lack = keepalived_lack()
    if lack is not None or os.geteuid() != 0:
        sys.exit(f"bench: {lack.value if lack else 'needs root'}")
    names = asked.only.split(",")
    taken: dict[str, list[float]] = {name: [] for name in names}
    lab = Lab(Path("/nowhere"))
    with tempfile.TemporaryDirectory(prefix="kmonitor-bench-") as scratch, contextlib.ExitStack() as ways:
        once: dict[str, Once] = {}
        for name in names:
            folder = Path(scratch, name)
            folder.mkdir()
            once[name] = ways.enter_context(_WAYS[name][1](lab, folder))
        for turn in range(asked.count + 1):  # the first one warms
            took = {name: once[name]() for name in names}
            print(", ".join(f"{name} {each:.1f} ms" for name, each in took.items()), file=sys.stderr, flush=True)
            for name, each in took.items() if turn else ():
                taken[name].append(each)
    lab.close()
    print(f"load of {os.cpu_count()} CPUs at the end: {os.getloadavg()[0]:.1f}\n")
    print("| how keepalived learns of it | n | least | quartile | median | quartile | most |\n|---|---|---|---|---|---|---|")
    rows = [(_WAYS[name][0], values) for name, values in taken.items()]
    if written:
        rows.insert(1, ("... of this until the track file is written", written[1:]))
    for what, values in rows:
        low, middle, high = statistics.quantiles(values, n=4)
        figures = " | ".join(f"{each:.1f}" for each in (min(values), low, middle, high, max(values)))
        print(f"| {what} | {len(values)} | {figures} |")


if __name__ == "__main__":
    main()
