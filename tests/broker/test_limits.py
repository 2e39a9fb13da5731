# SPDX-License-Identifier: Apache-2.0
"""What a request may hold: no message makes the broker compute for seconds, keep megabytes, or say them back."""

from __future__ import annotations

import time
from typing import Any

import grpc
import grpc.aio
import pytest

from kmonitor.v1 import monitor_pb2
from tests.broker.test_server import Agent, World, here, next_of, registration, subscribe, world

__all__ = ["here"]

INVALID = grpc.StatusCode.INVALID_ARGUMENT
LONG = "*a" * 127
"""A glob of 254 characters that is as slow as any."""
GLOBS = [f"{LONG[:-4]}{number:04}" for number in range(1024)]


async def refused(call: Any) -> str:
    """What is said: one line that does not grow with what was asked."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call if not hasattr(call, "read") else call.read())
    assert caught.value.code() in {INVALID, grpc.StatusCode.NOT_FOUND}
    said = caught.value.details() or ""
    assert len(said) < 700
    assert "\n" not in said
    return said


async def test_globs(here: World) -> None:
    limit = "at most 64, and 1024 characters together"
    assert limit in await refused(here.monitor.ListNodes(monitor_pb2.ListNodesRequest(nodes=monitor_pb2.NodeSelector(names=GLOBS))))
    wanted = monitor_pb2.ProcessFilter(comms=["*a*"] * 65)
    assert limit in await refused(here.monitor.ListProcesses(monitor_pb2.ListProcessesRequest(node="a", filter=wanted)))
    many = registration()
    many.nodes.names.extend(GLOBS)
    assert limit in await refused(subscribe(here, many))
    assert limit in await refused(subscribe(here, registration(comms=["*b*"] * 65)))


async def test_the_worst_that_is_allowed_takes_a_moment(here: World) -> None:
    for number in range(50):
        agent = Agent(here.channel, node=f"{'a' * 100}{number}")
        await agent.connect()
    selector = monitor_pb2.NodeSelector(names=GLOBS[:4])
    began = time.process_time()
    for _ in range(10):
        await here.monitor.ListNodes(monitor_pb2.ListNodesRequest(nodes=selector))
    assert time.process_time() - began < 2.0  # some 0.1 s; 5,000 such globs took 10 s


async def test_long_names_are_not_said_back(here: World) -> None:
    name = "x" * (7 << 20)
    await refused(here.monitor.ListNodes(monitor_pb2.ListNodesRequest(nodes=monitor_pb2.NodeSelector(names=[name]))))
    await refused(here.monitor.ListProcesses(monitor_pb2.ListProcessesRequest(node=name)))
    await refused(here.monitor.RemoveNode(monitor_pb2.RemoveNodeRequest(node=name)))


async def test_cursors(here: World) -> None:
    large = monitor_pb2.Cursor(positions=[monitor_pb2.Cursor.Position(node=str(number), epoch=1, position=1) for number in range(16_385)])
    request = monitor_pb2.SubscribeRequest(registrations=[registration()], cursor=large)
    assert "the cursor: 16385 nodes are named: at most 16384" in await refused(here.monitor.Subscribe(request))
    long = monitor_pb2.Cursor(positions=[monitor_pb2.Cursor.Position(node="x" * 254, epoch=1, position=1)])
    request = monitor_pb2.SubscribeRequest(registrations=[registration()], cursor=long)
    assert "each by at most 253 characters" in await refused(here.monitor.Subscribe(request))


async def test_filters_of_whole_nodes(here: World) -> None:
    call = here.monitor.Watch()
    for number in range(300):
        request = monitor_pb2.RegisterRequest(registration=registration(uids=[number]))
        await call.write(monitor_pb2.WatchRequest(request_id=number, register=request))
    answers = [await next_of(call, "registered") for _ in range(300)]
    assert all("different filters" in answer.error.message for answer in answers[256:])
    assert not any(answer.HasField("error") for answer in answers[:256])
    # Of single processes there may be any number.
    for number in range(300, 310):
        request = monitor_pb2.RegisterRequest(registration=registration(pid=number, uids=[number]))
        await call.write(monitor_pb2.WatchRequest(request_id=number, register=request))
        assert not (await next_of(call, "registered")).HasField("error")
    call.cancel()


@pytest.mark.parametrize(("error", "told"), [(grpc.aio.InternalError("execute_batch"), 0), (ValueError("a fault"), 1)])
async def test_a_client_that_dies_in_a_write(error: Exception, told: int, caplog: pytest.LogCaptureFixture) -> None:
    """What gRPC raises then is no failure of ours. When it does is for chance to say: here it always does."""

    async def fails(_request: bytes, _context: object) -> bytes:
        raise error

    async with world():
        server = grpc.aio.server()
        handler: Any = grpc.unary_unary_rpc_method_handler(fails)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a", {"b": handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary("/a/b", request_serializer=bytes)(b"")
        await server.stop(0)
    assert len([record for record in caplog.records if record.exc_info]) == told
