# SPDX-License-Identifier: Apache-2.0
"""A port on this machine's loopback that leads into a network namespace: how monitors outside of a lab reach its broker.

    python -I relay.py NAMESPACE HOST:PORT PORT

So the namespace needs no cable to this machine, and the machine no address for it. NAMESPACE is as ip-netns(8) has it, HOST:PORT is in
there. PORT is where to listen; with a "?" behind it any other will do if it is taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys

CLONE_NEWNET = 0x40000000


def enter(namespace: str) -> None:
    """The calling thread, and no other, goes into a network namespace; sockets that it has stay where they were made. Raises OSError."""
    descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), namespace)
    finally:
        os.close(descriptor)


class Relay:
    """Takes connections from a listening socket, and has the other end of each where its thread is."""

    def __init__(self, listener: socket.socket, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = listener
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def stop(self) -> None:
        """Let `serve` end."""
        self._stop.set()

    async def serve(self) -> None:
        """Until `stop`; then all connections are broken."""
        self._listener.setblocking(False)
        accepting = asyncio.create_task(self._accept())
        await self._stop.wait()
        tasks = [accepting, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._listener)
            task = asyncio.create_task(self._connected(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connected(self, near: socket.socket) -> None:
        with near, socket.socket() as far:
            for end in (near, far):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().sock_connect(far, self._target)
                pumps = [asyncio.create_task(_pump(near, far)), asyncio.create_task(_pump(far, near))]
                try:
                    await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for pump in pumps:
                        pump.cancel()
                    await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(source: socket.socket, sink: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, 1 << 16):
        await loop.sock_sendall(sink, data)


def listen(port: int, *, other: bool = False) -> socket.socket:
    """At a port of the loopback; at any that is free if that is taken and an `other` will do. Raises OSError."""
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError:
        if not other:
            raise
        return socket.create_server(("127.0.0.1", 0))


async def _until_signalled(relay: Relay) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, relay.stop)
    await relay.serve()


def main(namespace: str, target: str, port: str) -> int:
    """Run until a signal comes."""
    try:
        listener = listen(int(port.removesuffix("?")), other=port.endswith("?"))
        enter(namespace)
    except OSError as error:
        print(f"relay: port {port}: {error.strerror}", flush=True)
        return 1
    print(f"relay: listening on 127.0.0.1:{listener.getsockname()[1]}", flush=True)
    with listener:
        asyncio.run(_until_signalled(Relay(listener, target)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
