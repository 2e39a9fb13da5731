# SPDX-License-Identifier: Apache-2.0
"""Broker and agent when nobody takes what they say: a disk that is full, a reader who has gone or does not read, a closed descriptor."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bad_input.refusal import refused
from tests.lab.requires import capture_lack, need
from tests.lab.services import BIN, Lab

pytestmark = pytest.mark.capture

HOW = ["full", "closed", "gone", "not read"]


@contextlib.contextmanager
def stream(how: str) -> Iterator[int | None]:
    """To give a process as its standard output or error; None: it gets none."""
    if how == "closed":
        yield None
        return
    if how == "full":
        descriptor = os.open("/dev/full", os.O_WRONLY)
        yield descriptor
        os.close(descriptor)
        return
    reader, descriptor = os.pipe()
    if how == "gone":
        os.close(reader)
    else:
        os.set_blocking(descriptor, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(descriptor, bytes(4096))
        os.set_blocking(descriptor, True)
    yield descriptor
    os.close(descriptor)
    if how != "gone":
        os.close(reader)


@pytest.mark.parametrize("how", HOW)
def test_the_work_goes_on(lab: Lab, how: str, tmp_path: Path) -> None:
    """Started, connected, away from one another, at work, and ended, with something to say each time."""
    need(capture_lack)
    address = f"127.0.0.1:{free_port()}"
    commands: dict[str, list[str | Path]] = {
        "broker": [BIN / "kmonitor-broker", "--listen", address, "--log", "memory", "--verbose", "--lease", "1s"],
        "agent": [BIN / "kmonitor-agent", "--broker", address, "--node", "mute", "--no-pin", "--verbose"],
    }
    running: dict[str, subprocess.Popen[bytes]] = {}
    with stream(how) as out, stream(how) as errors:

        def start(name: str) -> None:
            command = commands[name]
            if out is None:
                command = ["sh", "-c", 'exec "$0" "$@" >&- 2>&-', *command]
            running[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors)

        try:
            start("agent")
            start("broker")
            until_up(lab, address)
            running["broker"].kill()
            running["broker"].wait()
            start("broker")
            until_up(lab, address)
            process = lab.command("cat")
            watch = lab.watch(address, "--node", "mute", "--pid", str(process.pid), "--events", "exit")
            watch.wait_registered(1, "RUNNING")
            process.close_input()
            watch.wait_end_of(process.pid)
            lab.stop(watch)
            for name in ("agent", "broker"):
                running[name].terminate()
                assert running[name].wait(20) == 0, name
        finally:
            for each in running.values():
                each.kill()
                each.wait()


def until_up(lab: Lab, address: str) -> None:
    """The node is connected."""
    until = time.monotonic() + 30
    while '"state":"UP"' not in lab.run("kmon", "nodes", "--json", "--broker", address).stdout:
        assert time.monotonic() < until


def free_port() -> int:
    """One that the kernel has just chosen for somebody else, and got back."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.parametrize("program", ["kmonitor-agent", "kmonitor-broker"])
def test_an_error_has_its_status_though_nobody_reads_it(program: str) -> None:
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        assert subprocess.run([BIN / program, "--no-such-option"], stdout=full, stderr=full, check=False).returncode == 2


def test_a_report_that_cannot_be_written(lab: Lab) -> None:
    done = lab.run("sh", "-c", f"{BIN}/kmonitor-agent --check > /dev/full")
    refused(done, 1, "cannot write to standard output: No space left on device")
    assert lab.run("sh", "-c", f"{BIN}/kmonitor-agent --check | head -1; exit ${{PIPESTATUS:-0}}").stderr == ""
