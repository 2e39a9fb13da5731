# SPDX-License-Identifier: Apache-2.0
"""A broker for tests of clients: it speaks kmonitor.v1, knows the processes that it was told of, and sends what a test says."""

from __future__ import annotations

import asyncio
import fnmatch
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from kmonitor.v1 import events_pb2, monitor_pb2, monitor_pb2_grpc

EPOCH = 7
BOOT = "boot-1"
RUNNING, EXITED, NOT_FOUND, NODE_UNREACHABLE, ARMED, NO_NODE = range(1, 7)
FORK, ABORT, EXEC, EXIT = 0x08, 0x10, 0x20, 0x40


def event(position: int, kind: int, pid: int, **fields: Any) -> events_pb2.Event:
    """An event with all common fields set; an exit has code 0 unless told otherwise."""
    if kind == EXIT and not {"exit_code", "exit_signal", "inferred"} & set(fields):
        fields["exit_code"] = 0
    common: dict[str, Any] = {
        "position": position,
        "type": kind,
        "pid": pid,
        "tid": pid,
        "ppid": 1,
        "uid": 1000,
        "gid": 1001,
        "comm": "sleep",
        "time": 1_700_000_000_123_456_789,
        "start_time": pid * 1000,
        "cgroup_id": 55,
    }
    return events_pb2.Event(**(common | fields))


def batch(node: str, *events: events_pb2.Event, epoch: int = EPOCH, boot_id: str = BOOT) -> monitor_pb2.Notification:
    """Events of one node."""
    return monitor_pb2.Notification(events=events_pb2.EventBatch(node=node, epoch=epoch, events=events, boot_id=boot_id))


class Session:
    """One Watch stream, seen from the broker."""

    def __init__(self) -> None:
        self.outgoing: asyncio.Queue[monitor_pb2.Notification | grpc.StatusCode | None] = asyncio.Queue()
        self.requests: list[monitor_pb2.WatchRequest] = []  # all but CloseRequest
        self.closed = False  # by CloseRequest
        self.over = asyncio.Event()  # the stream has ended
        self.news = asyncio.Condition()

    @property
    def cursor(self) -> dict[str, tuple[int, int]]:
        """The positions that came with the first request."""
        return {at.node: (at.epoch, at.position) for at in self.requests[0].cursor.positions}

    async def asked(self, count: int) -> list[monitor_pb2.WatchRequest]:
        """Wait until so many requests have come."""
        async with self.news:
            await self.news.wait_for(lambda: len(self.requests) >= count)
        return self.requests

    def send(self, *notifications: monitor_pb2.Notification) -> None:
        """Put them into the stream."""
        for notification in notifications:
            self.outgoing.put_nowait(notification)

    def end(self, status: grpc.StatusCode | None = None) -> None:
        """End the stream, behind what was sent."""
        self.outgoing.put_nowait(status)


class FakeBroker(monitor_pb2_grpc.MonitorServiceServicer):
    """`processes`: (node, pid) -> start time, or None for one that has ended. `pidfiles`: (node, path) -> pid, or what is wrong with
    the file. `boots`: node -> boot id, where it is not BOOT. `answers`: whether it answers by itself. `heeds_close`: whether it
    ends a stream that is closed, and answers nothing else if not; None is a broker that does not know CloseRequest."""

    def __init__(self) -> None:
        self.nodes: list[str] = ["web1"]
        self.unreachable: set[str] = set()
        self.processes: dict[tuple[str, int], int | None] = {}
        self.pidfiles: dict[tuple[str, str], int | str] = {}
        self.boots: dict[str, str] = {}
        self.refuse: grpc.StatusCode | None = None
        self.refusal = "refused by the test"
        self.described: dict[str, Any] = {}  # what ListNodes says of each node beside its name and state
        self.comms: dict[int, str] = {}  # pid -> name, where it is not "sleep"
        self.answers = True
        self.heeds_close: bool | None = True
        self.removed: list[str] = []
        self.position = 100
        self.sessions: list[Session] = []
        self._news = asyncio.Condition()
        self._server: grpc.aio.Server | None = None
        self.port = 0

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen: at port 0 the first time, then at the same port."""
        self._server = grpc.aio.server()
        monitor_pb2_grpc.add_MonitorServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        """Cut all streams."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def session(self, number: int = 0) -> Session:
        """Wait for the stream of that number, and its first request: what a test then sends stands behind the answer."""
        async with self._news:
            await self._news.wait_for(lambda: len(self.sessions) > number)
        await self.sessions[number].asked(1)
        return self.sessions[number]

    # ---- the service; the generated base class knows grpc's synchronous types only

    async def Watch(self, request_iterator: Any, context: Any) -> AsyncIterator[monitor_pb2.Notification]:  # noqa: N802
        """Answers by what it knows, and passes on what the test sends."""
        session = Session()

        async def read() -> None:
            async for request in request_iterator:
                if request.WhichOneof("kind") == "close" and self.heeds_close is not None:
                    session.closed = True
                    if self.heeds_close:
                        session.end()
                    continue
                if request.WhichOneof("kind") == "close":
                    session.send(refused(request.request_id, 3, "the request is neither register nor deregister"))
                    continue
                async with session.news:
                    session.requests.append(request)
                    session.news.notify_all()
                if self.answers:
                    session.send(*self.answer(request))

        if self.refuse is not None:
            await context.abort(self.refuse, self.refusal)
        async with self._news:
            self.sessions.append(session)
            self._news.notify_all()
        reading = asyncio.create_task(read())
        try:
            while isinstance(item := await session.outgoing.get(), monitor_pb2.Notification):
                yield item
            if item is not None:
                await context.abort(item, "ended by the test")
        finally:
            session.over.set()
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def Subscribe(self, request: Any, context: Any) -> AsyncIterator[monitor_pb2.Notification]:  # noqa: N802
        """Not for these tests."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no Subscribe")
        yield monitor_pb2.Notification()

    async def ListNodes(self, request: Any, context: Any) -> monitor_pb2.ListNodesResponse:  # noqa: N802
        """The nodes, all UP or UNREACHABLE."""
        if self.refuse is not None:
            await context.abort(self.refuse, self.refusal)
        return monitor_pb2.ListNodesResponse(
            nodes=[
                monitor_pb2.Node(
                    name=name,
                    state=2 if name in self.unreachable else 1,  # type: ignore[arg-type]
                    **({"source": "core", "labels": {"role": "web"}} | self.described),
                )
                for name in reversed(self.nodes)
                if not request.nodes.names or any(fnmatch.fnmatchcase(name, glob) for glob in request.nodes.names)
            ],
            broker_version="0.9",
        )

    async def ListProcesses(self, request: Any, context: Any) -> monitor_pb2.ListProcessesResponse:  # noqa: N802
        """Of a known node; NOT_FOUND for others."""
        if request.node not in self.nodes:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no node {request.node}")
        if request.node in self.unreachable:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"node {request.node} is not connected")
        found = [self._process(pid, start) for (node, pid), start in self.processes.items() if node == request.node and start]
        for process in found if request.with_args else ():
            process.args.extend([process.comm, "60"])
        return monitor_pb2.ListProcessesResponse(
            node=request.node, processes=found, boot_id=self.boots.get(request.node, BOOT), boottime_ns=90 + 60_000_000_000
        )

    async def RemoveNode(self, request: Any, context: Any) -> monitor_pb2.RemoveNodeResponse:  # noqa: N802
        """As the broker: not one that is connected, not one that nobody knows."""
        if request.node not in self.nodes:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no node {request.node}")
        if request.node not in self.unreachable:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"node {request.node} is connected: stop its agent first")
        self.nodes.remove(request.node)
        self.removed.append(request.node)
        return monitor_pb2.RemoveNodeResponse()

    def _process(self, pid: int, start: int) -> events_pb2.Process:
        return process_of(pid, start, self.comms.get(pid, "sleep"))

    def answer(self, request: monitor_pb2.WatchRequest) -> Sequence[monitor_pb2.Notification]:
        """What a broker would say."""
        if request.WhichOneof("kind") == "deregister":
            return [monitor_pb2.Notification(deregistered=monitor_pb2.Deregistered(request_id=request.request_id, registration_id=1))]
        wanted = request.register.registration
        names = [name for name in self.nodes if not wanted.nodes.names or name in wanted.nodes.names]
        if not names:
            return [registered(request.request_id, "", NO_NODE, target=wanted.target, mask=wanted.event_mask)]
        answers = []
        for left, name in zip(range(len(names) - 1, -1, -1), names, strict=True):
            process = None
            kind = wanted.target.WhichOneof("kind")
            found = {item.node: (item.pid, item.start_time, item.boot_id) for item in request.register.found}
            target = wanted.target.process
            pid, asked, boot_id = found.get(name, (target.pid, target.start_time, target.boot_id))
            if kind == "pidfile":
                named = self.pidfiles.get((name, wanted.target.pidfile), 0)
                if isinstance(named, str):
                    answers.append(refused(request.request_id, 9, f"node {name}: {named}", node=name, pending=left))
                    continue
                pid, asked, boot_id = found.get(name, (named, 0, ""))
            if kind not in ("process", "pidfile"):
                state = ARMED
            else:
                start = self.processes.get((name, pid), 0)
                state = NOT_FOUND if start == 0 else EXITED if start is None or asked not in (0, start) else RUNNING
                process = self._process(pid, start) if state == RUNNING and start else None
                if boot_id not in ("", self.boots.get(name, BOOT)):
                    state, process = EXITED, None
            if name in self.unreachable:
                state = NODE_UNREACHABLE
            answers.append(
                registered(
                    request.request_id,
                    name,
                    state,
                    process=process,
                    pending=left,
                    target=wanted.target,
                    mask=wanted.event_mask,
                    position=self.position,
                    boot_id=self.boots.get(name, BOOT),
                )
            )
        return answers


def process_of(pid: int, start: int, comm: str = "sleep") -> events_pb2.Process:
    """A process that runs."""
    return events_pb2.Process(pid=pid, ppid=1, uid=1000, gid=1001, comm=comm, start_time=start, threads=1)


def registered(
    request_id: int,
    node: str,
    state: int,
    *,
    process: events_pb2.Process | None = None,
    pending: int = 0,
    target: monitor_pb2.Target | None = None,
    mask: int = 0x40,
    position: int = 100,
    boot_id: str = BOOT,
) -> monitor_pb2.Notification:
    """One node's answer."""
    return monitor_pb2.Notification(
        registered=monitor_pb2.Registered(
            request_id=request_id,
            registration_id=request_id,
            node=node,
            state=state,  # type: ignore[arg-type]
            process=process,
            pending=pending,
            target=target,
            event_mask=mask,
            epoch=EPOCH if node else 0,
            position=position if node else 0,
            boot_id=boot_id if node else "",
        )
    )


def refused(request_id: int, code: int, message: str, *, node: str = "", pending: int = 0) -> monitor_pb2.Notification:
    """The answer to a register that cannot be; with `node`, that one's."""
    error = monitor_pb2.RequestError(code=code, message=message)
    registration_id = request_id if node else 0
    return monitor_pb2.Notification(
        registered=monitor_pb2.Registered(request_id=request_id, registration_id=registration_id, node=node, pending=pending, error=error)
    )


def gap(node: str = "web1", *, number: int = 0, log_id: int = 0, to_position: int = 512, reason: int = 1) -> monitor_pb2.Notification:
    """Three exits lost in the ring."""
    lost = [monitor_pb2.LostCount(type=EXIT, count=3)]  # type: ignore[arg-type]
    return monitor_pb2.Notification(
        gap=monitor_pb2.Gap(
            node=node,
            reason=reason,  # type: ignore[arg-type]
            epoch=EPOCH,
            from_position=128,
            to_position=to_position,
            lost=lost,
            number=number,
            log_id=log_id,
        )
    )


def progress(position: int, node: str = "web1", *, number: int = 0, log_id: int = 0, time: int = 1) -> monitor_pb2.Notification:
    """The heartbeat. `time` is the node's, in nanoseconds."""
    at = monitor_pb2.Progress.NodeProgress(node=node, epoch=EPOCH, position=position, time_unix_nano=time)
    return monitor_pb2.Notification(progress=monitor_pb2.Progress(nodes=[at], number=number, log_id=log_id))


def node_change(state: int, node: str = "web1", reason: str = "") -> monitor_pb2.Notification:
    """UP, UNREACHABLE, REBOOTED, GONE: 1 to 4."""
    return monitor_pb2.Notification(
        node=monitor_pb2.NodeChange(node=node, state=state, time_unix_nano=1, boot_id=BOOT, reason=reason)  # type: ignore[arg-type]
    )
