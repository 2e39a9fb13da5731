# SPDX-License-Identifier: Apache-2.0
"""A broker past its grace with one agent, and a channel to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from kmonitor.v1 import monitor_pb2, monitor_pb2_grpc
from tests.bad_input.refusal import GRPC_LIMIT
from tests.lab.services import Lab


@pytest.fixture(scope="package")
def settled(pins: Path) -> Iterator[tuple[str, str]]:
    """Address and node. For one lease after its start a broker takes a node that it does not know for one that is still to come."""
    lab = Lab(pins)
    broker = lab.broker()
    agent = lab.agent("alpha", broker.address)
    _wait_for_end_of_grace(broker.address)
    yield broker.address, agent.node
    lab.close()


def _wait_for_end_of_grace(address: str) -> None:
    nobody = monitor_pb2.Registration(nodes=monitor_pb2.NodeSelector(names=["nobody"]), event_mask=0x40)
    until = time.monotonic() + GRPC_LIMIT
    with grpc.insecure_channel(address) as channel:
        stub = monitor_pb2_grpc.MonitorServiceStub(channel)
        while time.monotonic() < until:
            call = stub.Subscribe(monitor_pb2.SubscribeRequest(registrations=[nobody]), timeout=GRPC_LIMIT)
            try:
                next(iter(call))
            except grpc.RpcError:
                return
            call.cancel()
            time.sleep(0.05)
    raise AssertionError("the broker's grace does not end")


@pytest.fixture(scope="package")
def channel(settled: tuple[str, str]) -> Iterator[grpc.Channel]:
    """To the broker."""
    with grpc.insecure_channel(settled[0]) as channel:
        yield channel


@pytest.fixture
def kmon_options(settled: tuple[str, str]) -> list[str]:
    """Those that name the broker."""
    return ["--broker", settled[0]]


@pytest.fixture
def dead_pid(lab: Lab) -> int:
    """Of a process that was there and was waited for."""
    process = lab.command("true")
    process.wait()
    return process.pid
