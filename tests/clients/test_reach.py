# SPDX-License-Identifier: Apache-2.0
"""What is said of a broker, or a node, that does not answer as it should: what is true, on one line, and not too soon."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from asyncio.subprocess import PIPE, create_subprocess_exec
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from kmonitor.clients import BrokerError, Monitor, NodeUnreachableError, connect
from kmonitor.clients.reach import Reach, look
from kmonitor.v1 import monitor_pb2
from tests.clients.conftest import Kmon
from tests.clients.fake_broker import FakeBroker, registered
from tests.clients.test_commands import stand_in
from tests.clients.test_watch import ended

WORDS = [["nodes"], ["ps", "--node", "web1"], ["watch", "--json"], ["wait", "--node", "web1", "--pid", "5"]]


def ids(words: list[str]) -> str:
    return words[0]


@pytest.fixture
def silent() -> Iterator[str]:
    """An address at which the kernel takes connections, and nobody reads: as of a broker that has no descriptor left, or was stopped."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as taken:
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
async def slow(broker: FakeBroker) -> AsyncIterator[str]:
    """The broker's address through a relay that passes nothing on for four seconds: as on a machine with too much to do."""
    relayed: set[asyncio.Task[None]] = set()

    async def passes(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                to.write(data)
                await to.drain()
        to.close()

    async def relay(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        await asyncio.sleep(4)
        there, here = await asyncio.open_connection("127.0.0.1", broker.port)
        relayed.update(asyncio.create_task(passes(*way)) for way in ((source, here), (there, to)))

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    for task in relayed:
        task.cancel()
    await asyncio.gather(*relayed, return_exceptions=True)


async def test_a_broker_without_descriptors(kmon: Kmon, silent: str) -> None:
    status, out, err = await ended(await kmon("nodes", "--broker", silent))
    assert (status, out, err.count("\n")) == (3, "", 1)
    assert err.startswith(f"kmon: no answer from the broker at {silent}, though connections are taken: it is stopped, overloaded, or ")
    assert "start kmonitor-broker" not in err


async def test_a_broker_that_is_slow(kmon: Kmon, slow: str) -> None:
    status, out, err = await ended(await kmon("nodes", "--json", "--broker", slow))
    assert (status, '"web1"' in out, err) == (0, True, "")


async def test_how_far_one_comes(broker: FakeBroker, silent: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        refused = f"127.0.0.1:{taken.getsockname()[1]}"
        assert (await asyncio.to_thread(look, refused, 5))[0] is Reach.REFUSED
    assert (await asyncio.to_thread(look, broker.address, 5))[0] is Reach.SERVED
    assert (await asyncio.to_thread(look, silent, 0.1))[0] is Reach.SILENT
    assert (await asyncio.to_thread(look, "no-such-name.invalid:7221", 5))[0] is Reach.UNNAMED

    async def web(_: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        to.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        to.close()

    async with await asyncio.start_server(web, "127.0.0.1", 0) as server:
        found, _ = await asyncio.to_thread(look, f"127.0.0.1:{server.sockets[0].getsockname()[1]}", 5)
    assert found is Reach.STRANGER


async def test_a_name_that_leads_nowhere(kmon: Kmon) -> None:
    status, _, err = await ended(await kmon("nodes", "--broker", "no-such-name.invalid:7221"))
    assert (status, err.count("\n")) == (3, 1)
    assert "no broker answers at no-such-name.invalid:7221: its name has no address" in err


async def test_a_node_that_is_away(broker: FakeBroker, kmon: Kmon) -> None:
    broker.unreachable = {"web1"}
    said = "node web1 is not connected: start its agent there, or ask again when it is back"
    assert await ended(await kmon("ps", "--node", "web1")) == (2, "", f"kmon: {said}\n")
    async with connect(broker.address) as monitor:
        with pytest.raises(NodeUnreachableError, match=said):
            await monitor.list_processes("web1")


# ---- what is no answer


class _Garbage(grpc.GenericRpcHandler):
    """Answers each call with one message that no message is."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        async def many(_requests: Any, _context: Any) -> AsyncIterator[bytes]:
            yield b"\xff\xff\xff"
            await asyncio.sleep(100)

        async def one(_request: Any, _context: Any) -> bytes:
            return b"\xff\xff\xff"

        if str(handler_call_details.method).endswith("/Watch"):
            return grpc.stream_stream_rpc_method_handler(many)
        return grpc.unary_unary_rpc_method_handler(one)


@pytest.mark.parametrize("words", WORDS, ids=ids)
async def test_messages_that_cannot_be_read(kmon: Kmon, words: list[str]) -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_Garbage(),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        said = f"kmon: what {address} sent cannot be read: it is no kmonitor broker, or one of another version: upgrade the older side\n"
        assert await ended(await kmon(*words, "--broker", address)) == (1, "", said)
    finally:
        await server.stop(None)


@pytest.fixture
async def monitor(broker: FakeBroker) -> AsyncIterator[Monitor]:
    broker.answers = False
    async with connect(broker.address) as made:
        yield made


async def test_an_answer_to_another_question(broker: FakeBroker, monitor: Monitor) -> None:
    asked = asyncio.ensure_future(monitor.register_all([{"node": "web1"}]))
    session = await broker.session()
    session.send(monitor_pb2.Notification(deregistered=monitor_pb2.Deregistered(request_id=session.requests[0].request_id)))
    with pytest.raises(BrokerError, match="by what it did not ask for"):
        await asked
    with pytest.raises(BrokerError):
        await anext(monitor)


async def test_the_other_way_round(broker: FakeBroker, monitor: Monitor) -> None:
    asked = asyncio.ensure_future(monitor.deregister(node="web1"))
    session = await broker.session()
    session.send(registered(session.requests[0].request_id, "web1", 5))
    with pytest.raises(BrokerError, match="by what it did not ask for"):
        await asked


async def test_nothing_to_register(broker: FakeBroker, monitor: Monitor) -> None:
    assert await monitor.register_all([]) == []


# ---- slow parts


async def test_parts_that_take_long_to_start(broker: FakeBroker, tmp_path: Path) -> None:
    """A minute of a compiler, a machine under load: for as long as they live they are waited for, and it is said."""
    (tmp_path / "kmon").write_text(f"#!{sys.executable}\nfrom kmonitor.clients.cli import main\nmain()\n", encoding="utf-8")
    (tmp_path / "kmon").chmod(0o755)
    verdict = '{"status":"ok","name":"auto","found":"takes core","advice":"","works":true,"host":"h"}'
    agent = 'echo "kmonitor-agent: $4 is connected to $2 (source core, scope host)"'
    stand_in(tmp_path / "kmonitor-agent", f"if [ $1 = --check ]; then sleep 31; echo '{verdict}'; else {agent}; exec sleep 100; fi")
    stand_in(tmp_path / "kmonitor-broker", f"echo soon >&2; sleep 21; echo kmonitor-broker: listening on {broker.address}; exec sleep 100")

    async def run(*words: str) -> tuple[int | None, str, str]:
        return await ended(await create_subprocess_exec(tmp_path / "kmon", *words, stdout=PIPE, stderr=PIPE))

    doctor, up = await asyncio.gather(run("doctor", "--broker", broker.address, "--json"), run("up", "--json", "--for", "5s"))
    assert (doctor[0], verdict in doctor[1], "kmon: still waiting for " in doctor[2]) == (0, True, True)
    assert (up[0], '"registered"' in up[1]) == (0, True)
    assert up[2].startswith("kmon: still waiting for kmonitor-broker to get ready (Ctrl-C ends it); it said last: soon\n")
