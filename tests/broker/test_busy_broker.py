# SPDX-License-Identifier: Apache-2.0
"""A broker that has so much to do that what agents say waits for its turn longer than a lease: no node is unreachable for that."""

from __future__ import annotations

import asyncio
import sys
import time
from subprocess import PIPE

import pytest

from tests.broker.test_server import world

LEASE_S = 0.25
TURNS = 24

AGENT = """
import sys, time, grpc
from kmonitor.v1 import agent_pb2, agent_pb2_grpc
from kmonitor.wire.record import RECORD_SIZE, RECORD_VERSION, SLOT_SIZE

def says():
    yield agent_pb2.AgentMessage(hello=agent_pb2.Hello(node="a", boot_id="boot-1", epoch=7, record_version=RECORD_VERSION,
        record_size=RECORD_SIZE, slot_size=SLOT_SIZE))
    while True:
        yield agent_pb2.AgentMessage(heartbeat=agent_pb2.Heartbeat(time_unix_nano=1))
        time.sleep(0.05)

call = agent_pb2_grpc.AgentServiceStub(grpc.insecure_channel(sys.argv[1])).Connect(says())
next(call)
print("connected", flush=True)
for _ in call:
    pass
"""


async def test_its_own_load(caplog: pytest.LogCaptureFixture) -> None:
    async with world(lease=LEASE_S) as here:
        agent = await asyncio.create_subprocess_exec(sys.executable, "-c", AGENT, here.address, stdout=PIPE)
        assert agent.stdout is not None
        assert await agent.stdout.readline() == b"connected\n"
        done = asyncio.Event()
        turns = 0

        def work() -> None:
            nonlocal turns
            turns += 1
            time.sleep(LEASE_S)
            if turns == TURNS:
                done.set()
            else:
                asyncio.get_running_loop().call_soon(work)

        work()
        await done.wait()
        assert [node.up for node in here.broker.nodes] == [True]
        assert not [record for record in caplog.records if "unreachable" in record.getMessage()]
        # It is still missed when it is gone.
        agent.kill()
        await agent.wait()
        async with asyncio.timeout(20):
            while any(node.up for node in here.broker.nodes):  # noqa: ASYNC110 -- nobody tells
                await asyncio.sleep(0.05)
