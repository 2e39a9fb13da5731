# SPDX-License-Identifier: Apache-2.0
"""The monitor: the open device of 2004, for a cluster. Asynchronous; `kmonitor.clients.sync` is the same without asyncio."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self, Unpack

import grpc

from kmonitor.clients import errors, freshness, selection
from kmonitor.clients.channel import Channel
from kmonitor.clients.cursor import Cursor
from kmonitor.clients.events import Batch, Event
from kmonitor.clients.notifications import (
    Deregistered,
    Members,
    NodeChange,
    NodeState,
    Notice,
    Notification,
    Process,
    Progress,
    Registered,
    RegistrationState,
)
from kmonitor.clients.selection import Selection
from kmonitor.clients.stream import QUEUE_EVENTS, Settings, Stream
from kmonitor.v1 import monitor_pb2
from kmonitor.wire import selectors
from kmonitor.wire.errors import BadSelectorError, KmonitorError, UsageError
from kmonitor.wire.masks import ALL_EVENTS, EventType

CONNECT_TIMEOUT_S = 5.0
CALL_TIMEOUT_S = 60.0
"""Of a broker whose transport lives: one that is gone is noticed sooner."""
STALE_AFTER_S = 3.0
LONGEST_LINGER_S = 3600.0


@dataclass(frozen=True, slots=True, eq=False)
class Registration:
    """What `register` returns: what every node answered. A snapshot: nodes that join later are told as `Registered`."""

    request_id: int
    registration_id: int
    event_mask: EventType
    answers: tuple[Registered, ...]
    wanted: monitor_pb2.Registration

    @property
    def states(self) -> dict[str, RegistrationState]:
        """Node name -> state. If no node matches: "" -> NO_NODE."""
        return {answer.node: answer.state for answer in self.answers}

    def process(self, node: str | None = None) -> Process | None:
        """The process that was found on the node; left out, on the first that has it."""
        return next((answer.process for answer in self.answers if answer.process and node in (None, answer.node)), None)

    @property
    def over(self) -> bool:
        """Nothing will come: on every node that matched, the target is gone or never was, or could not be registered."""
        return all(answer.error or answer.state in (RegistrationState.EXITED, RegistrationState.NOT_FOUND) for answer in self.answers)


class Monitor:
    """Made by `connect`. Registrations live as long as it does; see there for those that are to outlive it.

    `async for notification in monitor` gives events and notices in the order in which the broker sent them; each is given once,
    to whoever asks first. `register` and the others may be called meanwhile, from other tasks of the same loop.
    """

    def __init__(self, channel: Channel, stream: Stream, cursor: Cursor, *, owns_channel: bool = True) -> None:
        self._channel = channel
        self._stream = stream
        self._cursor = cursor
        self._owns_channel = owns_channel
        self._current: tuple[Batch, Iterator[Event]] | None = None
        self._complete_until: dict[str, int] = {}

    @property
    def address(self) -> str:
        """HOST:PORT of the broker."""
        return self._channel.address

    @property
    def cursor(self) -> Cursor:
        """A copy of how far the caller has come: events that were handed over, not those that are queued."""
        return self._cursor.copy()

    @property
    def complete_until(self) -> dict[str, int]:
        """node -> all its events up to this time (Unix nanoseconds, by the node's clock) were handed over, as the last heartbeat that
        was handed over says. How old that is, is not for clocks of two machines to tell: see `Stale`."""
        return dict(self._complete_until)

    async def register(self, **what: Unpack[Selection]) -> Registration:
        """Register for events; see Selection. A second time for the same target adds the events (OR).

        Returns when the broker has answered for every node that matches now. If some of them could not take it, their answers have
        an `error`. Raises BadMaskError, BadSelectorError, RegistrationError if none could, NotAuthorisedError, BrokerUnreachableError.

        Of a monitor with a cursor the first call brings again what an earlier monitor had registered, and gets what came since; if
        that was more than one registration, use `register_all`. What is registered after that is new, and gets what comes from then on.
        """
        [registration] = await self.register_all([what])
        return registration

    async def register_all(self, selections: Sequence[Selection]) -> list[Registration]:
        """As `register`, for several: with a cursor, all that an earlier monitor had registered. The answers stand behind the events
        that it had missed: iterate meanwhile, in another task, if they may be many. Raises the first refusal when all are answered;
        what was not refused is registered all the same.
        """
        wanted = [selection.registration(what) for what in selections]
        requests = await self._stream.request(*map(_register, wanted))
        return [
            Registration(
                request.message.request_id,
                request.registered[0].registration_id,
                EventType(request.registered[0].event_mask),
                tuple(request.registered),
                each,
            )
            for request, each in zip(requests, wanted, strict=True)
        ]

    async def deregister(self, registration: Registration | None = None, **what: Unpack[Selection]) -> Deregistered:
        """Clear `events` (left out: all) from a registration: the object that `register` gave, or the same arguments.

        Raises NoSuchRegistrationError if there is none.
        """
        wanted = selection.registration(what, ALL_EVENTS)
        if registration is not None:
            mask = wanted.event_mask
            wanted = monitor_pb2.Registration()
            wanted.CopyFrom(registration.wanted)
            wanted.event_mask = mask
        [request] = await self._stream.request(lambda message: message.deregister.registration.CopyFrom(wanted))
        answer = request.answer.result()
        assert answer is not None  # a register's answer is None
        return Deregistered(answer.request_id, answer.registration_id, answer.event_mask)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Notification:
        while True:
            if self._current is not None:
                batch, events = self._current
                for event in events:
                    self._cursor.advance(batch.node, batch.epoch, event.raw.position)
                    self._cursor.forget_ended(batch, (event.raw,))
                    return event
                self._current = None
            item = await self._stream.next()
            if isinstance(item, Batch):
                self._current = (item, iter(item))
                continue
            self._take(item)
            return item

    async def batches(self) -> AsyncIterator[Batch | Notice]:
        """As iteration, but the events of a message together: much cheaper under load. Do not mix both."""
        while True:
            item = await self._stream.next()
            self._take(item)
            yield item

    def _take(self, item: Batch | Notice) -> None:
        self._cursor.take(item)
        if isinstance(item, Batch):
            self._cursor.forget_ended(item, item.events)
        elif isinstance(item, Deregistered):
            self._cursor.forget_deregistered(item)
        self._complete_until = freshness.complete_until(self._complete_until, item)

    async def list_nodes(self, *names: str, labels: Mapping[str, str] | None = None) -> list[monitor_pb2.Node]:
        """The nodes that the broker knows, by name: as kmonitor.v1.Node messages."""
        selectors.check_node_selector(names, labels or {})
        answer = await self._ask_nodes(monitor_pb2.NodeSelector(names=names, labels=labels or {}))
        return sorted(answer.nodes, key=lambda node: node.name)

    async def broker_version(self) -> str:
        """Return the version of the broker: "0.1.0"; empty if it is too old to tell."""
        answer = await self._ask_nodes(monitor_pb2.NodeSelector(names=["-"]))  # of none, most likely
        return answer.broker_version

    async def _ask_nodes(self, nodes: monitor_pb2.NodeSelector) -> monitor_pb2.ListNodesResponse:
        try:
            answer = await self._channel.stub.ListNodes(monitor_pb2.ListNodesRequest(nodes=nodes), timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise self._channel.error(error) from None
        if answer is None:
            raise errors.unreadable(self.address)
        return answer

    async def remove_node(self, node: str) -> None:
        """For operators: the node will not come back. Monitors are told that it is GONE, and its registrations are over. Raises UsageError
        if it is connected, or the broker knows no such node."""
        selectors.check_node_name(node)
        try:
            await self._channel.stub.RemoveNode(monitor_pb2.RemoveNodeRequest(node=node), timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise self._channel.error(error) from None

    async def list_processes(
        self, node: str, *, pids: Iterable[int] = (), comms: Iterable[str] = (), uids: Iterable[int] = (), with_args: bool = False
    ) -> list[Process]:
        """Return what runs on a node now, by pid; `with_args`: with the command lines.

        Raises UsageError if the broker knows no such node, or cannot ask it; NodeUnreachableError
        if it does not hear the node."""
        wanted = monitor_pb2.ProcessFilter(
            pids=[selectors.check_pid(pid) for pid in pids],
            comms=[selectors.check_comm(glob) for glob in comms],
            uids=[selectors.check_uid(uid) for uid in uids],
        )
        return list((await self._list(node, wanted, with_args=with_args)).processes)

    async def list_group(self, node: str, *, cgroup: str | None = None, unit: str | None = None) -> Members:
        """What runs in a control group and in those below it, or in a systemd unit, now. Raises UsageError if the broker knows no such
        node, or cannot ask it, or the node cannot tell; BadSelectorError."""
        if (cgroup is None) == (unit is None):
            raise BadSelectorError("give a cgroup or a unit")
        if cgroup is not None:
            return await self._list(node, monitor_pb2.ProcessFilter(cgroup=selectors.check_cgroup_path(cgroup)))
        return await self._list(node, monitor_pb2.ProcessFilter(unit=selectors.check_unit_name(unit or "")))

    async def _list(self, node: str, wanted: monitor_pb2.ProcessFilter, *, with_args: bool = False) -> Members:
        selectors.check_node_name(node)
        try:
            answer = await self._channel.stub.ListProcesses(
                monitor_pb2.ListProcessesRequest(node=node, filter=wanted, with_args=with_args), timeout=CALL_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            raise errors.of_node(error, node) or self._channel.error(error) from None
        if answer is None:
            raise errors.unreadable(self.address)
        if wanted.WhichOneof("group") is not None and not answer.epoch:
            raise UsageError(f"the broker at {self.address}, or its agent on {node}, cannot list a group: upgrade it")
        made = (Process.from_proto(process, answer.boot_id, answer.boottime_ns) for process in answer.processes)
        found = sorted(made, key=lambda process: process.pid)
        return Members(tuple(found), tuple(answer.cgroup_ids), answer.epoch, answer.position)

    async def wait(
        self,
        *,
        node: str,
        pid: int | None = None,
        start_time: int = 0,
        boot_id: str = "",
        pidfile: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - `async with asyncio.timeout` would not name the process
        on_notice: Callable[[Notice], None] | None = None,
    ) -> Event:
        """Wait for the end of a process: its PROCESS_EXIT, or with `inferred` one that nobody saw.

        Which process: by `pid` (and no other than the one of `start_time` and `boot_id`), or the one that `pidfile`, a file of the
        node, names now. It uses a stream of its own, and takes
        nothing from this monitor's iteration. A node that is not connected is waited for. `timeout` is in seconds. `on_notice` is
        called with each gap, node change and so on meanwhile. Raises ProcessExitedError, ProcessNotFoundError, NodeGoneError if the node
        is removed, WaitTimeoutError, and what `register` does.
        """
        selectors.check_node_name(node)
        if (pid is None) == (pidfile is None):
            raise BadSelectorError("wait for a pid or for what a pidfile names: give one of them")
        which: Selection = {"node": node, "events": EventType.PROCESS_EXIT}
        if pid is not None:
            which["pid"] = pid
        if pidfile is not None:
            which["pidfile"] = pidfile
        if start_time:
            which["start_time"] = start_time
        if boot_id:
            which["boot_id"] = boot_id
        settings = replace(self._stream.settings, queue_events=QUEUE_EVENTS, resumable=False)
        own = Monitor(self._channel, Stream(self._channel, Cursor(), settings), Cursor(), owns_channel=False)
        try:
            async with asyncio.timeout(timeout), own:
                await own.register(**which)
                return await own._exit_of(node, pid, pidfile, on_notice)
        except TimeoutError as error:
            if isinstance(error, KmonitorError):
                raise
            what = f"pid {pid}" if pidfile is None else f"the process of {pidfile!r}"
            raise errors.WaitTimeoutError(f"{what} on {node} still runs after {timeout:g} s") from None

    async def _exit_of(self, node: str, pid: int | None, pidfile: str | None, on_notice: Callable[[Notice], None] | None) -> Event:
        what = f"process {pid}" if pidfile is None else f"the process of {pidfile!r}"
        absent = f"there is no process {pid} on {node}" if pidfile is None else f"there is no pidfile {pidfile!r} on {node}"
        seen_running = False
        lost: errors.ProcessGoneError | None = None
        async for item in self:
            if isinstance(item, Event):
                if item.is_exit and pid in (None, item.pid):
                    return item
                continue
            if on_notice is not None:
                on_notice(item)
            if isinstance(item, Registered):
                if item.error:
                    raise errors.RegistrationError(item.error)
                if item.state is RegistrationState.NOT_FOUND and not seen_running:
                    raise errors.ProcessNotFoundError(node, pid or 0, absent)
                if item.state in (RegistrationState.EXITED, RegistrationState.NOT_FOUND):
                    if not seen_running:
                        raise errors.ProcessExitedError(node, pid or 0, f"{what} on {node} has already ended")
                    # It ended while the broker was away. Its exit may still come, from the log: up to the next progress.
                    lost = errors.ProcessExitedError(node, pid or 0, f"{what} on {node} ended unseen: its status is not known")
                seen_running |= item.state is RegistrationState.RUNNING
            elif isinstance(item, Progress) and lost is not None:
                raise lost
            elif isinstance(item, NodeChange) and item.node == node and item.state is NodeState.GONE:
                raise errors.NodeGoneError(node, pid or 0, f"{node} was removed: the end of {what} there will not be told")
        raise errors.ClosedError("the monitor is closed")

    async def close(self) -> None:
        """End the stream, and with it all registrations, unless the monitor is `resumable`. Iteration in other tasks ends with
        ClosedError. A broker that does not answer is waited for a second at most."""
        await self._stream.close()
        if self._owns_channel:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()


def _register(wanted: monitor_pb2.Registration) -> Callable[[monitor_pb2.WatchRequest], None]:
    return lambda message: message.register.registration.CopyFrom(wanted)


class connect:  # noqa: N801 - it is used as a function
    """Connect to a broker: `async with connect(...) as monitor`, or `await connect(...).open()`.

    `address` is HOST:PORT; left out it is KMONITOR_BROKER or 127.0.0.1:7221. With `reconnect` a connection that breaks is made again,
    for as long as it takes, and what was registered is brought again; a first connection that fails raises BrokerUnreachableError
    all the same. `queue_events` bounds what is read ahead.

    `cursor`: where an earlier monitor stopped. What is registered first (`register`, or all of a `register_all`) gets what came since to
    the same registrations, each event once; a registration by pid or pidfile is of the same process as then. For that the broker
    keeps what a monitor had registered armed for `linger` seconds (None: the broker's default; 0: not at all; at most an hour) after
    the connection is lost, and also after `close`, if the monitor is `resumable`: without, closing it says that nobody will come back.

    `stale_after`: seconds without a heartbeat, or without one in which a node has moved on, until that is told as `Stale`, once, and
    as `Fresh` when it is over; None is never. Heartbeats come every second.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        cursor: Cursor | None = None,
        reconnect: bool = True,
        queue_events: int = QUEUE_EVENTS,
        linger: float | None = None,
        resumable: bool = False,
        stale_after: float | None = STALE_AFTER_S,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        if linger is not None and not 0 <= linger <= LONGEST_LINGER_S:
            raise UsageError(f"registrations cannot linger for {linger:g} s: give 0 to {LONGEST_LINGER_S:.0f} s")
        if stale_after is not None and not 0 < stale_after < math.inf:
            raise UsageError(f"stale_after={stale_after:g} is no time: give seconds, or None for never")
        self._address = address
        self._cursor = Cursor() if cursor is None else cursor.copy()
        self._settings = Settings(
            reconnect=reconnect,
            queue_events=queue_events,
            linger_ms=None if linger is None else math.ceil(linger * 1000),
            resumable=resumable,
            stale_after=stale_after,
        )
        self._credentials = credentials
        self._monitor: Monitor | None = None

    async def open(self) -> Monitor:
        """The Monitor; the caller closes it. Raises BrokerUnreachableError, UsageError."""
        channel = Channel(self._address, self._credentials)
        try:
            await channel.connect(CONNECT_TIMEOUT_S)
        except BaseException:
            await channel.close()
            raise
        return Monitor(channel, Stream(channel, self._cursor, self._settings), self._cursor.copy())

    async def __aenter__(self) -> Monitor:
        self._monitor = await self.open()
        return self._monitor

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._monitor is not None:
            await self._monitor.close()
