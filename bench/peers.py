# SPDX-License-Identifier: Apache-2.0
"""Others that watch forks, execs and exits of a machine, as one would run them; what they print goes to /dev/null."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from bench.cputime import cpu_ns, settle
from bench.loops import Loops
from kmonitor.agent.sources import bcc_headers

PEERS = ("forkstat", "bpftrace", "bcc")
_BCC_PYTHON = "/usr/bin/python3"
_BPFTRACE = """
tracepoint:sched:sched_process_fork { printf("fork %d %d %s\\n", args->parent_pid, args->child_pid, comm); }
tracepoint:sched:sched_process_exec { printf("exec %d %s\\n", pid, str(args->filename)); }
tracepoint:sched:sched_process_exit { printf("exit %d %d %s\\n", pid, tid, comm); }
"""
_POKES = 200
_POKE_NS = 100_000
"""CPU time that so many forks and exits cost whoever sees them; all of the peers take far more."""
_START_SECONDS = 20


class PeerError(Exception):
    """It cannot be had here: one line, why."""


def check(peer: str) -> None:
    """Raises PeerError if it is not installed."""
    if peer == "bcc":
        asked = [_BCC_PYTHON, "-c", "from bcc import BPF"]
        if not Path(_BCC_PYTHON).exists() or subprocess.run(asked, capture_output=True, check=False).returncode != 0:
            raise PeerError("bcc is left out: it is not installed (apt install python3-bpfcc)")
    elif shutil.which(peer) is None:
        raise PeerError(f"{peer} is left out: it is not installed (apt install {peer})")


@contextlib.contextmanager
def peer(name: str, scratch: Path, loops: Loops) -> Iterator[int]:
    """Its pid, once it captures: it is asked with forks, and known by the CPU time that these cost it. Raises PeerError."""
    environment = dict(os.environ)
    if name == "forkstat":
        argv = ["forkstat", "-e", "fork,exec,exit,clone"]
    elif name == "bpftrace":
        argv = ["bpftrace", "-e", _BPFTRACE]
    else:
        headers = scratch / "bcc-headers"
        headers.mkdir(exist_ok=True)
        bcc_headers.write(headers)
        environment["BCC_KERNEL_SOURCE"] = str(headers)
        argv = [_BCC_PYTHON, str(Path(__file__).with_name("bcc_events.py"))]
    said = scratch / f"{name}.stderr"
    with said.open("wb") as errors, subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=errors, env=environment) as process:
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not _captures(process, loops):
                if process.poll() is not None or time.monotonic() > deadline:
                    lines = said.read_text(errors="replace").strip().splitlines() or ["it says nothing"]
                    raise PeerError(f"{name} is left out: it does not start here: {lines[-1]}")
            yield process.pid
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()


def _captures(process: subprocess.Popen[bytes], loops: Loops) -> bool:
    try:
        settle([process.pid])
        before = cpu_ns(process.pid)
        loops.run("fork", _POKES)
        settle([process.pid])
        return cpu_ns(process.pid) - before > _POKE_NS
    except OSError:
        return False  # it has ended: the caller sees why
