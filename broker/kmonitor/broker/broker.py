# SPDX-License-Identifier: Apache-2.0
"""The broker without its transport: everything runs on one event loop, and nothing here waits for a monitor."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from functools import partial

from kmonitor.broker.agents import Agents
from kmonitor.broker.answers import Answers
from kmonitor.broker.arming import Arming
from kmonitor.broker.arms import NO_NODE, Arms
from kmonitor.broker.block import Block
from kmonitor.broker.encode import Encoder
from kmonitor.broker.errors import Code, RefusedError
from kmonitor.broker.filters import NO_FILTER
from kmonitor.broker.keeper import LogKeeper
from kmonitor.broker.keys import Key, check_list_length, check_nodes_named, parse_found, parse_key, terms
from kmonitor.broker.log import EventLog
from kmonitor.broker.mark import Mark
from kmonitor.broker.matching import PAST, Span
from kmonitor.broker.nodes import Node, Nodes
from kmonitor.broker.notices import deregistered, node_change, registered
from kmonitor.broker.outbox import READ_SIZE, Outbox
from kmonitor.broker.reconcile import Reconcile
from kmonitor.broker.registrations import Request, make_registration
from kmonitor.broker.resume import Lingering
from kmonitor.broker.router import Router
from kmonitor.broker.sessions import Session
from kmonitor.broker.trim import Trimmer
from kmonitor.v1 import monitor_pb2
from kmonitor.wire.errors import UsageError
from kmonitor.wire.selectors import (
    check_cgroup_path,
    check_comm,
    check_globs,
    check_node_selector,
    check_pid,
    check_unit_name,
)

DEFAULT_LEASE = 3.0  # seconds
DEFAULT_PROGRESS_INTERVAL = 1.0  # seconds
PROGRESS_MOST = 2.0
"""Seconds. Clients take a stream that says nothing for 3 s for a stale one, and one that says nothing for 10 s for one that is gone."""
DEFAULT_LINGER = 10.0  # seconds
LINGER_MOST = 3600  # seconds

_NAME_SHOWN = 253
"""Characters of what somebody took for a node's name."""
FILTERS_MOST = 256
"""Different filters of a session's registrations of all processes."""
COUNTED_MOST = 2048
"""Entries times sessions without a stream that are looked at when the log drops something at once: some 0.1 s, if it were at once."""
COUNTED_S = 0.005
"""For so long at a time what the log drops is counted, seconds; then come others."""

logger = logging.getLogger(__name__)


class Broker:
    """Log, router, nodes and sessions put together. Make it on a running event loop."""

    def __init__(
        self,
        log: EventLog,
        *,
        lease: float = DEFAULT_LEASE,
        progress_interval: float = DEFAULT_PROGRESS_INTERVAL,
        linger: float = DEFAULT_LINGER,
    ) -> None:
        """`lease`, `progress_interval` and `linger` (for streams that do not say how long) in seconds.

        What a log that outlives its broker remembers is taken up: nodes that are still to connect, sessions that wait for their streams.
        """
        loop = asyncio.get_running_loop()
        self.log = log
        self.encoder = Encoder()
        self.lagging: set[Outbox] = set()
        self.sessions: dict[Session, None] = {}
        self.failure: RefusedError | None = None
        """Why no new stream is taken."""
        self.trouble = ""
        """Why nothing gets into the log, if that is so."""
        self.nodes = Nodes(loop.time() + lease)
        self.router = Router(self._child_made, self._process_ended, self._orphan_found)
        arms = Arms(self.nodes, self.router, log)
        self.reconcile = Reconcile(arms)
        self.answers = Answers(arms, self.reconcile)
        self.arming = Arming(arms, self.reconcile)
        self.lingering = Lingering(arms, log, self.sessions, self._forget)
        self.agents = Agents(self, lease)
        self._linger = linger
        self._trimmer = Trimmer()
        self._keeper = LogKeeper(log) if log.durable else None
        self._progress_interval = progress_interval
        self._faulty: set[str] = set()
        """Steps that have failed."""
        self._removed: dict[str, None] = {}
        """Nodes that the log still knows."""
        self._ticker: asyncio.TimerHandle | None = None
        if self._keeper is not None:
            self._keeper.groups(arms)
            self.router.on_group = self._keeper.group_changed
            self._keeper.nodes(arms)
            for session in self._keeper.sessions(arms, self._make_session):
                self.lingering.keep(session)
            log.forget_values()
        self._removed.update((name, None) for name in log.nodes() if self.nodes.get(name) is None)
        log.on_evict = self._evicting
        log.is_missed = self._is_missed
        log.on_commit = self._committed
        log.on_trouble = self._troubled
        self._tick()

    # -- monitors

    def open_session(self) -> Session:
        """A new stream's session. Give it back to `close_session`. Raises RefusedError when the broker is stopping."""
        if self.failure is not None:
            raise self.failure
        session = self._make_session(self._linger)
        if self._keeper is not None and session.linger:
            self._keeper.session_opened(session)
        return session

    def close_session(self, session: Session, *, for_good: bool = False) -> None:
        """The stream has ended. What it registered stays for a while, unless it has closed `for_good`."""
        self.lingering.settle(session)
        if session not in self.sessions or session.detached or self.failure is not None:
            return
        everything = (*session.registrations.values(), *session.past.values())
        stays = bool(everything) and not all(each.taken for each in everything)
        if for_good or not session.linger or not stays:
            self._forget(session)
        else:
            self.lingering.keep(session)
        self._trimmer.soon()

    def linger(self, session: Session, milliseconds: int) -> None:
        """The client says for how long its session is to outlive the stream. Raises RefusedError."""
        if milliseconds > LINGER_MOST * 1000:
            raise RefusedError(Code.INVALID_ARGUMENT, f"linger_ms {milliseconds}: at most {LINGER_MOST * 1000}")
        session.linger = milliseconds / 1000
        session.outbox.keeps = PAST if milliseconds else 0
        if self._keeper is not None and session.linger and session.keeper is None:
            self._keeper.session_opened(session)
        elif self._keeper is not None and not session.linger:
            self._keeper.session_closed(session)
        elif self._keeper is not None:
            self._keeper.session_changed(session)

    def _make_session(self, linger: float) -> Session:
        session = Session(self.log, self.encoder, self.router, self.lagging, linger)
        session.outbox.waits_for_log = not self.trouble
        self.sessions[session] = None
        return session

    def _forget(self, session: Session) -> None:
        """All that it registered goes."""
        if session not in self.sessions:
            return
        del self.sessions[session]
        if session.keeper is not None and self._keeper is not None:
            self._keeper.session_closed(session)
        for registration in list(session.registrations.values()):
            self.arming.shrink(registration, registration.mask)
        # Those that a process's end took out of `registrations` may have spans that linger.
        for node in self.nodes:
            for span in session.matcher.spans(node.name):
                self.router.end(span, node.position, self.log.end)
        session.registrations.clear()
        session.past.clear()
        session.outbox.close()

    def register(
        self,
        session: Session,
        request_id: int,
        message: monitor_pb2.Registration,
        found: Iterable[monitor_pb2.RegisterRequest.FoundProcess] = (),
    ) -> None:
        """Register, or add bits to what is registered. The answers go to the session. Raises RefusedError."""
        session.begun = True
        try:
            key = parse_key(message)
            processes = parse_found(found, key.target)
        except UsageError as error:
            raise RefusedError(Code.INVALID_ARGUMENT, str(error)) from None
        self._check_filters(session, key)
        unknown = [name for name in key.terms.exact_names if self.nodes.get(name) is None]
        if unknown and not self.nodes.settling and not session.resuming:
            raise RefusedError(Code.NOT_FOUND, f"unknown node {unknown[0]!r}: {self.nodes.names()}")
        registration = session.registrations.get(key)
        if registration is None:
            if session.registrations.uses(request_id):
                raise RefusedError(Code.INVALID_ARGUMENT, f"request id {request_id} names a registration of this stream already")
            registration = make_registration(session, request_id, key, message)
            session.registrations.add(registration)
            session.past.pop(key, None)
            registration.brought = bool(session.resuming)
        new = message.event_mask & ~registration.mask
        registration.mask |= message.event_mask
        registration.find(processes)
        adopted = bool(session.resuming and new) and self.lingering.adopt(registration, new)
        names = [node.name for node in self.nodes.selected(key.terms)] + unknown
        request = Request(request_id, len(names))
        for name in names:
            if session.resuming and not adopted and session.cursor is not None:
                registration.make_arm(name).absent = session.cursor.positions.get(name, (0, 0))
            self.arming.arm(registration, name, request, message.event_mask)
        if self._keeper is not None and session.keeper is not None:
            self._keeper.registration_changed(registration)
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
                        stream_id=session.stream_id,
                    )
                )
            )

    def _check_filters(self, session: Session, key: Key) -> None:
        """Each of a node's blocks is held against each of these filters: that must not take more than others can wait."""
        kinds = session.registrations.node_wide_filters
        if key.target is None and key.terms.filter not in kinds and len(kinds) >= FILTERS_MOST:
            raise RefusedError(
                Code.RESOURCE_EXHAUSTED,
                f"a stream has at most {FILTERS_MOST} different filters for all processes of a node: leave out the filter, and select here",
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
            session.registrations.remove(registration)
        answer = monitor_pb2.Deregistered(request_id=request_id, registration_id=registration.id, event_mask=registration.mask)
        session.tell(deregistered(answer))

    def resume(self, session: Session, cursor: monitor_pb2.Cursor, requests: int) -> None:
        """The client has taken so much from an earlier stream, and brings its registrations in so many requests. Raises RefusedError."""
        if not session.registrations and session.cursor is None:
            self.lingering.begin(session, cursor, requests)

    async def locate(self, session: Session, cursor: monitor_pb2.Cursor) -> None:
        """A cursor has come, with which `resume` is to be called. Find out what that has to know of it, without keeping others waiting for
        the log's disk. Raises RefusedError."""
        try:
            check_nodes_named(item.node for item in cursor.positions)
        except UsageError as error:
            raise RefusedError(Code.INVALID_ARGUMENT, f"the cursor: {error}") from None
        if not session.begun:
            self.lingering.expect(session, cursor.stream_id)
        ready = self.log.locate([(item.node, item.epoch, item.position) for item in cursor.positions])
        if ready is not None:
            await ready

    def resumed(self, session: Session) -> None:
        """One of these requests was taken, or refused."""
        self.lingering.requested(session)

    def watch(self, session: Session, request: monitor_pb2.WatchRequest) -> bool:
        """One request of a Watch stream: refusals are answers. False if it is the last one."""
        session.begun = True
        kind = request.WhichOneof("kind")
        if kind == "close":
            return False
        try:
            if request.HasField("linger_ms"):
                self.linger(session, request.linger_ms)
            if request.HasField("cursor"):
                self.resume(session, request.cursor, request.resuming)
            if kind == "register":
                self.register(session, request.request_id, request.register.registration, request.register.found)
            elif kind == "deregister":
                self.deregister(session, request.request_id, request.deregister.registration)
            else:
                raise RefusedError(Code.INVALID_ARGUMENT, "the request is neither register nor deregister nor close")  # noqa: TRY301 -- one way out
        except RefusedError as refusal:
            error = monitor_pb2.RequestError(code=refusal.code, message=str(refusal))
            if kind == "deregister":
                session.tell(deregistered(monitor_pb2.Deregistered(request_id=request.request_id, error=error)))
            else:
                session.tell(registered(monitor_pb2.Registered(request_id=request.request_id, error=error)))
        if kind != "deregister":
            self.resumed(session)
        return True

    def list_nodes(self, selector: monitor_pb2.NodeSelector) -> list[monitor_pb2.Node]:
        """The known nodes, by name. Raises RefusedError."""
        try:
            check_list_length("node names", selector.names)
            check_node_selector(selector.names, selector.labels)
        except UsageError as error:
            raise RefusedError(Code.INVALID_ARGUMENT, str(error)) from None
        chosen = self.nodes.selected(terms(selector.names, selector.labels.items(), NO_FILTER, follow=False))
        return [node.describe() for node in sorted(chosen, key=lambda node: node.name)]

    async def list_processes(
        self, name: str, wanted: monitor_pb2.ProcessFilter, *, with_args: bool = False
    ) -> monitor_pb2.ListProcessesResponse:
        """Return the processes of one node, from its agent. Raises RefusedError."""
        if not name:
            raise RefusedError(Code.INVALID_ARGUMENT, "name one node")
        try:
            for what, items in (("comms", wanted.comms), ("pids", wanted.pids), ("uids", wanted.uids)):
                check_list_length(what, items)
            check_globs(wanted.comms, "comm")
            for glob in wanted.comms:
                check_comm(glob)
            for pid in wanted.pids:
                check_pid(pid)
            group = wanted.WhichOneof("group")
            if group == "unit":
                wanted.unit = check_unit_name(wanted.unit)
            elif group is not None:
                wanted.cgroup = check_cgroup_path(wanted.cgroup)
        except UsageError as error:
            raise RefusedError(Code.INVALID_ARGUMENT, str(error)) from None
        node = self.nodes.get(name)
        if node is None:
            raise RefusedError(Code.NOT_FOUND, f"unknown node {name[:_NAME_SHOWN]!r}: {self.nodes.names()}")
        if node.link is None:
            raise RefusedError(Code.UNAVAILABLE, f"node {name} is not connected")
        boot_id, epoch = node.boot_id, node.epoch  # of the agent that is asked; by the time it answers no other can have come
        answer = await node.link.list_processes(wanted, with_args=with_args)
        if group is not None and not answer.by_group:
            version = node.hello.agent_version
            raise RefusedError(Code.FAILED_PRECONDITION, f"node {name}: its agent (version {version}) cannot list a group: upgrade it")
        if answer.error:
            raise RefusedError(Code.FAILED_PRECONDITION, f"node {name}: {answer.error}")
        return monitor_pb2.ListProcessesResponse(
            node=name,
            processes=answer.processes,
            boot_id=boot_id,
            cgroup_ids=answer.cgroup_ids,
            epoch=epoch if answer.HasField("position") else 0,
            position=answer.position,
            boottime_ns=answer.boottime_ns,
        )

    def remove_node(self, name: str) -> None:
        """An operator says that a node will not come back. Raises RefusedError."""
        node = self.nodes.get(name)
        if node is None:
            raise RefusedError(Code.NOT_FOUND, f"unknown node {name[:_NAME_SHOWN]!r}: {self.nodes.names()}")
        if node.link is not None or node.drain is not None:
            raise RefusedError(Code.FAILED_PRECONDITION, f"node {name} is connected: stop its agent first")
        self.tell_concerned(node, monitor_pb2.NODE_STATE_GONE, "an operator removed it", node.boot_id)
        for session in self.sessions:
            self.arming.remove_node(node, list(session.registrations.values()))
            for span in session.matcher.spans(name):  # of processes that have just ended
                self.router.end(span, node.position, self.log.end)
        self.nodes.remove(name)
        self._removed[name] = None
        if self._keeper is not None:
            self._keeper.node_removed(name)

    # -- what agents bring

    def store(self, block: Block) -> None:
        """Put a block into the log and route it."""
        self.log.append(block)
        self.router.route(block)
        block.trim()

    def mark(self, mark: Mark) -> None:
        """Put a mark into the log, and tell those whom it concerns."""
        self.log.append(mark)
        for session in self.sessions:
            session.offer_mark(mark)

    def tell_concerned(self, node: Node, state: monitor_pb2.NodeState.ValueType, reason: str, boot_id: str) -> None:
        """A node came or went: to all sessions with registrations there."""
        for session in self.sessions:
            ids = session.concerned(node)
            if ids:
                session.tell(node_change(node.name, state, boot_id, reason, ids))

    def remember_node(self, node: Node) -> None:
        """It has changed in what a broker must know that is started again."""
        if self._keeper is not None:
            self._keeper.node_changed(node)

    async def drain(self, seconds: float) -> None:
        """Stop in order: all that has come gets into the log and is acknowledged, agents are sent away, and monitors get what waits for
        them. Takes `seconds` at most."""
        self.failure = RefusedError(Code.UNAVAILABLE, "the broker is stopping")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds / 2):
                await self.log.flush()
        self.agents.stop(self.failure)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds / 2):
                await asyncio.gather(*(session.outbox.emptied() for session in self.sessions if not session.detached))

    def stop(self) -> None:
        """End all streams. Sessions stay in a log that outlives us."""
        self.failure = self.failure or RefusedError(Code.UNAVAILABLE, "the broker is stopping")
        if self._ticker is not None:
            self._ticker.cancel()
        self.agents.stop(self.failure)
        self.lingering.stop()
        self._trimmer.stop()
        for session in self.sessions:
            session.fail(self.failure)

    def _child_made(self, span: Span) -> None:
        self.arming.child_made(span)

    def _process_ended(self, span: Span) -> None:
        self.arming.process_ended(span)

    def _orphan_found(self, span: Span) -> bool:
        return self.arming.orphan_found(span)

    def _is_missed(self, until: int) -> bool:
        """Whether anybody has still to read something before `until`."""
        return bool(len(self.lingering)) or any((outbox.reads_from or 0) < until for outbox in self.lagging)

    def _evicting(self, until: int) -> int:
        """The log is about to drop all entries before `until`: who has not read them is to know what that was. Up to where that is done."""
        try:
            return self._count_evicted(until)
        except Exception:  # the log must go on
            logger.exception("counting what the log drops failed: please report it")
            return until

    def _count_evicted(self, until: int) -> int:
        readers = [outbox for outbox in self.lagging if outbox.reads_from is not None and outbox.reads_from < until]
        detached = list(self.lingering)
        budget = COUNTED_MOST
        clock = time.monotonic
        stop = clock() + COUNTED_S
        offset = self.log.oldest
        while (readers or detached) and offset < until:
            entries = self.log.read(offset, READ_SIZE)
            for entry in entries:
                offset = entry.offset + 1
                if offset > until:
                    break
                for outbox in readers:
                    outbox.evicting(entry)
                for session in detached:
                    if session.matcher.knows(entry.node):
                        session.evicting(entry)
                        budget -= 1
                if isinstance(entry, Block):
                    entry.trim()
                if clock() > stop:
                    return min(offset, until)
            if not entries:
                break
            if budget < 0 and detached:
                # Exact numbers are not worth it that everybody waits: those who come back are told from where to where.
                for session in detached:
                    session.evicted.give_up()
                detached = []
        return until

    def _committed(self, offset: int) -> None:
        self.agents.committed(offset)
        for outbox in self.lagging:
            outbox.committed()

    def _troubled(self, why: str) -> None:
        if why:
            logger.warning("%s", why)
        elif self.trouble:
            logger.warning("the log is written again")
        self.trouble = why
        for session in self.sessions:
            session.outbox.waits_for_log = not why
            session.outbox.committed()

    def _tick(self) -> None:
        """Every `progress_interval`: progress for all, and what is of no use any more goes. What fails stops nothing else."""
        self._ticker = asyncio.get_running_loop().call_later(self._progress_interval, self._tick)
        known = {node.name: (node.name, node.epoch, *node.complete) for node in self.nodes}
        for session in list(self.sessions):
            self._attempt("progress of a monitor", partial(self._progress, session, known))
        for name in self.router:
            node = self.nodes.get(name)
            heard = None if node is None else node.heard()
            self._attempt(
                "forgetting control groups", partial(self.router.sweep, name, heard, self.sessions, self.log.oldest, self.log.end)
            )
        self._attempt("forgetting removed nodes", self._forget_removed)

    def _progress(self, session: Session, known: dict[str, tuple[str, int, int, int]]) -> None:
        if session.detached:
            if session.matcher.ended_spans > 2 * PAST:
                session.matcher.prune(self.log.end, keep=PAST)
                session.matcher.recall()
            return
        session.outbox.prune(self.log.end)
        session.progress([known[name] for name in session.matcher.nodes() if name in known])

    def _forget_removed(self) -> None:
        """How far a removed node had come is known for as long as the log has something of it."""
        for name in list(self._removed):
            if self.nodes.get(name) is not None:
                del self._removed[name]
            elif all(end.offset < self.log.oldest for end in self.log.ends(name).values()):
                self.log.forget(name)
                del self._removed[name]

    def _attempt(self, what: str, step: Callable[[], None]) -> None:
        """Do a step that the others must not suffer from. A fault is logged once for each kind of step."""
        try:
            step()
        except Exception:
            if what not in self._faulty:
                self._faulty.add(what)
                logger.exception("%s failed, and is tried again: please report it", what)
