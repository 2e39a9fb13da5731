# SPDX-License-Identifier: Apache-2.0
"""The floor: two bare grpc.aio stream hops. Bytes go from a sender to a relay, and from there to a receiver; nothing else is done.

    python -m bench.hops relay
    python -m bench.hops receiver HOST:PORT
    python -m bench.hops sender HOST:PORT

Three processes, as agent, broker and monitor are, with the same channel options and priorities, so that only our own work
differs. A message begins with the sender's wall clock right before its write.
"""

from __future__ import annotations

import asyncio
import os
import random
import struct
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import grpc.aio

from bench.worker import Commands, say
from kmonitor.agent.uplink import _OPTIONS as _AGENT_OPTIONS
from kmonitor.broker.server import _OPTIONS as _BROKER_OPTIONS
from kmonitor.clients.channel import _OPTIONS as _CLIENT_OPTIONS
from kmonitor.wire.priority import DEFAULT_NICE, raise_priority

_TIME = struct.Struct("=q")
_Context = grpc.aio.ServicerContext[Any, Any]


class _Relay:
    """What comes in goes out, in the same task: no relay does less."""

    def __init__(self) -> None:
        self._receiver: asyncio.Future[_Context] = asyncio.get_running_loop().create_future()

    async def put(self, messages: AsyncIterator[bytes], context: _Context) -> None:
        del context
        receiver = await self._receiver
        async for message in messages:
            await receiver.write(message)

    async def get(self, _: bytes, context: _Context) -> None:
        await context.send_initial_metadata(())
        self._receiver.set_result(context)
        await asyncio.Event().wait()  # until the receiver ends the stream


async def _relay() -> None:
    """Says its port."""
    relay = _Relay()
    server = grpc.aio.server(options=_BROKER_OPTIONS)
    handlers: dict[str, Any] = {
        "Put": grpc.stream_stream_rpc_method_handler(relay.put),
        "Get": grpc.unary_stream_rpc_method_handler(relay.get),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Hops", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    say(port)
    commands = await Commands.open()
    await commands.next()
    os._exit(0)  # grpc.aio complains of a server whose loop ended under it


async def _sender(address: str) -> None:
    """For {"count", "bytes", "gap_ms": [least, most]}: so many messages, each after so long a quiet time; or paced, by "period_ms"."""
    commands = await Commands.open()
    loop = asyncio.get_running_loop()
    async with grpc.aio.insecure_channel(address, options=_AGENT_OPTIONS) as channel:
        call: Any = channel.stream_stream("/bench.Hops/Put")()
        await call.wait_for_connection()
        say("ready")
        while (asked := await commands.next()) is not None:
            padding = bytes(asked["bytes"] - _TIME.size)
            due = loop.time()
            for _ in range(asked["count"]):
                if "period_ms" in asked:
                    due += asked["period_ms"] / 1000
                    await asyncio.sleep(due - loop.time())
                else:
                    await asyncio.sleep(random.uniform(*asked["gap_ms"]) / 1000)
                await call.write(_TIME.pack(time.time_ns()) + padding)
        call.cancel()


async def _receiver(address: str) -> None:
    """For {"count"}: says "ready", then the latencies of so many messages, in nanoseconds."""
    commands = await Commands.open()
    async with grpc.aio.insecure_channel(address, options=_CLIENT_OPTIONS) as channel:
        get: Any = channel.unary_stream("/bench.Hops/Get")
        call = get(b"")
        await call.initial_metadata()
        say("ready")
        while (asked := await commands.next()) is not None:
            say("ready")
            taken: list[int] = []
            while len(taken) < asked["count"]:
                message = await call.read()
                taken.append(time.time_ns() - _TIME.unpack_from(message)[0])
            say(taken)
        call.cancel()


def main() -> None:
    """One of the three."""
    role = sys.argv[1]
    if role != "receiver":
        raise_priority(DEFAULT_NICE)
    asyncio.run(_relay() if role == "relay" else _sender(sys.argv[2]) if role == "sender" else _receiver(sys.argv[2]))


if __name__ == "__main__":
    main()
