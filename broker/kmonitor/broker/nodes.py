# SPDX-License-Identifier: Apache-2.0
"""The nodes that the broker knows, and the streams of their agents."""

from __future__ import annotations

import asyncio
import itertools
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from kmonitor.broker.block import Block
from kmonitor.broker.errors import Code, RefusedError
from kmonitor.broker.interest import NodeInterest
from kmonitor.broker.keys import Terms
from kmonitor.broker.pidfiles import Pidfiles
from kmonitor.broker.registrations import Ask
from kmonitor.broker.router import Heard
from kmonitor.v1 import agent_pb2, monitor_pb2
from kmonitor.wire.parts import parts_of
from kmonitor.wire.record import SLOT_SIZE

RING_BYTES = 8 << 20
"""Taken for an agent that does not say how large its ring is."""
ACK_BYTES = 256 << 10
"""So much, or a quarter of the ring, is acknowledged at once: a message of its own for each block would cost both sides as much as
the block."""
ACK_S = 0.25
"""The rest waits no longer than this, seconds."""
ANSWER_MOST = 64 << 20
"""Bytes of an answer in parts: some 900,000 processes."""


@dataclass(frozen=True, slots=True)
class LastRecord:
    """Where a record lies, and what tells it from any other that could lie there: in it is the time at which it was made."""

    position: int
    end: int
    crc: int

    @classmethod
    def of(cls, block: Block) -> LastRecord | None:
        """That of a block; None if it has no record."""
        if not len(block):
            return None
        slot = len(block.slots) - 1 if block.starts is None else int(block.starts[-1])
        return cls(block.position + slot * SLOT_SIZE, block.end, zlib.crc32(block.data[slot * SLOT_SIZE :]))

    def agrees(self, position: int, data: bytes) -> bool | None:
        """Whether this stretch of a ring has it in its place; None if the stretch does not reach over that."""
        if position > self.position or position + len(data) < self.end:
            return None
        return zlib.crc32(data[self.position - position : self.end - position]) == self.crc


class Link:
    """One agent's stream, as the broker writes to it. The server's task takes what is to be sent."""

    def __init__(self, node: Node, *, draining: bool = False, peer: str = "") -> None:
        self.node = node
        self.draining = draining
        """It only brings what is left in a ring that is about to go."""
        self.peer = peer
        """The agent's address, for people."""
        self.proven = True
        """Whether the agent's ring is known to be the one that the log knows. Nothing is acknowledged before."""
        self.takes_parts = False
        """The agent takes an Interest in parts."""
        self._parts: agent_pb2.InterestApplied | None = None
        """What has come of an answer in parts."""
        self._parts_bytes = 0
        self.heard = 0.0
        """When something came, on the event loop's clock, seconds."""
        self.failure: RefusedError | None = None
        """Why the broker ended the stream."""
        self.filled = asyncio.Event()
        self.closed = asyncio.Event()
        self.ready = asyncio.Event()
        """Set unless the broker still works on what the agent said last: the next message is to wait."""
        self.ready.set()
        self._messages: deque[agent_pb2.BrokerMessage] = deque()
        self.spared = False
        """Whether the last look at its lease came too late to be held against it."""
        self._ack: agent_pb2.Ack | None = None
        self._said = (0, 0)
        """What was acknowledged: as logged, as received."""
        self._reached = (0, 0)
        """What could be."""
        self._later: asyncio.TimerHandle | None = None
        self._urged = 0
        """The agent waits for what lies before to be in the log."""
        self._calls: dict[int, asyncio.Future[agent_pb2.ProcessList]] = {}
        self._call_ids = itertools.count(1)

    def send(self, message: agent_pb2.BrokerMessage) -> None:
        """Behind what waits already."""
        self._messages.append(message)
        self.filled.set()

    def send_interest(self, interest: agent_pb2.Interest) -> None:
        """Send it in parts that are small, if the agent takes them: it may name very many processes, and groups by long paths."""
        for part in parts_of(interest, "processes", "groups") if self.takes_parts else (interest,):
            self.send(agent_pb2.BrokerMessage(interest=part))

    def whole(self, part: agent_pb2.InterestApplied) -> agent_pb2.InterestApplied | None:
        """Put a part of an answer to those before it: the answer, once all of it is there. Raises RefusedError."""
        before = self._parts
        if before is None:
            self._parts_bytes = 0
        elif before.version != part.version:
            raise RefusedError(Code.INVALID_ARGUMENT, f"node {self.node.name}: the parts of its answer are of several versions")
        self._parts_bytes += part.ByteSize()
        if self._parts_bytes > ANSWER_MOST:
            raise RefusedError(Code.RESOURCE_EXHAUSTED, f"node {self.node.name}: its answer has more than {ANSWER_MOST} bytes")
        if before is not None:
            before.MergeFrom(part)
            before.more = part.more
            part = before
        self._parts = part if part.more else None
        return None if part.more else part

    def ack(self, logged: int, received: int, *, urge: bool = False) -> None:
        """All before `logged` is in the log, and all before `received` has come: the agent is told if that is much, and otherwise a
        little later; at once if it urges, until all that has come by now is in the log."""
        self._reached = logged, received
        if urge:
            self._urged = received
        hello = self.node.hello
        much = min(ACK_BYTES, (hello.ring_bytes or RING_BYTES) // 4) if hello.counts_bytes else 0
        # What has come is in the log very soon, and then both are said at once; unless the log is slow, or cannot be written.
        if urge or logged - self._said[0] >= much or received - self._said[1] >= 2 * much or self._said[0] < self._urged <= logged:
            self._say()
        elif self._later is None:
            self._later = asyncio.get_running_loop().call_later(ACK_S, self._say)

    def _say(self) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None
        if self._reached != self._said and self.proven:
            self._said = self._reached
            self._ack = agent_pb2.Ack(position=self._said[0], received=self._said[1])
            self.filled.set()

    def take(self) -> list[agent_pb2.BrokerMessage]:
        """What is to be sent now."""
        self.filled.clear()
        messages = list(self._messages)
        self._messages.clear()
        if self._ack is not None:
            messages.append(agent_pb2.BrokerMessage(ack=self._ack))
            self._ack = None
        return messages

    def close(self, failure: RefusedError) -> None:
        """End the stream. The first reason counts."""
        if self.failure is None:
            self.failure = failure
        for call in self._calls.values():
            if not call.done():
                call.set_exception(RefusedError(Code.UNAVAILABLE, f"node {self.node.name} went away: {failure}"))
        self._calls.clear()
        if self._later is not None:
            self._later.cancel()
        self.closed.set()
        self.ready.set()
        self.filled.set()

    async def list_processes(self, wanted: monitor_pb2.ProcessFilter, *, with_args: bool = False) -> agent_pb2.ProcessList:
        """Ask the agent, and wait for as long as it is there: its heartbeats say so. Raises RefusedError if it goes away."""
        call_id = next(self._call_ids)
        call: asyncio.Future[agent_pb2.ProcessList] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = call
        asked = agent_pb2.ListProcessesCall(call_id=call_id, filter=wanted, with_args=with_args)
        self.send(agent_pb2.BrokerMessage(list_processes=asked))
        try:
            return await call
        finally:
            self._calls.pop(call_id, None)

    def answered(self, answer: agent_pb2.ProcessList) -> None:
        """The answer to `list_processes`; too late ones are ignored."""
        call = self._calls.get(answer.call_id)
        if call is not None and not call.done():
            call.set_result(answer)


class Node:
    """One node: known since its agent first connected, until the broker ends."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.hello = agent_pb2.Hello(node=name)
        """The last one."""
        self.labels: dict[str, str] = {}
        self.epoch = 0
        self.expected = 0
        """Where the next block begins."""
        self.logged = 0
        """All before it is in the log, for good."""
        self.position = 0
        """All records before it have come."""
        self.time_ns = 0
        """... and were made up to this time, Unix nanoseconds of the node's clock."""
        self.complete = (0, 0)
        """What its agent says of how far it has told all: losses too, which may be told behind the records around them."""
        self.told_position = 0
        """The furthest that its agent has named of its ring, in this epoch: an earlier broker may have delivered what lies before it."""
        self.last: LastRecord | None = None
        """The last record that came of this epoch: what lies there in the ring of an agent that comes back must be the same."""
        self.disproven = ""
        """Why the ring of this epoch is not the one that the log knows: its agent may not have heard, as its stream broke."""
        self.secrets: dict[int, bytes] = {}
        """Epoch -> hash of the secret that lies with that ring, the newest last; none for agents of older versions."""
        self.complete_ns = 0
        """The same, by the node's boot-time clock."""
        self.applied = 0, 0
        """Version of the last Interest that its agent has answered, and when that took effect, boot-time nanoseconds."""
        self.boottime_to_unix_ns = 0
        """Of its last block."""
        self.untold: dict[int, int] = {}
        """Losses that are to be told once the records before a position have come: that position -> where they begin."""
        self.late_losses = 0
        """How many of this stream had to wait for that."""
        self.lost: dict[tuple[int, bool], int] = {}
        """(event type, whether of a watched process) -> how many the ring could not take since the epoch began."""
        self.number = 0
        """Of the last change to its interest, as its agent counts them."""
        self.received_bytes = 0
        self.since_ns = time.time_ns()
        self.link: Link | None = None
        self.drain: Link | None = None
        """A stream that brings the rest of an old ring, before the node's own comes."""
        self.inferring: set[tuple[int, int]] = set()
        """(pid, start time) of processes whose ends the agent was asked to make records of."""
        self.interest: NodeInterest[Ask] = NodeInterest()
        self.pidfiles = Pidfiles()
        self._waiting: list[tuple[int, Callable[[], None]]] = []
        self._unlogged: deque[tuple[int, int]] = deque()

    @property
    def boot_id(self) -> str:
        return self.hello.boot_id

    @property
    def up(self) -> bool:
        """Whether its agent is connected."""
        return self.link is not None

    @property
    def farthest(self) -> int:
        """Nobody can have taken, or have been told of, an event at this position of the epoch or behind it."""
        return max(self.expected, self.told_position)

    def reached(self, position: int, time_ns: int) -> None:
        """All records before `position` have come."""
        self.position = max(self.position, position)
        self.time_ns = max(self.time_ns, time_ns)
        if self._waiting:
            due = [action for at, action in self._waiting if at <= self.position]
            self._waiting = [(at, action) for at, action in self._waiting if at > self.position]
            for action in due:
                action()

    def appended(self, offset: int, end: int) -> None:
        """What ends at `end` got this offset in the log."""
        self._unlogged.append((offset, end))

    def committed(self, offset: int) -> bool:
        """The log is safe up to this offset. Whether that is news for the agent."""
        before = self.logged
        while self._unlogged and self._unlogged[0][0] < offset:
            self.logged = max(self.logged, self._unlogged.popleft()[1])
        return self.logged != before

    def give_up(self, position: int) -> int:
        """What ends at `position` or before will not get into the log: all the same the agent may forget it. Where that ends."""
        while self._unlogged and self._unlogged[0][1] <= position:
            self.logged = max(self.logged, self._unlogged.popleft()[1])
        return self.logged

    def starts_anew(self, position: int) -> None:
        """Its positions start anew here."""
        self.expected = self.position = self.logged = position
        self.complete = position, self.complete[1]
        self.last = None
        self.disproven = ""
        self.told_position = 0
        self.complete_ns, self.applied = 0, (0, 0)
        self._unlogged.clear()

    def when_reached(self, position: int, action: Callable[[], None]) -> None:
        """Call `action` once all records before `position` have come; at once if they have."""
        if position <= self.position:
            action()
        else:
            self._waiting.append((position, action))

    def beats(self, beat: agent_pb2.Heartbeat) -> None:
        """Take what the agent says of how far all has come."""
        self.reached(beat.position, beat.time_unix_nano)
        self.complete = min(beat.position, self.position, *self.untold.values()), beat.time_unix_nano
        # An agent that does not say it says nothing of a boot-time clock but in its blocks.
        self.complete_ns = beat.boottime_ns or beat.time_unix_nano - self.boottime_to_unix_ns

    def heard(self) -> Heard:
        """How far it has obeyed and told."""
        return Heard(self.epoch, self.interest.version + 1, *self.applied, self.complete_ns)

    def forget_waiting(self) -> None:
        """What `when_reached` was told to wait for is of no use any more."""
        self._waiting.clear()
        self.untold.clear()
        self.late_losses = 0

    def describe(self) -> monitor_pb2.Node:
        """As ListNodes tells it."""
        return monitor_pb2.Node(
            name=self.name,
            state=monitor_pb2.NODE_STATE_UP if self.up else monitor_pb2.NODE_STATE_UNREACHABLE,
            boot_id=self.boot_id,
            labels=self.labels,
            source=self.hello.source,
            scope=self.hello.scope,
            kernel_release=self.hello.kernel_release,
            agent_version=self.hello.agent_version,
            epoch=self.epoch,
            position=self.position,
            since_unix_nano=self.since_ns,
            lost=min(sum(self.lost.values()), (1 << 64) - 1),
            watched_processes=self.interest.watched_processes,
            node_mask=self.interest.node_mask,
            received_bytes=self.received_bytes,
        )


class Nodes:
    """All known nodes by name."""

    def __init__(self, settle_until: float) -> None:
        """`settle_until`, on the event loop's clock: until then agents of an earlier broker may still be on their way."""
        self._settle_until = settle_until
        self._nodes: dict[str, Node] = {}

    @property
    def settling(self) -> bool:
        """Whether a node that is not known may just not have reconnected yet."""
        return asyncio.get_running_loop().time() < self._settle_until

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def get(self, name: str) -> Node | None:
        """The node, or None if no agent has ever connected with this name."""
        return self._nodes.get(name)

    def __len__(self) -> int:
        return len(self._nodes)

    def meet(self, name: str) -> Node:
        """The node; made if it is new."""
        return self._nodes.setdefault(name, Node(name))

    def remove(self, name: str) -> None:
        """Forget a node."""
        del self._nodes[name]

    def selected(self, terms: Terms) -> list[Node]:
        """The known nodes that a registration or a request with these terms is about."""
        nodes: Iterable[Node] = self._nodes.values()
        if terms.exact:
            nodes = [node for name in terms.exact_names if (node := self._nodes.get(name)) is not None]
        return [node for node in nodes if terms.selects(node.name, node.labels)]

    def names(self, limit: int = 20) -> str:
        """For people: the known nodes."""
        names = sorted(self._nodes)
        if not names:
            return "no node has connected to this broker"
        more = f" and {len(names) - limit} more" if len(names) > limit else ""
        return "known nodes are " + ", ".join(names[:limit]) + more
