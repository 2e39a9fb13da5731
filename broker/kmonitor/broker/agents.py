# SPDX-License-Identifier: Apache-2.0
"""The agents' side of the broker: who is connected, what they send, and when they count as gone."""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from kmonitor.broker.block import Block
from kmonitor.broker.errors import Code, RefusedError
from kmonitor.broker.hello import check_hello, check_proof, check_ring, remember_secret, ring_bytes, take_secret, went_back
from kmonitor.broker.idle import Backlog
from kmonitor.broker.mark import Mark, MarkKind
from kmonitor.broker.nodes import RING_BYTES, LastRecord, Link, Node
from kmonitor.v1 import agent_pb2, monitor_pb2
from kmonitor.wire.errors import BadRecordError
from kmonitor.wire.masks import EventType
from kmonitor.wire.record import SLOT_SIZE, record_starts

if TYPE_CHECKING:
    from kmonitor.broker.broker import Broker

logger = logging.getLogger(__name__)

UP = monitor_pb2.NODE_STATE_UP
UNREACHABLE = monitor_pb2.NODE_STATE_UNREACHABLE
REBOOTED = monitor_pb2.NODE_STATE_REBOOTED

LATE_LOSSES_MOST = 256
"""Losses that one stream tells before the records around them: that of the hello is one."""
LEASES_MOST = 10
"""However busy the broker is: it would miss no agent any more."""
NODES_MOST = 16_384
"""Names that are known at once."""


class Agents:
    """Takes what agents say. One link a node; a node whose link says nothing for a lease is unreachable."""

    def __init__(self, broker: Broker, lease: float) -> None:
        """`lease` in seconds."""
        self._broker = broker
        self._lease = lease
        self._loop = asyncio.get_running_loop()
        self._timers: dict[Link, asyncio.Handle] = {}

    def connect(self, hello: agent_pb2.Hello, peer: str = "") -> Link:
        """An agent's first message, from an address. Raises RefusedError if it cannot be this node's agent now."""
        node, proof = self._admit(hello)
        try:
            return self._connect(node, hello, proof, peer)
        except RefusedError:
            raise
        except Exception:
            # Whatever it has said that nobody thought of: the next agent of this node must not suffer for it.
            node.link = node.drain = None
            self._unreachable(node, "its agent's hello could not be dealt with")
            raise

    def _admit(self, hello: agent_pb2.Hello) -> tuple[Node, bytes]:
        """The node, and the hash of the secret that was shown. Raises RefusedError before anything has changed."""
        check_hello(hello)
        proof = take_secret(hello)
        if self._broker.failure is not None:
            raise self._broker.failure
        node = self._broker.nodes.get(hello.node)
        if node is None:
            if len(self._broker.nodes) >= NODES_MOST:
                raise RefusedError(
                    Code.RESOURCE_EXHAUSTED,
                    f"node {hello.node}: this broker knows {NODES_MOST} nodes, and takes no more: remove those that will not come back",
                )
            return self._broker.nodes.meet(hello.node), proof
        holder = node.link or node.drain
        # The pinned ring has one holder: who shows its secret has taken it over from the one that is connected.
        if holder is not None and (node.boot_id, node.epoch) != (hello.boot_id, hello.epoch):
            raise RefusedError(
                Code.ALREADY_EXISTS,
                f"node {node.name} is connected already, by the agent at {holder.peer or 'another address'} (boot {node.boot_id}): "
                "give this one another --node",
            )
        check_proof(node, hello, proof, None if holder is None else holder.peer or "another address")
        if (node.boot_id, node.epoch) == (hello.boot_id, hello.epoch):
            check_ring(node, hello, node.expected)
        elif (known := self._broker.log.ends(node.name).get(hello.epoch)) is not None:
            check_ring(node, hello, known.position)
            if node.boot_id != hello.boot_id and hello.HasField("end_position"):
                # What was watched in that boot was said to have ended, in records of ours at positions that were free.
                raise went_back(node, "it is of a boot that was taken to be over")
        return node, proof

    def _connect(self, node: Node, hello: agent_pb2.Hello, proof: bytes, peer: str) -> Link:
        new = not node.boot_id
        rebooted = not new and node.boot_id != hello.boot_id
        restarted = rebooted or (not new and node.epoch != hello.epoch)
        successor = node.link is not None
        for holder in (node.link, node.drain):
            if holder is not None:
                self._end(holder, RefusedError(Code.ABORTED, f"another agent took over node {node.name}"))
        if successor and hello.draining:
            self._unreachable(node, "its agent has ended, and another drains what it left")
        link = Link(node, draining=hello.draining, peer=peer)
        link.takes_parts = hello.takes_parts
        link.heard = self._loop.time()
        remember_secret(node, hello.epoch, proof)
        if hello.draining:
            node.drain = link
            self._take_on(node, hello, new=new, restarted=restarted, rebooted=rebooted)
            interest = None
        else:
            node.link = link
            node.labels = dict(hello.labels)
            if not successor:
                node.since_ns = time.time_ns()
                node.received_bytes = 0
                reason = "its agent connected" if not rebooted else "it is up with another boot id"
                self._broker.tell_concerned(node, REBOOTED if rebooted else UP, reason, hello.boot_id)
            self._take_on(node, hello, new=new, restarted=restarted, rebooted=rebooted)
            end = hello.end_position if hello.HasField("end_position") else hello.position + ring_bytes(hello)
            node.told_position = max(node.told_position, end)
            self._broker.lingering.returned(node)
            sessions = list(self._broker.sessions)
            if restarted:
                self._broker.reconcile.restarted(node, sessions)
            interest = self._broker.reconcile.reconnected(node, sessions=sessions, rebooted=rebooted, epoch=hello.epoch)
        self._broker.remember_node(node)
        welcome = agent_pb2.Welcome(lease_ms=round(self._lease * 1000), position=node.logged, takes_parts=True)
        if new or restarted:
            welcome.position = 0
        elif hello.HasField("end_position"):
            if node.last is not None and hello.position <= node.last.position:
                # It is to send the last record that came once more, by which its ring is known.
                link.proven = False
                welcome.position = min(node.logged, node.last.position)
            link.ack(node.logged, node.expected)  # what the agent has not heard of: it releases nothing for the welcome
        link.send(agent_pb2.BrokerMessage(welcome=welcome))
        if interest is not None:
            link.send_interest(interest)
        self._timers[link] = self._loop.call_later(self._lease, self._check_lease, link, self._loop.time() + self._lease)
        logger.info("node %s: agent %s connected, source %s, epoch %x", node.name, hello.agent_version, hello.source, hello.epoch)
        return link

    def receive(self, link: Link, message: agent_pb2.AgentMessage) -> None:
        """Any later message. Raises RefusedError, after which the stream is to end."""
        if link.failure is not None:
            raise link.failure
        link.heard = self._loop.time()
        node = link.node
        kind = message.WhichOneof("kind")
        if kind == "block":
            self._block(link, message.block)
            link.ack(node.logged, node.expected)
        elif kind == "lost":
            _check_sent(node, message.lost.from_position, "a loss")
            _check_sent(node, message.lost.to_position, "a loss")
            self._lost(node, message.lost)
        elif kind == "heartbeat":
            _check_sent(node, message.heartbeat.position, "a heartbeat")
            node.beats(message.heartbeat)
            self._broker.router.retire(node.name, node.complete_ns, node.position, self._broker.log.end)
            if message.heartbeat.acknowledge:
                link.ack(node.logged, node.expected, urge=True)
        elif kind == "hello":
            raise RefusedError(Code.INVALID_ARGUMENT, "a second hello on one stream")
        elif link.draining:
            raise RefusedError(Code.INVALID_ARGUMENT, f"a stream that drains brings no {kind}")
        elif kind == "applied":
            answer = link.whole(message.applied)
            if answer is not None:
                _check_position(node, answer.position, "an answer")
                if answer.end_position:  # older agents do not say
                    _check_position(node, answer.end_position, "an answer")
                node.told_position = max(node.told_position, answer.position, answer.end_position)
                self._broker.answers.applied(node, answer)
        elif kind == "pidfile_read":
            self._broker.answers.pidfile_read(node, message.pidfile_read)
        elif kind == "groups_changed":
            self._broker.answers.groups_changed(node, message.groups_changed)
        elif kind == "processes":
            link.answered(message.processes)

    def committed(self, offset: int) -> None:
        """The log is safe up to this offset: agents may forget what is in it."""
        for node in self._broker.nodes:
            if node.committed(offset):
                for link in (node.link, node.drain):
                    if link is not None:
                        link.ack(node.logged, node.expected)

    def disconnect(self, link: Link, reason: str) -> None:
        """The stream has ended. Does nothing if it was given up before."""
        if link in (link.node.link, link.node.drain):
            self._end(link, RefusedError(Code.UNAVAILABLE, reason))
            if not link.draining:
                self._unreachable(link.node, reason)

    def stop(self, failure: RefusedError) -> None:
        """End all streams, telling nobody that nodes are gone: the broker is."""
        for link in list(self._timers):
            self._end(link, failure)

    def _take_on(self, node: Node, hello: agent_pb2.Hello, *, new: bool, restarted: bool, rebooted: bool) -> None:
        """From here on the node is what its agent says it is. What is missing for that is marked in the log."""
        node.forget_waiting()
        if rebooted:
            ends = self._broker.reconcile.rebooted(node, self._broker.sessions)
            if ends is not None:
                self._broker.store(ends)
                node.expected = ends.end
        if restarted:
            known = self._broker.log.ends(node.name).get(hello.epoch)
            start = max(hello.position, known.position if known is not None else 0)
            mark = Mark(MarkKind.EPOCH, node.name, hello.boot_id, hello.epoch, 0, start, node.time_ns, time.time_ns(), rebooted=rebooted)
            self._broker.mark(mark)
        if new or restarted:
            known = self._broker.log.ends(node.name).get(hello.epoch)
            start = max(hello.position, known.position if known is not None else 0)
            node.starts_anew(start)
            node.lost = _totals(hello.lost)
        node.hello = hello
        node.epoch = hello.epoch
        if not (new or restarted):
            self._lost(node, hello.lost)
            if hello.position > node.expected:
                self._hole(node, hello.position)

    def _end(self, link: Link, failure: RefusedError) -> None:
        self._timers.pop(link).cancel()
        node = link.node
        if node.link is link:
            node.link = None
        if node.drain is link:
            node.drain = None
        link.close(failure)

    def _unreachable(self, node: Node, reason: str) -> None:
        logger.warning("node %s: unreachable: %s", node.name, reason)
        node.since_ns = time.time_ns()
        self._broker.tell_concerned(node, UNREACHABLE, reason, node.boot_id)
        self._broker.reconcile.disconnected(node)

    def _check_lease(self, link: Link, due: float, backlog: Backlog | None = None) -> None:
        """At the end of a lease. `due`, on the loop's clock: when this should have been called. `backlog`: what was to be dealt with when
        it was first."""
        now = self._loop.time()
        # A broker that was itself held up has not read what agents sent meanwhile: it must not call them dead for that.
        # One that is so all the time would never call any dead: once in a row must do.
        held_up = backlog is None and now - due > self._lease / 4 and not link.spared
        link.spared = held_up or (backlog is not None and link.spared)
        left = self._lease if held_up else link.heard + self._lease - now
        if left > 0:
            self._timers[link] = self._loop.call_later(left, self._check_lease, link, now + left)
            return
        # What has come may wait for its turn, as all do of a broker that has much to do: then turns count, and not seconds.
        backlog = backlog or Backlog(self._loop)
        if backlog.look_again():
            self._timers[link] = self._loop.call_soon(self._check_lease, link, now, backlog)
            return
        if backlog.waits() and now - link.heard < LEASES_MOST * self._lease:
            # Turn by turn, hundreds of agents that wait for it would keep it from ever getting there.
            self._timers[link] = self._loop.call_later(self._lease / 32, self._check_lease, link, now, backlog)
            return
        reason = f"nothing came from its agent for {self._lease:g} s"
        self._end(link, RefusedError(Code.DEADLINE_EXCEEDED, f"lease ran out: {reason}"))
        if not link.draining:
            self._unreachable(link.node, reason)

    def _block(self, link: Link, message: agent_pb2.Block) -> None:
        node, position, data = link.node, message.position, message.data
        _check_position(node, position, "a block")
        node.received_bytes += len(data)
        if position < node.expected:
            # It was sent again because the acknowledgement did not get through.
            same = None if node.last is None else node.last.agrees(position, data)
            if same is False:
                node.disproven = f"another record lies at position {node.last.position if node.last else 0}"
                raise went_back(node, node.disproven)
            link.proven |= bool(same)
            if position + len(data) <= node.expected:
                return
            again = node.expected - position
            block = _parse(node, position, data, message.boottime_to_unix_ns)
            if not _begins_at(block, again):
                raise went_back(node, f"no record begins at position {node.expected}")
            data, position = data[again:], node.expected
        block = _parse(node, position, data, message.boottime_to_unix_ns)
        if position > max(node.expected, node.position):
            self._hole(node, position)
        time_ns = block.unix_ns(len(block) - 1) if len(block) else node.time_ns
        node.boottime_to_unix_ns = block.boottime_to_unix_ns
        node.expected = block.end
        node.last = LastRecord.of(block) or node.last
        self._broker.store(block)
        node.appended(block.offset, block.end)
        node.committed(self._broker.log.committed)
        self._relieve(node)
        node.reached(block.end, time_ns)

    def _relieve(self, node: Node) -> None:
        """While the log cannot be written, rings fill with what nobody may forget yet. Live comes first: what is live already, and
        would fill the ring, is given up for the log. Those who read it there are told of the gap."""
        most = (node.hello.ring_bytes or RING_BYTES) // 2
        if self._broker.trouble and node.expected - node.logged > most:
            until = node.give_up(node.expected - most // 2)
            self._broker.log.give_up(node.name, node.epoch, until)
            for link in (node.link, node.drain):
                if link is not None:
                    link.ack(node.logged, node.expected)

    def _hole(self, node: Node, position: int) -> None:
        """The agent goes on further ahead than the broker has come."""
        mark = Mark(MarkKind.HOLE, node.name, node.boot_id, node.epoch, node.expected, position, node.time_ns, time.time_ns())
        node.expected = position
        self._broker.mark(mark)
        node.appended(mark.offset, position)
        node.committed(self._broker.log.committed)

    def _lost(self, node: Node, message: agent_pb2.Lost) -> None:
        """Tell those whom it may concern what the ring could not take since we last heard."""
        message.from_position = min(message.from_position, message.to_position)
        if message.to_position > node.position:
            # A hello tells of what was lost while there was no stream, before the records around it have come. The gap belongs
            # behind them: who takes it has taken all before it.
            node.late_losses += 1
            if node.late_losses > LATE_LOSSES_MOST:
                raise RefusedError(Code.RESOURCE_EXHAUSTED, f"node {node.name}: it tells of losses before the records around them")
            node.untold[message.to_position] = message.from_position
            node.when_reached(message.to_position, partial(self._lost, node, message))
            return
        node.untold.pop(message.to_position, None)
        totals = _totals(message)
        news = {key: total - node.lost.get(key, 0) for key, total in totals.items() if total > node.lost.get(key, 0)}
        if not news:
            return
        node.lost.update({key: totals[key] for key in news})
        mark = Mark(
            MarkKind.LOST, node.name, node.boot_id, node.epoch, message.from_position, message.to_position,
            message.from_time_unix_nano, message.to_time_unix_nano, news,
        )  # fmt: skip
        self._broker.mark(mark)
        self._broker.remember_node(node)
        if (int(EventType.PROCESS_EXIT), True) in news:
            self._broker.reconcile.ends_lost(node)


_TYPES = frozenset((0, *EventType))


def _totals(lost: agent_pb2.Lost) -> dict[tuple[int, bool], int]:
    return {(int(count.type), count.watched): count.total for count in lost.counts if count.type in _TYPES}


def _parse(node: Node, position: int, data: bytes, boottime_to_unix_ns: int) -> Block:
    try:
        return Block(node.name, node.epoch, position, data, boottime_to_unix_ns, node.boot_id)
    except BadRecordError as error:
        raise RefusedError(Code.INVALID_ARGUMENT, f"node {node.name}: {error}") from None


def _begins_at(block: Block, offset: int) -> bool:
    """Whether a record begins so many bytes behind the block's first."""
    return not offset % SLOT_SIZE and offset // SLOT_SIZE in record_starts(block.slots)


def _check_aligned(node: Node, position: int, what: str) -> None:
    if position % SLOT_SIZE:
        raise RefusedError(Code.INVALID_ARGUMENT, f"node {node.name}: {what} at position {position}, where no record begins")


def _check_sent(node: Node, position: int, what: str) -> None:
    """Raise RefusedError unless all before a position may have come. How long ago is open: a loss may be told late."""
    _check_aligned(node, position, what)
    if position > node.expected:
        raise _beyond(node, what, position)


def _check_position(node: Node, position: int, what: str) -> None:
    """Raise RefusedError unless a position can be one of the node's ring now."""
    _check_aligned(node, position, what)
    ring = ring_bytes(node.hello)
    if position > node.expected + ring:
        raise _beyond(node, what, position)
    if position + ring < node.expected:
        raise went_back(node, f"{what} at position {position}, which is more than its {ring} bytes before {node.expected}")


def _beyond(node: Node, what: str, position: int) -> RefusedError:
    return RefusedError(
        Code.INVALID_ARGUMENT,
        f"node {node.name}: {what} at position {position} is beyond all that can be: {node.expected} have come",
    )
