# SPDX-License-Identifier: Apache-2.0
"""keepalived, for real, in machines of tests/lab/namespaces.py: each with a /run of its own, a notify script, and a virtual address."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

from tests.lab.namespaces import SUBNET, Idler, Inside, Machine
from tests.lab.process import END_LIMIT
from tests.lab.requires import Lack, tools_lack
from tests.lab.services import BIN, Lab

VIRTUAL = str(SUBNET[200])
"""The address that the pair has together."""
TRACK = "/run/kmonitor/web.track"
NOTIFY = "/run/notify"

_CONFIG = """\
global_defs {{
    router_id {name}
    script_user root
    enable_script_security
}}

track_file web {{
    file {track}
    weight {weight}
    init_file 1
}}

{more}
vrrp_instance web {{
    state BACKUP
    interface {interface}
    virtual_router_id 77
    version 3
    priority {priority}
    advert_int {interval}
    virtual_ipaddress {{
        {virtual}/24
    }}
    {tracked}
    notify {notify}
}}
"""
# The time first: what the shell does after that is not keepalived's. Nobody waits for a reader: the pipe is held open by one.
_SCRIPT = """\
#!/bin/sh
echo "$(date +%s%N) $3 $4" > /run/notified
"""


def keepalived_lack() -> Lack | None:
    """Why keepalived cannot run here; None if it can."""
    return tools_lack(Lack.KEEPALIVED, "keepalived")


def prepare(machine: Machine) -> None:
    """Give it a /run of its own, with the notify script, and the folder of the track file."""
    machine.do("mount -t tmpfs -o mode=755 none /run")
    (machine.root / "run/kmonitor").mkdir()
    script = machine.root / "run/notify"
    script.write_text(_SCRIPT, encoding="ascii")
    script.chmod(0o755)
    machine.do("mkfifo /run/notified")


class Notified(Inside):
    """What the notify script of a machine was called with."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(f"notified {machine.name}", [*machine.prefix, "--", "sh", "-c", "exec cat 0<>/run/notified"])

    def stop(self, number: signal.Signals = signal.SIGTERM, limit: float = END_LIMIT) -> int:
        """It is meant to be ended by a signal."""
        super().stop(number, limit)
        return 0

    def states(self, start: int = 0) -> list[str]:
        """Of all calls: MASTER, BACKUP, FAULT, STOP, ..."""
        return [line.split()[1].decode() for line in self.lines[start:]]

    def wait_state(self, state: str, start: int = 0, limit: float = 20.0) -> tuple[int, int]:
        """Until it is called with that state: nanoseconds of the wall clock when it was, and from where on to look for the next."""
        at = self.wait_line(lambda line: line.split()[1] == state.encode(), f"notify script called with {state}", start=start, limit=limit)
        return int(self.lines[at].split()[0]), at + 1


def config(
    machine: Machine,
    *,
    priority: int,
    weight: str = "0",
    interval: float = 0.1,
    interface: str = "eth0",
    more: str = "",
    tracked: str = "track_file {\n        web\n    }",
) -> str:
    """A keepalived.conf."""
    return _CONFIG.format(
        name=machine.name,
        track=TRACK,
        weight=weight,
        more=more,
        priority=priority,
        interval=interval,
        interface=interface,
        virtual=VIRTUAL,
        tracked=tracked,
        notify=NOTIFY,
    )


class Keepalived(Inside):
    """Of one machine, which must be prepared. `text` is its keepalived.conf."""

    def __init__(self, machine: Machine, text: str) -> None:
        file = machine.root / "run/keepalived.conf"
        file.write_text(text, encoding="ascii")
        file.chmod(0o644)
        options = ["--dont-fork", "--log-console", "--log-detail", "--vrrp", "--use-file", "/run/keepalived.conf"]
        super().__init__(f"keepalived {machine.name}", [*machine.prefix, "--", "keepalived", *options])


def has_address(machine: Machine, address: str = VIRTUAL) -> bool:
    """Whether the machine's interface has it now."""
    done = subprocess.run(["ip", "-n", machine.namespace, "-j", "addr", "show", "dev", "eth0"], check=True, capture_output=True)
    return any(each["local"] == address for link in json.loads(done.stdout) for each in link["addr_info"])


class Tool(Inside):
    """`kmon ha keepalived` in a machine."""

    def __init__(self, machine: Machine, *options: str) -> None:
        command: list[str | Path] = [BIN / "kmon", "ha", "keepalived", *options]
        super().__init__(f"kmon ha keepalived {machine.name}", [*machine.prefix, "--", *command])
        self._read_to = 0

    def wait_said(self, pattern: str, limit: float = 20.0) -> re.Match[str]:
        """Until it says a line that matches, after the one that was waited for before."""
        until = time.monotonic() + limit
        while True:
            text = self.stderr_text()
            for match in re.finditer(r"^kmon: (.*)\n", text[self._read_to :], re.MULTILINE):
                if found := re.search(pattern, match[1]):
                    self._read_to += match.end()
                    return found
            if time.monotonic() > until or self.process.poll() is not None:
                raise self.failure(f"said nothing like {pattern!r} after {text[: self._read_to][-200:]!r}")
            time.sleep(0.005)

    def stop(self, number: signal.Signals = signal.SIGTERM, limit: float = END_LIMIT) -> int:
        """143 after SIGTERM is an end in order."""
        code = super().stop(number, limit)
        return 0 if code == 128 + signal.SIGTERM else code


class Service:
    """A process in a machine, and the pidfile that names it."""

    def __init__(self, lab: Lab, machine: Machine, folder: Path) -> None:
        self._lab = lab
        self.machine = machine
        self.pidfile = folder / f"{machine.name}.pid"
        self._runs: Idler | None = None

    def start(self) -> Idler:
        """As a daemon does: it runs, then the file is there."""
        self._runs = self.machine.idler(self._lab)
        beside = self.pidfile.with_suffix(".new")
        beside.write_text(f"{self._runs.pid}\n", encoding="ascii")
        beside.rename(self.pidfile)
        return self._runs

    def kill(self) -> int:
        """SIGKILL. When it was sent, in nanoseconds of the wall clock."""
        runs, self._runs = self._runs, None
        assert runs is not None
        pid = runs.host_pid
        at = time.time_ns()
        os.kill(pid, signal.SIGKILL)
        runs.wait()
        self._lab.stop(runs)
        return at


class Balancer:
    """A machine of a pair: keepalived, and what its notify script was told."""

    def __init__(self, lab: Lab, machine: Machine) -> None:
        self.lab = lab
        self.machine = machine
        prepare(machine)
        self.notified = lab.keep(Notified(machine))
        self.notified.wait_exec()
        self.seen = 0

    def start(self, priority: int, *, weight: str = "0", text: str = "") -> Keepalived:
        """keepalived. `text`: its whole configuration, instead."""
        return self.lab.keep(Keepalived(self.machine, text or config(self.machine, priority=priority, weight=weight)))

    def tool(self, *options: str) -> Tool:
        """kmon ha keepalived, with these options."""
        return self.lab.keep(Tool(self.machine, *options))

    def wait_state(self, state: str) -> int:
        """Until the notify script is called with it, after what was waited for before. When, in nanoseconds of the wall clock."""
        when, self.seen = self.notified.wait_state(state, self.seen)
        return when

    def path(self, name: str) -> Path:
        """A file of its /run, as the test can reach it."""
        return self.machine.root / "run" / name

    def said(self, name: str = "kmonitor/web.track") -> str:
        """A track file."""
        return self.path(name).read_text(encoding="ascii")
