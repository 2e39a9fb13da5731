# SPDX-License-Identifier: Apache-2.0
"""A nats-server between a publisher and a subscriber that speak its protocol over plain sockets and do nothing else.

    .venv/bin/python -m bench.nats publish|subscribe PORT

Obeys lines of JSON (see bench/worker.py). https://docs.nats.io/reference/reference-protocols/nats-protocol
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.blocks import BOOT_ID, OFFSET_NS, Shape, block_data
from bench.crew import Clock, Worker, obey, worker
from kmonitor.broker.block import Block
from kmonitor.broker.encode_usual import encode

_SUBJECT = b"e"
_SHAPE = Shape()


@dataclass(frozen=True, slots=True)
class NatsRound:
    """Messages that came through, all of them."""

    events: int
    seconds: float
    server_ns: int

    @property
    def rate(self) -> float:
        """Events a second."""
        return self.events / self.seconds


@dataclass(slots=True)
class Nats:
    """A running server with its two clients."""

    server: int
    publisher: Worker
    subscriber: Worker
    ready: bool = False

    def run(self, blocks: int, *, whole: bool) -> NatsRound:
        """The events of so many blocks: each as a message, or with `whole` each block as one. Raises SystemExit if any is missing."""
        if not self.ready:
            self.subscriber.answer()
            self.ready = True
        size = self.publisher.do(prepare=whole)["bytes"]
        self.subscriber.do(expect=size * blocks)
        clock = Clock(self.server)
        self.subscriber.tell(ended=True)
        began = self.publisher.do(send=blocks)["began"]
        ended = self.subscriber.answer()["ended"]
        return NatsRound(blocks * _SHAPE.slots, ended - began, clock.ns())


@contextlib.contextmanager
def nats(scratch: Path) -> Iterator[Nats | None]:
    """None if there is no nats-server here."""
    program = shutil.which("nats-server")
    if program is None:
        yield None
        return
    settings = scratch / "nats.conf"
    # A subscriber is not to be dropped for being slower than the publisher: the bench would see it, but measure nothing.
    settings.write_text(
        'listen: "127.0.0.1:-1"\nmax_payload: 1MB\nmax_pending: 1GB\nwrite_deadline: "60s"\nping_interval: "1h"\n', encoding="ascii"
    )
    with contextlib.ExitStack() as running:
        server = running.enter_context(subprocess.Popen([program, "-c", settings], stderr=subprocess.PIPE, text=True))
        running.callback(server.kill)
        port = _port(server)
        publisher, subscriber = (running.enter_context(worker("bench.nats", role, port)) for role in ("publish", "subscribe"))
        subscriber.tell(subscribe=True)
        yield Nats(server.pid, publisher, subscriber)


def _port(server: subprocess.Popen[str]) -> str:
    assert server.stderr is not None
    said = []
    for line in server.stderr:
        said.append(line)
        if found := re.search(r"Listening for client connections on 127\.0\.0\.1:(\d+)", line):
            port = found[1]
        if "Server is ready" in line:
            return port
    raise SystemExit(f"bench: nats-server did not start: {''.join(said)}")


class Publisher:
    """Sends what it has prepared, as fast as the socket takes it."""

    def __init__(self, port: int) -> None:
        self._socket = _connect(port)
        self._blocks: list[bytes] = []

    async def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """One command; what to answer."""
        if "prepare" in command:
            data = block_data(_SHAPE, 1)[0]
            payloads = [data] if command["prepare"] else _events(data)
            self._blocks = [b"".join(b"PUB %b %d\r\n%b\r\n" % (_SUBJECT, len(payload), payload) for payload in payloads)]
            return {"bytes": sum(len(b"MSG %b 1 %d\r\n%b\r\n" % (_SUBJECT, len(payload), payload)) for payload in payloads)}
        began = time.monotonic()
        for _ in range(command["send"]):
            self._socket.sendall(self._blocks[0])
        return {"began": began}


class Subscriber:
    """Counts bytes: their number says whether all messages have come."""

    def __init__(self, port: int) -> None:
        self._socket = _connect(port)
        self._buffer = bytearray(1 << 20)
        self._expected = 0

    async def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """One command; what to answer."""
        if "subscribe" in command:
            self._socket.sendall(b"SUB %b 1\r\n" % _SUBJECT)
            # The server wants to know soon after the start that its client lives, and then not again for an hour: what comes from here on
            # are messages.
            _until(self._socket, b"PING\r\n")
            self._socket.sendall(b"PONG\r\n")
        if "expect" in command:
            self._expected = command["expect"]
        if "ended" in command:
            left = self._expected
            while left > 0:
                got = self._socket.recv_into(self._buffer)
                if got == 0:
                    raise SystemExit("bench: nats-server has dropped its subscriber")
                left -= got
            if left < 0:
                raise SystemExit("bench: nats-server has sent more than was published")
            return {"ended": time.monotonic()}
        return {}


def _events(data: bytes) -> list[bytes]:
    """The records of a block as the broker encodes them for monitors: one protobuf message each."""
    encoded = encode(Block("node-0000", 7, 1 << 20, data, OFFSET_NS, BOOT_ID), None)
    bounds = np.asarray(encoded.offsets).tolist()
    return [encoded.data[begin + 2 : end] for begin, end in itertools.pairwise(bounds)]  # without its tag and length


def _connect(port: int) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", port))
    made.sendall(b'CONNECT {"verbose":false,"pedantic":false}\r\nPING\r\n')
    _until(made, b"PONG\r\n")
    return made


def _until(connection: socket.socket, end: bytes) -> None:
    said = b""
    while not said.endswith(end):
        more = connection.recv(4096)
        if not more:
            raise SystemExit(f"bench: nats-server has closed a connection: {said.decode(errors='replace')}")
        said += more


def main() -> None:
    """One of the two clients, until the end of standard input."""
    role, port = sys.argv[1], int(sys.argv[2])
    asyncio.run(obey(Publisher(port).do if role == "publish" else Subscriber(port).do))


if __name__ == "__main__":
    main()
