# SPDX-License-Identifier: Apache-2.0
"""One Watch stream through all its reconnections: what was asked, what came, and who waits for which.

One task reads. It hands answers to those who wait for them, and queues every notification in the order in which it came,
answers too: their place says from where on events are delivered. The queue is bounded by events. When it is full the reader
stops reading, so that gRPC's flow control reaches the broker, which keeps the cursor for us. There is one exception: while
somebody awaits an answer the reader reads on, since the answer stands behind the events in the stream, and the one who
awaits it may be the only one who could empty the queue. An answer takes one round trip, so the excess is small.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc

from kmonitor.clients import errors
from kmonitor.clients.channel import Channel
from kmonitor.clients.cursor import Cursor
from kmonitor.clients.events import Batch
from kmonitor.clients.notifications import (
    Deregistered,
    Disconnected,
    Notice,
    Reconnected,
    Registered,
    gap_from_proto,
    node_change_from_proto,
    progress_from_proto,
)
from kmonitor.clients.standing import Standing
from kmonitor.v1 import events_pb2, monitor_pb2
from kmonitor.wire.errors import KmonitorError

QUEUE_EVENTS = 65536
FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 5.0
HEARTBEAT_TIMEOUT_S = 10.0
"""Progress comes every second. A broker, or a network, that has been silent for so long is gone (seen only after a first one)."""

_LOST_CONNECTION = ("UNAVAILABLE", "CANCELLED", "ABORTED")


@dataclass(slots=True, eq=False)
class Request:
    """A register or deregister that the broker has not wholly answered."""

    message: monitor_pb2.WatchRequest
    answer: asyncio.Future[monitor_pb2.Deregistered | None]
    registered: list[Registered] = field(default_factory=list)
    held: list[Registered] = field(default_factory=list)  # errors of nodes, while no other node has answered anything else
    connection: int = 0  # on which it was sent last


class Stream:
    """Belongs to one event loop. All its state is touched from there alone."""

    def __init__(self, channel: Channel, cursor: Cursor, *, reconnect: bool, queue_events: int = QUEUE_EVENTS) -> None:
        self.channel = channel
        self.reconnect = reconnect
        self._received = cursor.copy()  # of what was queued; what the caller has taken is the monitor's business
        self._floor: dict[str, tuple[int, int]] = {}  # events at or below are known, on this connection
        self._queue: deque[Batch | Notice] = deque()
        self._queued_events = 0
        self._queue_events = queue_events
        self._may_read = asyncio.Event()
        self._has_news = asyncio.Event()
        self._requests: dict[int, Request] = {}
        self._standing = Standing()
        self._next_id = 1
        self._call: grpc.aio.StreamStreamCall[monitor_pb2.WatchRequest, monitor_pb2.Notification] | None = None
        self._connection = 0
        self._cursor_due = False
        self._heard_progress = False
        self._sending = asyncio.Lock()
        self._error: BaseException | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Open the stream, unless it was opened before."""
        if self._task is None and self._error is None:
            self._task = asyncio.create_task(self._run(), name="kmonitor stream")

    async def close(self) -> None:
        """End the stream; the broker removes what was registered. Whoever waits gets ClosedError."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._fail(errors.ClosedError("the monitor is closed"))

    async def request(self, fill: Callable[[monitor_pb2.WatchRequest], None]) -> Request:
        """Send a request and wait until it is answered for all nodes. Raises the refusal, or what ended the stream."""
        if self._error is not None:
            raise self._error
        message = monitor_pb2.WatchRequest(request_id=self._next_id)
        self._next_id += 1
        fill(message)
        request = Request(message, asyncio.get_running_loop().create_future())
        self._requests[message.request_id] = request
        self._gate()
        self.start()
        try:
            async with self._sending:
                await self._send(request)
            await request.answer
        finally:
            # A caller that gave up leaves the request behind: the broker may still grant it, and then it must be known.
            if not request.answer.done():
                request.answer.cancel()
            self._gate()
        return request

    async def next(self) -> Batch | Notice:
        """The next in the queue. Raises what ended the stream, once the queue is empty. May be cancelled, nothing is lost."""
        while not self._queue:
            if self._error is not None:
                raise self._error
            self._has_news.clear()
            await self._has_news.wait()
        item = self._queue.popleft()
        if isinstance(item, Batch):
            self._queued_events -= len(item.events)
        self._gate()
        return item

    @property
    def waiting(self) -> int:
        """Events that are queued."""
        return self._queued_events

    @property
    def standing(self) -> Standing:
        """The registrations that will be brought again."""
        return self._standing

    # ---- connecting

    async def _run(self) -> None:
        try:
            while True:
                try:
                    await self._read()
                    reason = "the broker closed the stream"
                except grpc.aio.AioRpcError as error:
                    details = " ".join((error.details() or "").split())
                    if error.code().name not in _LOST_CONNECTION and "RST_STREAM" not in details:
                        raise self.channel.error(error) from None
                    reason = details or error.code().name
                except TimeoutError:
                    reason = f"nothing came for {HEARTBEAT_TIMEOUT_S:.0f} s"
                if not self.reconnect:
                    self._fail(errors.unreachable(self.channel.address))
                    return
                await self._come_back(reason)
        except asyncio.CancelledError:
            raise
        except KmonitorError as error:
            self._fail(error)
        except BaseException as error:
            self._fail(error)
            raise

    async def _come_back(self, reason: str) -> None:
        """Return when the broker's transport answers again. Waits between attempts, longer each time, never in step with others."""
        clock = asyncio.get_running_loop().time
        since = clock()
        self._put(Disconnected(self.channel.address, reason))
        attempts = 0
        while True:
            delay = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2**attempts)
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            attempts = min(attempts + 1, 30)
            if await self.channel.ready(LONGEST_DELAY_S):
                break
        self._put(Reconnected(self.channel.address, attempts, clock() - since))

    def _drop_call(self) -> None:
        if self._call is not None:
            self._call.cancel()
            self._call = None

    async def _read(self) -> None:
        """One connection, from its opening to its end. Raises AioRpcError, or TimeoutError if the path went silent."""
        self._connection += 1
        self._cursor_due = bool(self._received)
        self._heard_progress = False
        self._floor = self._received.positions()
        self._call = call = self.channel.stub.Watch()
        # Beside the reading: a broker that cannot get rid of its answers may stop taking requests.
        bringing = asyncio.create_task(self._bring_all(), name="kmonitor stream requests")
        try:
            while True:
                await self._may_read.wait()
                async with asyncio.timeout(HEARTBEAT_TIMEOUT_S if self._heard_progress and self._standing else None):
                    message = await call.read()
                if isinstance(message, monitor_pb2.Notification):
                    self._dispatch(message)
                else:
                    return  # grpc.aio.EOF
        finally:
            self._drop_call()
            bringing.cancel()
            await asyncio.gather(bringing, return_exceptions=True)

    async def _bring_all(self) -> None:
        async with self._sending:
            for registration_id, wanted in self._standing.bring():
                if registration_id not in self._requests:
                    await self._write(monitor_pb2.WatchRequest(request_id=registration_id, register=wanted))
                else:  # some nodes had answered, and the caller was told: there it is of those processes
                    asked = self._requests[registration_id].message.register
                    del asked.found[:]
                    asked.found.extend(wanted.found)
            for request in list(self._requests.values()):
                request.registered.clear()
                request.held.clear()
                await self._send(request)

    async def _send(self, request: Request) -> None:
        if self._call is not None and request.connection != self._connection:
            request.connection = self._connection
            await self._write(request.message)

    async def _write(self, message: monitor_pb2.WatchRequest) -> None:
        if self._cursor_due:
            self._cursor_due = False
            first = monitor_pb2.WatchRequest()
            first.CopyFrom(message)
            first.cursor.CopyFrom(self._received.to_proto())
            message = first
        if self._call is not None:
            try:
                await self._call.write(message)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                pass  # the stream has ended: the reader sees why, and sends all again on the next
            except asyncio.CancelledError:
                # grpc.aio raises this both for our own cancellation and for a call that was cancelled under us
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise

    # ---- what comes

    def _dispatch(self, message: monitor_pb2.Notification) -> None:
        kind = message.WhichOneof("kind")
        if kind == "events":
            self._put_events(message.events)
        elif kind == "registered":
            self._on_registered(message.registered)
        elif kind == "deregistered":
            self._on_deregistered(message.deregistered)
        elif kind == "progress":
            self._heard_progress = True
            self._put(progress_from_proto(message.progress))
        elif kind == "gap":
            self._put(gap_from_proto(message.gap))
        elif kind == "node":
            self._put(node_change_from_proto(message.node))
        # Else it is a kind that a newer broker knows: what monitors see changes only by addition.

    def _put_events(self, message: events_pb2.EventBatch) -> None:
        node, epoch, boot_id = message.node, message.epoch, message.boot_id
        events: Sequence[events_pb2.Event] = message.events
        if not len(events):
            return
        floor = self._floor.get(node)
        if floor is not None:
            if floor[0] == epoch and events[0].position <= floor[1]:
                # An exit that was inferred has no position of its own. Twice told is better than never.
                events = [event for event in events if event.position > floor[1] or event.inferred]
                if not events:
                    return
            else:
                del self._floor[node]  # positions only grow: the rest of this connection is new
        self._standing.saw(node, boot_id, events)
        self._queued_events += len(events)
        self._put(Batch(node, epoch, events, boot_id))

    def _put(self, item: Batch | Notice) -> None:
        self._received.take(item)
        self._queue.append(item)
        self._has_news.set()
        self._gate()

    def _on_registered(self, message: monitor_pb2.Registered) -> None:
        request = self._requests.get(message.request_id)
        answer = Registered.from_proto(message)
        refusal = errors.from_code(message.error.code, message.error.message) if message.HasField("error") else None
        if request is None:
            if refusal is not None:
                self._standing.refused(answer.registration_id or answer.request_id, answer.node)
            else:
                answer = self._standing.answered(answer, None)
            self._put(answer)
            return
        if refusal is not None and not answer.node:
            self._answer(message.request_id, refusal)
            return
        if refusal is None:
            answer = self._standing.answered(answer, request.message.register.registration)
        request.registered.append(answer)
        request.held.append(answer)
        if any(not told.error for told in request.registered):
            for told in request.held:
                self._put(told)
            request.held.clear()
        if answer.pending == 0:
            # What no node has taken is refused; what some have is a registration, and the others' errors are told beside it.
            self._answer(message.request_id, refusal if request.held else None)

    def _on_deregistered(self, message: monitor_pb2.Deregistered) -> None:
        request = self._requests.get(message.request_id)
        if message.HasField("error"):
            if request is not None:
                self._answer(message.request_id, errors.from_code(message.error.code, message.error.message))
            return
        if request is not None:
            self._standing.cleared(request.message.deregister.registration)
        self._put(Deregistered(message.request_id, message.registration_id, message.event_mask))
        self._answer(message.request_id, message)

    def _answer(self, request_id: int, answer: monitor_pb2.Deregistered | KmonitorError | None) -> None:
        request = self._requests.pop(request_id, None)
        if request is not None and not request.answer.done():
            if isinstance(answer, KmonitorError):
                request.answer.set_exception(answer)
            else:
                request.answer.set_result(answer)
        self._gate()

    def _gate(self) -> None:
        awaited = any(not request.answer.done() for request in self._requests.values())
        if awaited or self._queued_events < self._queue_events:
            self._may_read.set()
        else:
            self._may_read.clear()

    def _fail(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
        for request in self._requests.values():
            if not request.answer.done():
                request.answer.set_exception(error)
        self._requests.clear()
        self._has_news.set()
