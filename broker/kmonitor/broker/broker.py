# SPDX-License-Identifier: Apache-2.0
"""The broker without its transport: everything runs on one event loop, and nothing here waits for a monitor."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from kmonitor.broker.agents import Agents
from kmonitor.broker.arming import NO_NODE, Arming
from kmonitor.broker.block import Block
from kmonitor.broker.encode import Encoder
from kmonitor.broker.errors import Code, RefusedError
from kmonitor.broker.log import EventLog
from kmonitor.broker.matching import Span
from kmonitor.broker.nodes import Node, Nodes
from kmonitor.broker.notices import deregistered, node_change, registered
from kmonitor.broker.outbox import Outbox
from kmonitor.broker.registrations import Registration, Request, parse_found, parse_key
from kmonitor.broker.router import Router
from kmonitor.broker.sessions import Session
from kmonitor.v1 import monitor_pb2
from kmonitor.wire.errors import UsageError
from kmonitor.wire.selectors import check_glob, check_node_selector, check_pid, node_matches

DEFAULT_LEASE = 3.0  # seconds
DEFAULT_PROGRESS_INTERVAL = 1.0  # seconds


class Broker:
    """Log, router, nodes and sessions put together. Make it on a running event loop."""

    def __init__(self, log: EventLog, *, lease: float = DEFAULT_LEASE, progress_interval: float = DEFAULT_PROGRESS_INTERVAL) -> None:
        """`lease` and `progress_interval` in seconds."""
        self.log = log
        self.encoder = Encoder()
        self.lagging: set[Outbox] = set()
        self.sessions: dict[Session, None] = {}
        self.nodes = Nodes(asyncio.get_running_loop().time() + lease)
        self.router = Router(self._child_made, self._process_ended, self._orphan_found)
        self.arming = Arming(self.nodes, self.router, log)
        self.agents = Agents(self, lease)
        self._progress_interval = progress_interval
        self._ticker: asyncio.TimerHandle | None = None
        log.on_evict = self._evicting
        self._tick()

    # -- monitors

    def open_session(self) -> Session:
        """A new stream's session. Give it back to `close_session`."""
        session = Session(self.log, self.encoder, self.router, self.lagging)
        self.sessions[session] = None
        return session

    def close_session(self, session: Session) -> None:
        """The stream has ended: all that it registered goes."""
        if session not in self.sessions:
            return
        del self.sessions[session]
        for registration in list(session.registrations.values()):
            self.arming.shrink(registration, registration.mask)
        # Those that a process's end took out of `registrations` may have spans that linger.
        for node in self.nodes:
            for span in session.matcher.spans(node.name):
                self.router.end(span, node.position, self.log.end)
        session.registrations.clear()
        session.outbox.close()

    def register(
        self,
        session: Session,
        request_id: int,
        message: monitor_pb2.Registration,
        found: Iterable[monitor_pb2.RegisterRequest.FoundProcess] = (),
    ) -> None:
        """Register, or add bits to what is registered. The answers go to the session. Raises RefusedError."""
        try:
            key = parse_key(message)
            processes = parse_found(found, key.target)
        except UsageError as error:
            raise RefusedError(Code.INVALID_ARGUMENT, str(error)) from None
        unknown = [name for name in key.exact_names if self.nodes.get(name) is None]
        if unknown and not self.nodes.settling:
            raise RefusedError(Code.NOT_FOUND, f"unknown node {unknown[0]!r}: {self.nodes.names()}")
        registration = session.registrations.get(key)
        if registration is None:
            if any(other.id == request_id for other in session.registrations.values()):
                raise RefusedError(Code.INVALID_ARGUMENT, f"request id {request_id} names a registration of this stream already")
            registration = Registration(session, request_id, key, message.target, 0)
            session.registrations[key] = registration
        registration.mask |= message.event_mask
        registration.found |= processes
        names = [node.name for node in self.nodes.selected(key)] + unknown
        request = Request(request_id, len(names))
        for name in names:
            self.arming.arm(registration, name, request, message.event_mask)
        if not names:
            registration.granted = True
            session.tell(
                registered(
                    monitor_pb2.Registered(
                        request_id=request_id,
                        registration_id=registration.id,
                        state=NO_NODE,
                        event_mask=registration.mask,
                        target=registration.target,
                    )
                )
            )

    def deregister(self, session: Session, request_id: int, message: monitor_pb2.Registration) -> None:
        """Clear bits of a registration. The answer goes to the session. Raises RefusedError."""
        try:
            key = parse_key(message)
        except UsageError as error:
            raise RefusedError(Code.INVALID_ARGUMENT, str(error)) from None
        registration = session.registrations.get(key)
        if registration is None:
            raise RefusedError(Code.NOT_FOUND, "nothing is registered with these nodes, target and filter")
        self.arming.shrink(registration, message.event_mask)
        if not registration.mask:
            del session.registrations[key]
        answer = monitor_pb2.Deregistered(request_id=request_id, registration_id=registration.id, event_mask=registration.mask)
        session.tell(deregistered(answer))

    def resume(self, session: Session, cursor: monitor_pb2.Cursor) -> None:
        """The client has taken so much from an earlier stream. What came between is told as a gap of reason LOG.

        Not from the log itself: with the earlier stream its interest ended, so the log may lack what came between.
        """
        session.cursor = {item.node: (item.epoch, item.position) for item in cursor.positions}

    def watch(self, session: Session, request: monitor_pb2.WatchRequest) -> None:
        """One request of a Watch stream: refusals are answers."""
        kind = request.WhichOneof("kind")
        if not session.registrations and request.HasField("cursor"):
            self.resume(session, request.cursor)
        try:
            if kind == "register":
                self.register(session, request.request_id, request.register.registration, request.register.found)
            elif kind == "deregister":
                self.deregister(session, request.request_id, request.deregister.registration)
            else:
                raise RefusedError(Code.INVALID_ARGUMENT, "the request is neither register nor deregister")  # noqa: TRY301 -- one way out
        except RefusedError as refusal:
            error = monitor_pb2.RequestError(code=refusal.code, message=str(refusal))
            if kind == "deregister":
                session.tell(deregistered(monitor_pb2.Deregistered(request_id=request.request_id, error=error)))
            else:
                session.tell(registered(monitor_pb2.Registered(request_id=request.request_id, error=error)))

    def list_nodes(self, selector: monitor_pb2.NodeSelector) -> list[monitor_pb2.Node]:
        """The known nodes, by name. Raises RefusedError."""
        try:
            check_node_selector(selector.names, selector.labels)
        except UsageError as error:
            raise RefusedError(Code.INVALID_ARGUMENT, str(error)) from None
        chosen = [node for node in self.nodes if node_matches(node.name, node.labels, selector.names, selector.labels)]
        return [node.describe() for node in sorted(chosen, key=lambda node: node.name)]

    async def list_processes(self, name: str, wanted: monitor_pb2.ProcessFilter) -> monitor_pb2.ListProcessesResponse:
        """The processes of one node, from its agent. Raises RefusedError."""
        if not name:
            raise RefusedError(Code.INVALID_ARGUMENT, "name one node")
        try:
            for glob in wanted.comms:
                check_glob(glob, "comm")
            for pid in wanted.pids:
                check_pid(pid)
        except UsageError as error:
            raise RefusedError(Code.INVALID_ARGUMENT, str(error)) from None
        node = self.nodes.get(name)
        if node is None:
            raise RefusedError(Code.NOT_FOUND, f"unknown node {name!r}: {self.nodes.names()}")
        if node.link is None:
            raise RefusedError(Code.UNAVAILABLE, f"node {name} is not connected")
        boot_id = node.boot_id  # of the agent that is asked; by the time it answers no other can have come
        answer = await node.link.list_processes(wanted)
        if answer.error:
            raise RefusedError(Code.UNAVAILABLE, f"node {name}: {answer.error}")
        return monitor_pb2.ListProcessesResponse(node=name, processes=answer.processes, boot_id=boot_id)

    # -- what agents bring

    def store(self, block: Block) -> None:
        """Put a block into the log and route it."""
        self.log.append(block)
        self.router.route(block)
        block.trim()

    def tell_watchers(self, node: Node, message: bytes) -> None:
        """To all sessions with open spans on a node."""
        for session in self.sessions:
            if session.matcher.watches(node.name):
                session.tell(message)

    def tell_concerned(self, node: Node, state: monitor_pb2.NodeState.ValueType, reason: str) -> None:
        """A node came or went: to all sessions with registrations there."""
        for session in self.sessions:
            ids = session.concerned(node)
            if ids:
                session.tell(node_change(node.name, state, node.boot_id, reason, ids))

    def stop(self, reason: str) -> None:
        """End all streams."""
        failure = RefusedError(Code.UNAVAILABLE, reason)
        if self._ticker is not None:
            self._ticker.cancel()
        self.agents.stop(failure)
        for session in self.sessions:
            session.fail(failure)

    def _child_made(self, span: Span) -> None:
        self.arming.child_made(span)

    def _orphan_found(self, span: Span) -> bool:
        return self.arming.orphan_found(span)

    def _process_ended(self, span: Span) -> None:
        self.arming.process_ended(span)

    def _evicting(self, until: int) -> None:
        for block in self.log.read(self.log.oldest, 1 << 62):
            if block.offset >= until:
                break
            if isinstance(block, Block):
                for outbox in list(self.lagging):
                    outbox.evicting(block)
                self.encoder.drop(block)

    def _tick(self) -> None:
        """Every `progress_interval`: progress for all, and what is kept for late records goes."""
        self.router.retire(self._position_of, self.log.end)
        known = {node.name: (node.name, node.epoch, node.position, node.time_ns) for node in self.nodes}
        for session in self.sessions:
            session.outbox.prune(self.log.end)
            session.progress([known[name] for name in session.matcher.nodes()])
        self._ticker = asyncio.get_running_loop().call_later(self._progress_interval, self._tick)

    def _position_of(self, name: str) -> int:
        node = self.nodes.get(name)
        return node.position if node is not None else 0
