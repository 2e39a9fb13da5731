# SPDX-License-Identifier: Apache-2.0
"""No lease runs out while the event loop always finds more to do: what an agent has said may be among that."""

from __future__ import annotations

import asyncio
import socket

import pytest

from kmonitor.broker import agents
from kmonitor.broker.broker import Broker
from kmonitor.broker.idle import IdleLoop
from kmonitor.broker.log.memory import MemoryLog
from tests.broker.test_many_answers import hello

LEASE_S = 0.1


async def is_spared() -> None:
    broker = Broker(MemoryLog(1 << 20), lease=LEASE_S)
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"x")
        turns = 0

        def ready() -> None:
            nonlocal turns
            turns += 1

        loop.add_reader(ours, ready)  # it is never read: there is always something
        link = broker.agents.connect(hello(7))
        until = loop.time() + 6 * LEASE_S
        while loop.time() < until or turns < 1000:  # noqa: ASYNC110 -- nothing is to happen for so long
            await asyncio.sleep(LEASE_S / 10)
        assert link.node.up
        loop.remove_reader(ours)
        async with asyncio.timeout(20):
            await link.closed.wait()
        assert not link.node.up
    broker.stop()


def test_a_busy_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "LEASES_MOST", 1000)
    with asyncio.Runner(loop_factory=IdleLoop) as runner:
        runner.run(is_spared())


async def is_missed() -> None:
    broker = Broker(MemoryLog(1 << 20), lease=LEASE_S)
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"x")
        loop.add_reader(ours, lambda: None)
        link = broker.agents.connect(hello(7))
        async with asyncio.timeout(20):
            await link.closed.wait()
        loop.remove_reader(ours)
    broker.stop()


def test_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "LEASES_MOST", 3)
    with asyncio.Runner(loop_factory=IdleLoop) as runner:
        runner.run(is_missed())
