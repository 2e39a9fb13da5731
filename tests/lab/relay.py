# SPDX-License-Identifier: Apache-2.0
"""A port on this machine's loopback that leads into a network namespace: how the tests' own monitors reach a broker there."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import threading
from collections.abc import Iterator

CLONE_NEWNET = 0x40000000


class Relay:
    """A thread that lives in the namespace, with a listening socket from before it went there."""

    def __init__(self, namespace: str, target: str) -> None:
        """`namespace` as ip-netns(8) has it; `target` is HOST:PORT in there."""
        self._namespace = namespace
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name=f"relay into {namespace}")
        self._thread.start()

    def close(self) -> None:
        """Break all connections, and end."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            # setns(2) with a network namespace is for the calling thread only.
            descriptor = os.open(f"/run/netns/{self._namespace}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")
            finally:
                os.close(descriptor)
            self._loop.run_until_complete(self._serve())
        finally:
            self._listener.close()
            self._loop.close()

    async def _serve(self) -> None:
        self._listener.setblocking(False)
        accepting = asyncio.create_task(self._accept())
        await self._stop.wait()
        tasks = [accepting, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self) -> None:
        while True:
            connection, _ = await self._loop.sock_accept(self._listener)
            task = asyncio.create_task(self._connected(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connected(self, near: socket.socket) -> None:
        with near, socket.socket() as far:
            for end in (near, far):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(OSError):
                await self._loop.sock_connect(far, self._target)
                pumps = [asyncio.create_task(self._pump(near, far)), asyncio.create_task(self._pump(far, near))]
                try:
                    await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for pump in pumps:
                        pump.cancel()
                    await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        while data := await self._loop.sock_recv(source, 1 << 16):
            await self._loop.sock_sendall(sink, data)


@contextlib.contextmanager
def relay(namespace: str, target: str) -> Iterator[str]:
    """The relay's address, HOST:PORT."""
    made = Relay(namespace, target)
    try:
        yield made.address
    finally:
        made.close()
