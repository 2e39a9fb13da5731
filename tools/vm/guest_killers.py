# SPDX-License-Identifier: Apache-2.0
"""In a guest: deaths by signals of others, of the kernel, and of rules, and who was named for each.

Kernels differ in it: those before 5.16 end a process by seccomp's rule without a signal that is sent, those before 5.17 queue more signals
for a process that is dying. Who sent a signal that was survived must never be named.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import signal
import subprocess
import sys
from typing import Any

from tools.vm.stack import Told, watched

KERNEL = 0
NOBODY = None
ITSELF = -1
RELEASE = tuple(int(number) for number in re.findall(r"\d+", platform.release())[:2])
BY_RULE = KERNEL if RELEASE >= (5, 16) else NOBODY


def main() -> int:
    """0 if each death names who did it."""
    parser = argparse.ArgumentParser(description="Deaths by signals, and who was named for each.")
    parser.add_argument("sources", nargs="*", default=["core"])
    given = parser.parse_args()
    return max([under(source) for source in given.sources])


def under(source: str) -> int:
    """With an agent of this source."""
    with watched(source) as told:
        deaths = [
            Death("killed", signal.SIGTERM, WAITS, by=signal.SIGTERM),
            Death("killed", signal.SIGKILL, WAITS, by=signal.SIGKILL),
            Death("waits for its signal, blocked", signal.SIGTERM, BLOCKED, by=signal.SIGTERM),
            Death("survives SIGTERM, and is then killed", signal.SIGKILL, WAITS, survives=signal.SIGTERM, by=signal.SIGKILL),
            Death("kills itself", signal.SIGABRT, ABORTS, names=ITSELF),
            Death("kills its own thread", signal.SIGABRT, "os.abort()", names=ITSELF),
            Death("writes where nobody reads", signal.SIGPIPE, PIPE, names=KERNEL),
            Death("writes more than it may", signal.SIGXFSZ, BIG, names=KERNEL),
            Death("a fault of its own", signal.SIGSEGV, FAULTS, names=KERNEL),
            Death("survives SIGSEGV, then a fault", signal.SIGSEGV, FAULTS, survives=signal.SIGSEGV, names=KERNEL),
            Death("an alarm", signal.SIGALRM, ALARM, names=KERNEL),
            Death("survives SIGALRM, then an alarm", signal.SIGALRM, ALARM, survives=signal.SIGALRM, names=KERNEL),
            *(
                Death(f"survives {name}, then seccomp kills the {whom}", signal.SIGSYS, SECCOMP, rule, number, names=BY_RULE)
                for name, number in (("nothing", None), ("SIGTERM", signal.SIGTERM), ("SIGSYS", signal.SIGSYS))
                for whom, rule in (("process", 0x80000000), ("thread", 0))
            ),
        ]
        told.await_all()
        return max([death.verdict(source, told) for death in deaths])


class Death:
    """A process that dies, and who is to be named for it."""

    def __init__(
        self,
        what: str,
        number: signal.Signals,
        script: str,
        rule: int = 0,
        survives: signal.Signals | None = None,
        *,
        by: signal.Signals | None = None,
        names: int | None = NOBODY,
    ) -> None:
        self.what = what
        self.number = number
        command = [sys.executable, "-S", "-c", VICTIM + script, str(int(survives or 0)), str(rule)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as victim:
            assert victim.stdin is not None
            assert victim.stdout is not None
            victim.stdout.readline()
            if survives:
                strike(victim.pid, survives)
                victim.stdout.readline()  # it was caught
            victim.stdin.write(b"\n")
            victim.stdin.flush()
            killer = None
            if by:
                victim.stdout.readline()  # it waits for it
                killer = strike(victim.pid, by)
        self.pid = victim.pid
        self.status = -victim.returncode
        self.names = killer or (victim.pid if names == ITSELF else names)

    def verdict(self, source: str, told: Told) -> int:
        """Print what was told of it; 0 if it is right."""
        exit_line: dict[str, Any] = told.exits().get(self.pid, {})
        by = exit_line.get("killed_by")
        named = by["pid"] if by else NOBODY
        is_right = self.status == self.number == exit_line.get("exit_signal") and named == self.names
        print(
            f"{platform.release()}: {source}: {self.what}: died of {self.status}, told {exit_line.get('exit_signal')}"
            f" by {self.say(named)}; expected {int(self.number)} by {self.say(self.names)}: {'right' if is_right else 'WRONG'}",
            flush=True,
        )
        return 0 if is_right else 1

    def say(self, pid: int | None) -> str:
        """Who that is."""
        return "nobody" if pid is NOBODY else "the kernel" if pid == KERNEL else "itself" if pid == self.pid else str(pid)


def strike(pid: int, number: signal.Signals) -> int:
    """Have a process of its own send the signal: its id."""
    with subprocess.Popen(
        [sys.executable, "-S", "-c", "import os, sys; os.kill(*map(int, sys.argv[1:]))", str(pid), str(int(number))]
    ) as sender:
        pass
    if sender.returncode:
        raise SystemExit(f"cannot send signal {number} to {pid}")
    return sender.pid


VICTIM = """
import ctypes, os, resource, signal, struct, sys
survives, rule = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
def say(): os.write(1, b"\\n")
if survives:
    signal.signal(survives, lambda *_: say())
say()
os.read(0, 1)
if survives:
    signal.signal(survives, signal.SIG_DFL)
"""
WAITS = "say(); signal.pause()"
BLOCKED = "signal.pthread_sigmask(signal.SIG_BLOCK, [15]); say(); os.read(0, 1); signal.pthread_sigmask(signal.SIG_UNBLOCK, [15])"
ABORTS = "os.kill(os.getpid(), signal.SIGABRT)"
PIPE = "signal.signal(13, signal.SIG_DFL); ends = os.pipe(); os.close(ends[0]); os.write(ends[1], b' ')"
BIG = "signal.signal(25, signal.SIG_DFL); resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); os.write(os.open('/tmp', 0o20200002), b' ')"
FAULTS = "ctypes.string_at(0)"
ALARM = "signal.setitimer(signal.ITIMER_REAL, 0.1); signal.pause()"
SECCOMP = """
GETPPID = 110
def code(*words): return struct.pack("=HBBI", *words)
rules = code(0x20, 0, 0, 0) + code(0x15, 0, 1, GETPPID) + code(0x06, 0, 0, rule) + code(0x06, 0, 0, 0x7FFF0000)
rules = ctypes.create_string_buffer(rules)
program = struct.pack("@HP", 4, ctypes.addressof(rules))
libc = ctypes.CDLL(None)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.c_char_p(program), 0, 0):
    os._exit(94)
libc.getppid()
"""
"""PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP; a filter that has a rule for one system call."""

if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    raise SystemExit(main())
