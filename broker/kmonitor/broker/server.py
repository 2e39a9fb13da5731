# SPDX-License-Identifier: Apache-2.0
"""gRPC in front of the broker: thin handlers. Notifications pass through as the bytes that they already are."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kmonitor.broker import reflection
from kmonitor.broker.broker import Broker
from kmonitor.broker.errors import Code, RefusedError
from kmonitor.broker.nodes import Link
from kmonitor.broker.seldom import Seldom
from kmonitor.broker.sessions import Session
from kmonitor.broker.slices import Slices
from kmonitor.broker.turns import Turns
from kmonitor.v1 import agent_pb2, monitor_pb2
from kmonitor.wire.errors import UsageError
from kmonitor.wire.version import installed_version

logger = logging.getLogger(__name__)
_seldom = Seldom(logger)


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether what gRPC logs is worth a traceback: neither that a peer died while something was written to it, nor that a request
    is no message, which is a line of ours."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, DecodeError):
        _seldom.warning("a request cannot be read, and was refused: %s", error)
    return not isinstance(error, DecodeError | grpc.aio.InternalError)


logging.getLogger("grpc._cython.cygrpc").addFilter(_is_news)


MONITOR_SERVICE = "kmonitor.v1.MonitorService"
AGENT_SERVICE = "kmonitor.v1.AgentService"
MAX_REQUEST = 8 << 20
"""Bytes of one message to the broker: blocks are up to 4 MiB."""

_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a second broker that gets half of the streams
    ("grpc.max_receive_message_length", MAX_REQUEST),
    ("grpc.keepalive_time_ms", 10_000),  # a peer that is gone without a word is noticed
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
]

Context = grpc.aio.ServicerContext[Any, Any]


class _ClosedError(Exception):
    """The client has said that it will not come back."""


class Server:
    """One listening broker."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._turns = Turns()
        self._slices = Slices()
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(options=_OPTIONS)
        self._server.add_generic_rpc_handlers((self._monitor_handlers(), self._agent_handlers()))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.add_to(self._server, (MONITOR_SERVICE, AGENT_SERVICE, health.SERVICE_NAME))

    async def start(self, address: str) -> int:
        """Listen, and return the port. Raises UsageError if that is not possible."""
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError:
            port = 0
        if port == 0:
            raise UsageError(f"cannot listen on {address}: the address is in use, or not one of this host")
        await self._server.start()
        for name in ("", MONITOR_SERVICE, AGENT_SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return port

    async def stop(self, grace: float, *, drain: float = 0.0) -> None:
        """Take no more streams, bring to an end what is under way (`drain` seconds at most), end all streams with UNAVAILABLE, and stop.
        `grace` in seconds, for gRPC."""
        await self._health.enter_graceful_shutdown()
        if drain:
            await self._broker.drain(drain)
        self._broker.stop()
        await self._server.stop(grace)

    def _monitor_handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            MONITOR_SERVICE,
            {
                "Watch": grpc.stream_stream_rpc_method_handler(
                    self._watch, request_deserializer=monitor_pb2.WatchRequest.FromString, response_serializer=None
                ),
                "Subscribe": grpc.unary_stream_rpc_method_handler(
                    self._subscribe, request_deserializer=monitor_pb2.SubscribeRequest.FromString, response_serializer=None
                ),
                "ListNodes": grpc.unary_unary_rpc_method_handler(
                    self._list_nodes,
                    request_deserializer=monitor_pb2.ListNodesRequest.FromString,
                    response_serializer=monitor_pb2.ListNodesResponse.SerializeToString,
                ),
                "RemoveNode": grpc.unary_unary_rpc_method_handler(
                    self._remove_node,
                    request_deserializer=monitor_pb2.RemoveNodeRequest.FromString,
                    response_serializer=monitor_pb2.RemoveNodeResponse.SerializeToString,
                ),
                "ListProcesses": grpc.unary_unary_rpc_method_handler(
                    self._list_processes,
                    request_deserializer=monitor_pb2.ListProcessesRequest.FromString,
                    response_serializer=monitor_pb2.ListProcessesResponse.SerializeToString,
                ),
            },
        )

    def _agent_handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            AGENT_SERVICE,
            {
                "Connect": grpc.stream_stream_rpc_method_handler(
                    self._connect,
                    request_deserializer=agent_pb2.AgentMessage.FromString,
                    response_serializer=agent_pb2.BrokerMessage.SerializeToString,
                )
            },
        )

    async def _watch(self, requests: AsyncIterator[monitor_pb2.WatchRequest], context: Context) -> None:
        async def take_requests(session: Session) -> None:
            async for request in requests:
                if request.HasField("cursor"):
                    await self._broker.locate(session, request.cursor)
                if not await self._slices.do(partial(self._broker.watch, session, request)):
                    raise _ClosedError
                await session.ready_for_request()
            # A client that has said all it wants to say still listens.

        await self._serve(context, take_requests)

    async def _subscribe(self, request: monitor_pb2.SubscribeRequest, context: Context) -> None:
        async def take_requests(session: Session) -> None:
            if not request.registrations:
                raise RefusedError(Code.INVALID_ARGUMENT, "the request has no registrations: give at least one")
            if request.HasField("linger_ms"):
                self._broker.linger(session, request.linger_ms)
            if request.HasField("cursor"):
                await self._broker.locate(session, request.cursor)
                self._broker.resume(session, request.cursor, len(request.registrations))

            def register(index: int, registration: monitor_pb2.Registration) -> None:
                self._broker.register(session, index, registration)
                self._broker.resumed(session)

            for index, registration in enumerate(request.registrations):
                await self._slices.do(partial(register, index, registration))

        await self._serve(context, take_requests)

    async def _serve(self, context: Context, take_requests: Callable[[Session], Awaitable[None]]) -> None:
        """One monitor's stream, from its first request to its end."""
        self._slices.stream_came()
        try:
            session = self._broker.open_session()
        except RefusedError as refusal:
            await _abort(context, refusal)

        async def send() -> None:
            async for batch in session.batches(self._turns):
                for message in batch:
                    await context.write(message)
                    session.outbox.has_read()

        sending = asyncio.ensure_future(send())
        taking = asyncio.ensure_future(take_requests(session))
        closed = False
        try:
            await _first_failure(sending, taking)
        except _ClosedError:
            closed = True
        except RefusedError as refusal:
            await _abort(context, refusal)
        finally:
            self._broker.close_session(session, for_good=closed)
            await _cancel(sending, taking)

    async def _list_nodes(self, request: monitor_pb2.ListNodesRequest, context: Context) -> monitor_pb2.ListNodesResponse:
        try:
            found = self._broker.list_nodes(request.nodes)
            return monitor_pb2.ListNodesResponse(nodes=found, broker_version=installed_version())
        except RefusedError as refusal:
            await _abort(context, refusal)

    async def _remove_node(self, request: monitor_pb2.RemoveNodeRequest, context: Context) -> monitor_pb2.RemoveNodeResponse:
        try:
            self._broker.remove_node(request.node)
        except RefusedError as refusal:
            await _abort(context, refusal)
        return monitor_pb2.RemoveNodeResponse()

    async def _list_processes(self, request: monitor_pb2.ListProcessesRequest, context: Context) -> monitor_pb2.ListProcessesResponse:
        try:
            return await self._broker.list_processes(request.node, request.filter, with_args=request.with_args)
        except RefusedError as refusal:
            await _abort(context, refusal)

    async def _connect(self, messages: AsyncIterator[agent_pb2.AgentMessage], context: Context) -> None:
        link: Link | None = None
        sending: asyncio.Future[None] | None = None
        taking: asyncio.Future[None] | None = None
        reason = "its agent's stream broke"
        self._slices.stream_came()
        try:
            first = await anext(messages, None)
            if first is None or first.WhichOneof("kind") != "hello":
                raise RefusedError(Code.INVALID_ARGUMENT, "the first message is no hello")  # noqa: TRY301 -- as all refusals below
            link = self._broker.agents.connect(first.hello, _host(context.peer()))
            self._slices.stream_came()
            sending = asyncio.ensure_future(_send_to_agent(link, context))
            taking = asyncio.ensure_future(self._take_from_agent(link, messages))
            await _first_end(sending, taking)
            reason = "its agent ended the stream"
        except RefusedError as refusal:
            reason = str(refusal)
            if link is None or link.failure is None:
                _seldom.warning("agent of %s refused: %s", context.peer(), reason)
            await _abort(context, refusal)
        finally:
            if link is not None:
                self._broker.agents.disconnect(link, reason)
            await _cancel(*(task for task in (sending, taking) if task is not None))

    async def _take_from_agent(self, link: Link, messages: AsyncIterator[agent_pb2.AgentMessage]) -> None:
        async for message in messages:
            self._broker.agents.receive(link, message)
            await link.ready.wait()


def _host(peer: str) -> str:
    """Return the address without its port, from "ipv4:127.0.0.1:40000", "ipv6:%5B::1%5D:40000", "unix:"."""
    kind, _, rest = urllib.parse.unquote(peer).partition(":")
    return rest.rpartition(":")[0] if kind in {"ipv4", "ipv6"} else kind


async def _send_to_agent(link: Link, context: Context) -> None:
    while True:
        await link.filled.wait()
        if link.failure is not None:
            raise link.failure
        for message in link.take():
            await context.write(message)


async def _first_failure(sending: asyncio.Future[None], taking: asyncio.Future[None]) -> None:
    """Return when the sender ends, raise what either raises."""
    await asyncio.wait((sending, taking), return_when=asyncio.FIRST_EXCEPTION)
    for task in (taking, sending):
        if task.done():
            task.result()


async def _first_end(*tasks: asyncio.Future[None]) -> None:
    """Return when any ends, or raise what it raised."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


async def _cancel(*tasks: asyncio.Future[None]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        # What a task failed with was told already, or is that its stream is no more.
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


async def _abort(context: Context, refusal: RefusedError) -> NoReturn:
    await context.abort(_STATUS[refusal.code], str(refusal))


_STATUS = {status.value[0]: status for status in grpc.StatusCode}
