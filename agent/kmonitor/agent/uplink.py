# SPDX-License-Identifier: Apache-2.0
"""AgentService.Connect, whatever is sent through it: one stream at a time, made again whenever it breaks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import re
from collections.abc import Coroutine
from typing import Any

import grpc
import grpc.aio

from kmonitor.agent.errors import BrokerMessageError, NodeNameTakenError, ProtocolError, RingWentBackError
from kmonitor.agent.forwarder import Forwarder
from kmonitor.agent.identity import Identity
from kmonitor.agent.orders import Orders, check_position, decode
from kmonitor.agent.pace import GATHER_S
from kmonitor.agent.source import Feed
from kmonitor.v1 import agent_pb2
from kmonitor.wire.clocks import boot_id
from kmonitor.wire.errors import KmonitorError, NotAuthorisedError
from kmonitor.wire.grpc_words import plain_reason
from kmonitor.wire.plain import plain_text
from kmonitor.wire.record import RECORD_SIZE, SLOT_SIZE
from kmonitor.wire.version import installed_version

log = logging.getLogger("kmonitor-agent")

_BACKOFF_FIRST = 0.1
HEARTBEAT_MOST_S = 1.0
"""However long the lease is: so often monitors can be told how far all is complete."""
_BACKOFF_MOST = 2.0
_CONNECT_TIMEOUT = 5.0
"""For a connection. A broker that there is one to may take longer to answer: see `_greet`."""
_DRAIN_TIMEOUT = 1.0
_NAME_TAKEN_TIMEOUT = 10.0
"""Longer than a lease: the one that holds the name may be this node's last stream, which the broker has not missed yet."""

_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
    # A broker that has stopped, or whose machine is gone, sends no word of it.
    ("grpc.keepalive_time_ms", 3000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.http2.ping_timeout_ms", 3000),  # what ends the stream of one that has stopped: it is a minute else
    ("grpc.http2.max_pings_without_data", 0),  # as many as it takes: else two, and then one a minute
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),  # a proxy for the web in the environment is not for this
    # Each attempt is a channel of its own: its back-off is ours alone.
    ("grpc.use_local_subchannel_pool", 1),
]

_LEASE_LEAST_MS = 10
_LEASE_MOST_MS = 24 * 3600 * 1000
_REASON_MOST = 500
"""Characters of what a broker says that are shown."""
_HOLDER = re.compile(r"the agent (at [0-9A-Za-z.:%_\[\]-]{1,64})")

_CONNECT = "/kmonitor.v1.AgentService/Connect"

_Call = Any  # grpc.aio.StreamStreamCall of serialised AgentMessages and of BrokerMessages; it is not generic at run time


class Uplink:
    """Keeps a feed connected to the broker until it is stopped."""

    def __init__(self, address: str, identity: Identity, feed: Feed, gather_s: float = GATHER_S) -> None:
        """`gather_s`: see Forwarder."""
        self._address = address
        self._identity = identity
        self._feed = feed
        self._gather_s = gather_s
        self._stopping = asyncio.Event()
        self._boot_id = boot_id()
        self._complaint = ""
        self.was_connected = False
        """Whether a broker has ever taken a stream of it."""

    def stop(self) -> None:
        """Send what is there, wait a moment for its acknowledgement, and end `run`."""
        self._stopping.set()

    async def run(self) -> None:
        """Until `stop`. Raises NodeNameTakenError, ProtocolError, NotAuthorisedError if there is no point in trying again."""
        loop = asyncio.get_running_loop()
        try:
            await self._run_streams(loop)
        finally:
            loop.remove_reader(self._feed.ring.wakeups.fileno())

    # -- what is different in each

    def _add_to_hello(self, hello: agent_pb2.Hello) -> None:
        """What this one says beside what all do."""

    def _connected(self) -> None:
        """The broker has taken the stream."""

    def _jobs(self, forwarder: Forwarder) -> list[Coroutine[Any, Any, Any]]:
        """What is to be done while a stream lasts, beside sending; one that ends, ends it."""
        del forwarder
        return []

    async def _take(self, message: agent_pb2.BrokerMessage, forwarder: Forwarder) -> None:
        """Any message but welcome and acknowledgement."""

    async def _disconnected(self) -> None:
        """Behind each stream that had been taken."""

    # -- what is the same

    def _attend(self, loop: asyncio.AbstractEventLoop) -> None:
        """While there is no stream, whose forwarder does this: a ring that this process fills itself must not fall behind."""
        loop.add_reader(self._feed.ring.wakeups.fileno(), self._feed.ring.awake)
        self._feed.ring.awake()

    async def _run_streams(self, loop: asyncio.AbstractEventLoop) -> None:
        delay = _BACKOFF_FIRST
        taken_since: float | None = None
        while not self._stopping.is_set():
            self._attend(loop)
            try:
                await self._one_stream()
                delay, taken_since = _BACKOFF_FIRST, None
            except NodeNameTakenError as error:
                if taken_since is None:
                    taken_since = loop.time()
                    log.warning("%s; trying for %.0f s more", error, _NAME_TAKEN_TIMEOUT)
                if loop.time() - taken_since > _NAME_TAKEN_TIMEOUT:
                    raise
            except RingWentBackError as error:
                log.warning(
                    "the broker at %s knows another ring by the name of this one, as after a snapshot was restored (%s): going on in a new "
                    "epoch; monitors are told of a gap",
                    self._address,
                    error,
                )
                self._feed.begin_epoch()
                taken_since = None
            except BrokerMessageError as error:
                self._complain(f"the broker at {self._address} says what cannot be ({error}): trying again")
                taken_since = None
            except grpc.aio.AioRpcError as error:
                self._complain(f"no broker answers at {self._address} ({_reason(error)}): trying again")
                taken_since = None
            if self._stopping.is_set():
                return
            self._attend(loop)
            # Full jitter: a cluster's agents do not come back in step.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(random.uniform(0.02, delay)):
                    await self._stopping.wait()
            delay = min(delay * 2, _BACKOFF_MOST)

    async def _one_stream(self) -> None:
        """Connect and serve until the stream ends; returns if it had been accepted."""
        async with grpc.aio.insecure_channel(self._address, options=_OPTIONS) as channel:
            call: _Call = channel.stream_stream(_CONNECT, request_serializer=None, response_deserializer=decode)()
            forwarder = Forwarder(self._feed, call.write, self._gather_s)
            try:
                lease = await self._handshake(channel, call, forwarder)
            except grpc.aio.AioRpcError as error:
                raise self._final(error) or error from None
            except TimeoutError:
                if not self._stopping.is_set():
                    self._complain(f"the broker at {self._address} does not answer: trying again")
                return
            finally:
                if self._stopping.is_set():
                    call.cancel()
            self._complaint = ""
            self.was_connected = True
            self._connected()
            await self._serve(call, forwarder, lease)

    async def _handshake(self, channel: grpc.aio.Channel, call: _Call, forwarder: Forwarder) -> float:
        """Say hello; the lease in seconds."""
        ring = self._feed.ring
        ring.rewind()
        hello = agent_pb2.Hello(
            node=self._identity.node,
            boot_id=self._boot_id,
            epoch=self._feed.epoch,
            position=ring.consumer,
            record_version=self._feed.record_version,
            record_size=RECORD_SIZE,
            slot_size=SLOT_SIZE,
            source=self._feed.name,
            scope=self._identity.scope,
            kernel_release=os.uname().release,
            agent_version=installed_version(),
            labels=self._identity.labels,
            lost=forwarder.totals(),
            ring_bytes=ring.size,
            counts_bytes=True,
            secret=self._feed.secret,
            end_position=ring.producer,
            takes_parts=True,
        )
        self._add_to_hello(hello)
        first = await self._greet(channel, call, hello)
        if first is grpc.aio.EOF or first is None or first.WhichOneof("kind") != "welcome":
            raise ProtocolError(f"what answers at {self._address} is no kmonitor broker of this version")
        welcome = first.welcome
        if welcome.position > ring.producer:
            # A broker of an older version does not look itself.
            raise RingWentBackError(f"it has all before position {welcome.position}, and this ring has come to {ring.producer}")
        check_position("a welcome", welcome.position, ring.producer)
        if not _LEASE_LEAST_MS <= welcome.lease_ms <= _LEASE_MOST_MS:
            raise BrokerMessageError(f"a lease of {welcome.lease_ms} ms")
        # Nothing is released for it: whether the broker has this very ring is only known when it acknowledges what is sent now.
        ring.rewind(welcome.position)
        forwarder.in_parts = welcome.takes_parts
        return float(welcome.lease_ms) / 1000

    async def _greet(self, channel: grpc.aio.Channel, call: _Call, hello: agent_pb2.Hello) -> Any:
        """Say hello, and return what is answered. Raises TimeoutError if there is no connection in time, or the agent is to stop.

        A broker that has just started has many agents to take, and is no sooner done with those who give up and begin again. Whether it
        is still there the pings say, which end the stream if they are not answered.
        """

        async def exchange() -> Any:
            await call.write(agent_pb2.AgentMessage(hello=hello).SerializeToString())
            return await call.read()

        tasks = [asyncio.ensure_future(exchange()), asyncio.ensure_future(self._stopping.wait())]
        try:
            await asyncio.wait(tasks, timeout=_CONNECT_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
            if not self._stopping.is_set() and channel.get_state() is grpc.ChannelConnectivity.READY:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise TimeoutError
            return tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, call: _Call, forwarder: Forwarder, lease: float) -> None:
        # The forwarder's own first: it is the one that must not send while the ring is drained.
        jobs = [
            forwarder.run(),
            self._receive(call, forwarder),
            forwarder.tell_late(),
            forwarder.heartbeat(min(lease / 3, HEARTBEAT_MOST_S)),
        ]
        tasks = [asyncio.create_task(job) for job in [*jobs, self._stopping.wait(), *self._jobs(forwarder)]]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if self._stopping.is_set():
                await self._leave(call, forwarder, tasks)
                return
            for task in done:
                task.result()  # raises what ended the stream
            log.warning("the broker at %s closed the stream: trying again", self._address)
        except grpc.aio.AioRpcError as error:
            if final := self._final(error):
                raise final from None
            log.warning("the stream to %s broke (%s): trying again", self._address, _reason(error))
        except asyncio.InvalidStateError:
            # grpc.aio says so when something is written to a call that has ended meanwhile: the reader knows why.
            ended = grpc.aio.AioRpcError(await call.code(), grpc.aio.Metadata(), grpc.aio.Metadata(), await call.details())
            if final := self._final(ended):
                raise final from None
            log.warning("the stream to %s broke (%s): trying again", self._address, _reason(ended))
        finally:
            call.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._disconnected()

    async def _leave(self, call: _Call, forwarder: Forwarder, tasks: list[asyncio.Task[Any]]) -> None:
        """Everything that is in the ring is sent, and the broker's answer awaited, so that the pinned ring is left empty."""
        tasks[0].cancel()
        await asyncio.wait([tasks[0]])
        with contextlib.suppress(TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
            async with asyncio.timeout(_DRAIN_TIMEOUT):
                await forwarder.drain()
                await call.done_writing()
                await call.code()  # the broker has read to the end: cancelled before, it would take it for a break

    async def _receive(self, call: _Call, forwarder: Forwarder) -> None:
        orders = Orders()
        while (message := await call.read()) is not grpc.aio.EOF:
            order = orders.take(message)
            if order is None:
                continue
            if order.WhichOneof("kind") == "ack":
                forwarder.acknowledge(order.ack)
            else:
                await self._take(order, forwarder)
        code = await call.code()
        if code is not grpc.StatusCode.OK:
            raise grpc.aio.AioRpcError(code, await call.initial_metadata(), await call.trailing_metadata(), await call.details())

    def _complain(self, text: str) -> None:
        """Once, until something else is to be said: an outage of an hour is not a thousand lines."""
        if text != self._complaint:
            log.warning("%s", text)
            self._complaint = text

    def _final(self, error: grpc.aio.AioRpcError) -> KmonitorError | None:
        """What to say of an error that trying again cannot mend; None if it can."""
        code, details = error.code(), _reason(error)
        if code is grpc.StatusCode.ALREADY_EXISTS:
            at = f", {found[1]}," if (found := _HOLDER.search(details)) else ","
            return NodeNameTakenError(
                f"node {self._identity.node} is connected to {self._address} already: stop the other agent{at} or give this one another "
                "--node"
            )
        if code is grpc.StatusCode.DATA_LOSS:
            return RingWentBackError(details)
        if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED):
            return ProtocolError(f"the broker at {self._address} refuses this agent: {details}")
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            return NotAuthorisedError(f"the broker at {self._address} does not let this agent in: {details}")
        return None


def _reason(error: grpc.aio.AioRpcError) -> str:
    first = (error.details() or "").strip().splitlines()
    return plain_text(plain_reason(first[0])[:_REASON_MOST]) if first else error.code().name
