# SPDX-License-Identifier: Apache-2.0
"""The examples, as a user starts them, with real processes, a real broker and a real agent."""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.lab.process import Running
from tests.lab.services import Lab

EXAMPLES = Path(__file__).resolve().parents[2] / "clients" / "examples"

pytestmark = pytest.mark.capture


def example(lab: Lab, broker: str, name: str, *options: str) -> Running:
    """Start one."""
    return lab.command(sys.executable, EXAMPLES / f"{name}.py", "--broker", broker, *options)


class Receiver(ThreadingHTTPServer):
    """A webhook's other end, on loopback."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.got: queue.Queue[dict[str, Any]] = queue.Queue()
        self.refusals = 0
        """So many of the next requests get status 503."""
        self.url = f"http://127.0.0.1:{self.server_port}/deaths"


class Handler(BaseHTTPRequestHandler):
    """Of one request."""

    def do_POST(self) -> None:
        """Keep it, or refuse."""
        assert isinstance(self.server, Receiver)
        content = self.rfile.read(int(self.headers["Content-Length"]))
        refuse = self.server.refusals > 0
        self.server.refusals -= refuse
        self.send_response(503 if refuse else 204)
        self.end_headers()
        if not refuse:
            self.server.got.put(json.loads(content))

    def log_message(self, *_: object) -> None:
        """Not on the test's stderr."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def test_webhook(service: tuple[str, str], lab: Lab, receiver: Receiver, tmp_path: Path) -> None:
    broker, node = service
    sleepers = [lab.command("sleep", "60") for _ in range(3)]
    watch = [word for sleeper in sleepers[:2] for word in ("--watch", node, "pid", str(sleeper.pid))]
    (tmp_path / "x.pid").write_text(f"{sleepers[2].pid}\n", encoding="ascii")
    watch += ["--watch", node, "pidfile", str(tmp_path / "x.pid")]
    hook = example(lab, broker, "webhook", "--url", receiver.url, *watch, "--tries", "2", "--pause", "0.01")
    hook.wait_stderr("watching 3 subjects")
    receiver.refusals = 1  # the second try gets through
    sleepers[0].send(signal.SIGKILL)
    got = receiver.got.get(timeout=20)
    assert (got["node"], got["pid"], got["exit_signal"], got["certainty"], got["failed"]) == (node, sleepers[0].pid, 9, "seen", True)
    assert got["text"].startswith(f"killed by SIGKILL from pid {os.getpid()} (")
    receiver.refusals = 2
    sleepers[1].send(signal.SIGTERM)
    hook.wait_stderr(rf"dropped pid {sleepers[1].pid} on {node}, .*: status 503, 2 times")
    sleepers[2].send(signal.SIGTERM)
    assert receiver.got.get(timeout=20)["pid"] == sleepers[2].pid
    assert hook.stop() == 0
    assert receiver.got.empty()


def test_webhook_of_one_who_is_wrong(service: tuple[str, str], lab: Lab) -> None:
    for options, words in (
        (("--url", "file:///etc/passwd", "--watch", "a", "pid", "1"), "give one that begins with http"),
        (("--url", "http://x", "--watch", "a", "pid", "x"), "give a node, one of pid, pidfile, unit, cgroup, and which"),
        (("--url", "http://x", "--watch", "nosuch", "pid", "1"), "nosuch"),
    ):
        ended = example(lab, service[0], "webhook", *options)
        assert ended.wait() == 2
        assert words in ended.stderr_text()
        assert ended.stderr_text().count("\n") == 1


def test_restart(service: tuple[str, str], lab: Lab, tmp_path: Path) -> None:
    """It starts what is not there, and again what is killed, and gives up when that does not end."""
    broker, node = service
    file, start = tmp_path / "x.pid", tmp_path / "start"
    start.write_text(f"#!/bin/sh\nsetsid sleep 60 &\necho $! >{file}\n", encoding="ascii")
    start.chmod(0o755)
    options = ("--node", node, "--pidfile", str(file), "--most", "3", "--delay", "0.05")
    restart = example(lab, broker, "restart", *options, str(start))
    pids: set[int] = set()
    for turn in range(3):
        restart.wait_stderr(rf"(?s)(alive, pid \d+.*){{{turn + 1}}}")
        pid = int(file.read_text(encoding="ascii"))
        pids.add(pid)
        os.kill(pid, signal.SIGKILL)
        restart.wait_stderr(rf"dead, pid {pid}: killed by SIGKILL from pid {os.getpid()} ")
    assert restart.wait(30) == 1
    assert restart.stderr_text().endswith(f"restart: {file} was started 3 times in a row: giving up\n")
    assert len(pids) == 3
