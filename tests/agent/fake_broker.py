# SPDX-License-Identifier: Apache-2.0
"""A broker that does just what a test tells it, and keeps what agents send."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc

from kmonitor.v1 import agent_pb2, agent_pb2_grpc
from kmonitor.wire.masks import EventType
from kmonitor.wire.record import Slots, record_starts, slots_of
from tests.lab.storm import Storm

LEASE_MS = 900
Refusal = tuple[grpc.StatusCode, str]


@dataclass(eq=False)
class Stream:
    """One call of Connect, as the broker sees it."""

    hello: agent_pb2.Hello
    messages: list[agent_pb2.AgentMessage] = field(default_factory=list)
    """All behind the hello."""
    arrived_s: list[float] = field(default_factory=list)
    """When, on the monotonic clock."""
    end: int = 0
    """Position behind the last block."""
    ended: bool = False
    half_closed: bool = False
    """The agent has said that it has nothing more."""
    out: queue.SimpleQueue[agent_pb2.BrokerMessage | Refusal | None] = field(default_factory=queue.SimpleQueue)

    def send(self, **kind: object) -> None:
        """To the agent."""
        self.out.put(agent_pb2.BrokerMessage(**kind))  # type: ignore[arg-type]

    def close(self, refusal: Refusal | None = None) -> None:
        """End it, with a status if one is given."""
        self.out.put(refusal)

    def of(self, kind: str) -> list[agent_pb2.AgentMessage]:
        """Messages of one kind, in their order."""
        return [message for message in self.messages if message.WhichOneof("kind") == kind]


class FakeBroker(agent_pb2_grpc.AgentServiceServicer):
    """Listens until `close`. What it keeps is guarded by `changed`, which is notified of every message."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.streams: list[Stream] = []
        self.logs: dict[int, bytearray] = {}
        """By epoch: its records from `starts` on, each position once."""
        self.starts: dict[int, int] = {}
        self.epochs: list[int] = []
        """In the order of their first hello."""
        self.wrong: list[str] = []
        """What no agent may do."""
        self.resent = 0
        """Bytes that came more than once."""
        self.refuse: Callable[[agent_pb2.Hello], Refusal | None] = lambda hello: None
        self.ack: Callable[[Stream], agent_pb2.Ack | None] = lambda stream: agent_pb2.Ack(position=stream.end)
        """Asked after each block."""
        self.welcome: Callable[[agent_pb2.Hello], agent_pb2.Welcome] = lambda hello: agent_pb2.Welcome(lease_ms=LEASE_MS)
        self.interest: agent_pb2.Interest | None = None
        """Sent behind the welcome."""
        self._threads = ThreadPoolExecutor(max_workers=16)
        self._server = grpc.server(self._threads)
        agent_pb2_grpc.add_AgentServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def close(self) -> None:
        """End all streams."""
        with self.changed:
            for stream in self.streams:
                stream.out.put(None)
        self._server.stop(grace=0.5).wait()
        self._threads.shutdown()

    def stream(self, number: int, limit: float = 20.0) -> Stream:
        """The so-many-th that was accepted, from 0 on."""
        self.wait(lambda: len(self.streams) > number, limit)
        return self.streams[number]

    def applied(self, stream: Stream) -> None:
        """Until the agent has done what the first Interest said."""
        self.wait(lambda: len(stream.of("applied")) > 0)

    def wait(self, holds: Callable[[], bool], limit: float = 20.0) -> None:
        """Until it holds; looked at behind each message."""
        with self.changed:
            assert self.changed.wait_for(holds, limit), f"not within {limit:g} s; {self.wrong or self.describe()}"

    def describe(self) -> list[tuple[int, bool, int, list[str]]]:
        """Of each stream: epoch, draining, position, and the kinds of its last messages."""
        return [
            (each.hello.epoch, each.hello.draining, each.end, [str(message.WhichOneof("kind")) for message in each.messages[-5:]])
            for each in self.streams
        ]

    def records(self, epoch: int) -> Slots:
        """All of one ring, of any version."""
        with self.changed:
            slots = slots_of(bytes(self.logs.get(epoch, b"")))
        found: Slots = slots[record_starts(slots)]
        return found

    def Connect(  # noqa: N802 - the service's name for it
        self, requests: Iterable[agent_pb2.AgentMessage], context: grpc.ServicerContext
    ) -> Iterator[agent_pb2.BrokerMessage]:
        """As in agent.proto."""
        incoming = iter(requests)
        hello = next(incoming).hello
        refusal = self.refuse(hello)
        if refusal is not None:
            context.abort(*refusal)
        stream = Stream(hello, end=hello.position)
        with self.changed:
            if hello.epoch not in self.logs:
                self.epochs.append(hello.epoch)
                self.logs[hello.epoch] = bytearray()
                self.starts[hello.epoch] = hello.position
            self.streams.append(stream)
            self.changed.notify_all()
        stream.send(welcome=self.welcome(hello))
        if self.interest is not None and not hello.draining:
            stream.send(interest=self.interest)
        threading.Thread(target=self._read, args=(stream, incoming), daemon=True).start()
        context.add_callback(lambda: stream.out.put(None))
        while (message := stream.out.get()) is not None:
            if isinstance(message, tuple):
                context.abort(*message)
            else:
                yield message

    def _read(self, stream: Stream, incoming: Iterator[agent_pb2.AgentMessage]) -> None:
        try:
            for message in incoming:
                with self.changed:
                    stream.messages.append(message)
                    stream.arrived_s.append(time.monotonic())
                    if message.WhichOneof("kind") == "block":
                        self._take(stream, message.block)
                        ack = self.ack(stream)
                        if ack is not None:
                            stream.send(ack=ack)
                    self.changed.notify_all()
            stream.half_closed = True
        except grpc.RpcError:
            pass
        with self.changed:
            stream.ended = True
            self.changed.notify_all()
        stream.out.put(None)

    def _take(self, stream: Stream, block: agent_pb2.Block) -> None:
        epoch, position, data = stream.hello.epoch, block.position, block.data
        if position != stream.end:
            self.wrong.append(f"a block at {position} behind one that ended at {stream.end}")
        stream.end = position + len(data)
        log, at = self.logs[epoch], position - self.starts[epoch]
        if at > len(log) or at < 0:
            self.wrong.append(f"a hole before {position}")
            return
        again = len(log) - at
        self.resent += min(max(again, 0), len(data))
        if log[at : at + len(data)] != data[:again]:
            self.wrong.append(f"other bytes at {position} than before")
        log += data[max(again, 0) :]


def check_storm(told: Storm, rows: Slots) -> None:
    """All forks and ends of a storm (tests/lab/storm.py) are among the records, and no end is there twice.

    Others' may be there too, of the same pids: in a storm they come round.
    """
    ended, forks = rows[rows["type"] == EventType.PROCESS_EXIT], rows[rows["type"] == EventType.PROCESS_FORK]
    codes = [os.waitstatus_to_exitcode(status) for status in ended["status"].tolist()]
    assert told.statuses() - Counter(zip(ended["tgid"].tolist(), codes, strict=True)) == Counter()
    assert told.started() - Counter(zip(forks["tgid"].tolist(), forks["child_tgid"].tolist(), strict=True)) == Counter()
    ends = Counter(zip(ended["tgid"].tolist(), ended["start_boottime_ns"].tolist(), strict=True))
    assert [end for end, count in ends.items() if count > 1] == []
