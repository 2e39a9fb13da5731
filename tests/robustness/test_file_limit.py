# SPDX-License-Identifier: Apache-2.0
"""A broker that has as many files open as it may: it says so, and serves again when some are free."""

from __future__ import annotations

import contextlib
import re
import resource
import socket
from pathlib import Path

import grpc

from kmonitor.v1 import monitor_pb2, monitor_pb2_grpc
from tests.lab.services import Lab

LIMIT = 256
REACHED = rf"all {LIMIT} files that this broker may have open are: nobody else can connect until some go; raise the limit"
OVER = "files can be opened again"
PATIENCE_S = 30.0


def list_nodes(address: str) -> None:
    """Raises RpcError if there is no answer."""
    with grpc.insecure_channel(address) as channel:
        monitor_pb2_grpc.MonitorServiceStub(channel).ListNodes(monitor_pb2.ListNodesRequest(), timeout=PATIENCE_S, wait_for_ready=True)


def test_reached_and_over(lab: Lab) -> None:
    broker = lab.broker(prefix=["prlimit", f"--nofile={LIMIT}:{LIMIT}"])
    list_nodes(broker.address)
    host, _, port = broker.address.rpartition(":")
    for _ in range(2):
        with contextlib.ExitStack() as connections:
            for _ in range(LIMIT + 50):
                connections.enter_context(socket.create_connection((host, int(port)), timeout=PATIENCE_S))
            broker.wait_stderr(REACHED, limit=PATIENCE_S)
        list_nodes(broker.address)
        broker.wait_stderr(OVER, limit=PATIENCE_S)
        if len(re.findall(OVER, broker.stderr_text())) == 2:
            break
    said = broker.stderr_text()
    assert len(re.findall(REACHED, said)) == len(re.findall(OVER, said)) <= 2, said
    assert "Traceback" not in said


def test_the_soft_limit_is_raised(lab: Lab) -> None:
    broker = lab.broker(prefix=["prlimit", "--nofile=100:4096"])
    assert resource.prlimit(broker.pid, resource.RLIMIT_NOFILE) == (4096, 4096)
    assert Path(f"/proc/{broker.pid}").exists()
