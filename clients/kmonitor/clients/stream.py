# SPDX-License-Identifier: Apache-2.0
"""One Watch stream through all its reconnections: what was asked, what came, and who waits for which.

One task reads. It hands answers to those who wait for them, and queues every notification in the order in which it came,
answers too: their place says from where on events are delivered. The queue is bounded by events. When it is full the reader
stops reading, so that gRPC's flow control reaches the broker, which keeps the cursor for us. There is one exception: while
somebody awaits an answer, and nobody empties the queue, the reader reads on, since the answer stands behind the events in the
stream, and the one who awaits it may be the only one who could empty the queue. An answer takes one round trip, so the excess
is small; but behind a cursor it takes all that was missed, so whoever comes back after much should iterate meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc

from kmonitor.clients import errors, selection
from kmonitor.clients.channel import Channel
from kmonitor.clients.cursor import Cursor
from kmonitor.clients.events import Batch
from kmonitor.clients.freshness import Freshness
from kmonitor.clients.identity import Identity
from kmonitor.clients.notifications import (
    Deregistered,
    Disconnected,
    NodeChange,
    NodeState,
    Notice,
    Progress,
    Reconnected,
    Registered,
    gap_from_proto,
    node_change_from_proto,
    progress_from_proto,
)
from kmonitor.clients.standing import Standing, add_found
from kmonitor.v1 import events_pb2, monitor_pb2
from kmonitor.wire.errors import KmonitorError
from kmonitor.wire.grpc_words import plain_reason

QUEUE_EVENTS = 65536
FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 1.0
"""Between two attempts to reach a broker: whoever waits for a failover is blind meanwhile."""
READY_TIMEOUT_S = 5.0
HEARTBEAT_TIMEOUT_S = 10.0
"""Progress comes every second. A broker, or a network, that has been silent for so long is gone (seen only after a first one)."""
CLOSE_TIMEOUT_S = 1.0
"""A broker that does not end the stream for so long after it was asked to is left alone."""
IDLE_CONSUMER_S = 1.0
"""Who has not come for the next item for so long is not emptying the queue."""

_LOST_CONNECTION = ("UNAVAILABLE", "CANCELLED", "ABORTED")
# In statuses that grpc makes up itself; the second when a write meets the stream's end, whose own status it hides.
_LOST_WORDS = ("RST_STREAM", "Internal error from Core")


@dataclass(frozen=True, slots=True)
class Settings:
    """`linger_ms` and `resumable`: what becomes of the registrations when the stream has ended; None is the broker's default.
    `stale_after` in seconds; None is never. `queue_events` bounds what is read ahead."""

    reconnect: bool = True
    queue_events: int = QUEUE_EVENTS
    linger_ms: int | None = None
    resumable: bool = False
    stale_after: float | None = None


@dataclass(slots=True, eq=False)
class Request:
    """A register or deregister that the broker has not wholly answered."""

    message: monitor_pb2.WatchRequest
    answer: asyncio.Future[monitor_pb2.Deregistered | None]
    registered: list[Registered] = field(default_factory=list)
    held: list[Registered] = field(default_factory=list)  # errors of nodes, while no other node has answered anything else
    connection: int = 0  # on which it was sent last
    again: bool = False  # it brings again what an earlier stream may have registered


class Stream:
    """Belongs to one event loop. All its state is touched from there alone."""

    def __init__(self, channel: Channel, cursor: Cursor, settings: Settings) -> None:
        self.channel = channel
        self.settings = settings
        # Of what was queued; what the caller has taken is the monitor's business.
        self._received = Cursor(cursor.positions(), log_id=cursor.log_id, number=cursor.number, stream_id=cursor.stream_id)
        self._brought: dict[bytes, dict[str, Identity]] = cursor.found()  # what an earlier monitor's registrations were of
        self._floor: dict[str, tuple[int, int]] = {}  # events at or below are known, on this connection
        self._queue: deque[Batch | Notice] = deque()
        self._queued_events = 0
        self._consuming = False  # somebody empties the queue, as far as we can tell
        self._may_read = asyncio.Event()
        self._has_news = asyncio.Event()
        self._requests: dict[int, Request] = {}
        self._standing = Standing()
        self._next_id = 1
        self._call: grpc.aio.StreamStreamCall[monitor_pb2.WatchRequest, monitor_pb2.Notification] | None = None
        self._connection = 0
        self._was_heard = False  # the broker has said anything at all, on any connection
        self._brought_on = 0  # the last connection on which it was begun to bring again what stands
        self._sent_nothing = True  # on this connection
        self._resuming = 0  # how many register requests, from the first one on, bring again what is to go on behind the cursor
        self._heard_progress = False
        self._freshness = None if settings.stale_after is None else Freshness(settings.stale_after)
        self._sending = asyncio.Lock()
        self._closing = 0  # id of the last request
        self._error: BaseException | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Open the stream, unless it was opened before."""
        if self._task is None and self._error is None:
            self._task = asyncio.create_task(self._run(), name="kmonitor stream")

    async def close(self) -> None:
        """End the stream. The broker removes at once what was registered, unless it is to be resumed; it is given CLOSE_TIMEOUT_S for
        that. Whoever waits gets ClosedError."""
        if self._task is not None:
            try:
                if not self.settings.resumable:
                    await self._say_close(self._task)
            finally:
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)
        self._fail(errors.ClosedError("the monitor is closed"))

    async def _say_close(self, task: asyncio.Task[None]) -> None:
        if self._call is None or self._sent_nothing or self._closing or task.done():
            return
        self._closing = self._next_id
        self._gate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                async with self._sending:
                    await self._write(monitor_pb2.WatchRequest(request_id=self._closing, close=monitor_pb2.CloseRequest()))
                await asyncio.wait([task])

    async def request(self, *fill: Callable[[monitor_pb2.WatchRequest], None]) -> list[Request]:
        """Send requests together, and wait until each is answered for all nodes. Raises the first refusal, or what ended the stream.

        Behind a cursor the requests of the first call are what an earlier stream had registered.
        """
        if self._error is not None or self._closing:
            raise self._error or errors.ClosedError("the monitor is closed")
        requests = [self._make(each) for each in fill]
        self._consuming = False  # until it comes for the next item
        self._gate()
        self.start()
        try:
            async with self._sending:
                for request in requests:
                    await self._send(request)
            results = await asyncio.gather(*(request.answer for request in requests), return_exceptions=True)
        finally:
            # A caller that gave up leaves the requests behind: the broker may still grant them, and then it must be known.
            for request in requests:
                if not request.answer.done():
                    request.answer.cancel()
            self._gate()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return requests

    def _make(self, fill: Callable[[monitor_pb2.WatchRequest], None]) -> Request:
        message = monitor_pb2.WatchRequest(request_id=self._next_id)
        self._next_id += 1
        fill(message)
        if message.WhichOneof("kind") == "register":
            # Once: who registers the same again later asks anew.
            add_found(message.register, self._brought.pop(selection.key(message.register.registration), {}))
        request = Request(message, asyncio.get_running_loop().create_future())
        self._requests[message.request_id] = request
        return request

    async def next(self) -> Batch | Notice:
        """The next in the queue. Raises what ended the stream, once the queue is empty. May be cancelled, nothing is lost."""
        self._consuming = True
        self._gate()
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
                    if self._closing:
                        return
                    details = " ".join((error.details() or "").split())
                    if error.code().name not in _LOST_CONNECTION and not any(sign in details for sign in _LOST_WORDS):
                        raise self.channel.error(error) from None
                    reason = plain_reason(details) or error.code().name
                except TimeoutError:
                    reason = f"nothing came for {HEARTBEAT_TIMEOUT_S:.0f} s"
                if self._closing:
                    return
                if not self.settings.reconnect:
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
        # gRPC does not hand on why a stream was refused if a request is written in that moment: the next one says it.
        is_news = self._was_heard or self._connection > 1
        if is_news:
            self._put(Disconnected(self.channel.address, reason))
        attempts = 0
        while True:
            delay = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2**attempts)
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            attempts = min(attempts + 1, 30)
            if await self.channel.ready(READY_TIMEOUT_S):
                break
        if is_news:
            self._put(Reconnected(self.channel.address, attempts, clock() - since))

    def _drop_call(self) -> None:
        if self._call is not None:
            self._call.cancel()
            self._call = None

    async def _read(self) -> None:
        """One connection, from its opening to its end. Raises AioRpcError, or TimeoutError if the path went silent."""
        self._connection += 1
        self._sent_nothing = True
        self._resuming = 0
        self._heard_progress = False
        self._floor = self._received.positions()
        self._call = call = self.channel.stub.Watch()
        # Beside the reading: a broker that cannot get rid of its answers may stop taking requests.
        beside = [asyncio.create_task(self._bring_all(), name="kmonitor stream requests")]
        if self._freshness is not None:
            self._freshness.connected()
            beside.append(asyncio.create_task(self._listen_for_silence(self._freshness), name="kmonitor stream silence"))
        try:
            while True:
                await self._permission()
                async with asyncio.timeout(HEARTBEAT_TIMEOUT_S if self._heard_progress and self._standing else None):
                    message = await call.read()
                if message is None:  # it was no Notification
                    raise errors.unreadable(self.channel.address)
                if not isinstance(message, monitor_pb2.Notification):
                    return  # grpc.aio.EOF
                self._was_heard = True
                if not self._closing:
                    self._dispatch(message)
                elif self._closing in (message.registered.request_id, message.deregistered.request_id):
                    return  # a broker that does not know CloseRequest
        finally:
            self._drop_call()
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)

    async def _permission(self) -> None:
        """Return when the reader may read."""
        while not self._may_read.is_set():
            self._consuming = self._awaited()  # it is read on in a while, if somebody awaits what is behind the events
            try:
                async with asyncio.timeout(IDLE_CONSUMER_S if self._consuming else None):
                    await self._may_read.wait()
            except TimeoutError:
                self._consuming = False
                self._gate()

    async def _listen_for_silence(self, freshness: Freshness) -> None:
        clock = asyncio.get_running_loop().time
        step = (self.settings.stale_after or 0) / 4
        while True:
            due = clock() + step
            await asyncio.sleep(step)
            held_up = clock() - due > step  # this program itself: what has come meanwhile is yet to be read
            if self._may_read.is_set() and self._standing and not held_up:
                self._put(*freshness.silent(clock()))
            else:
                freshness.not_listening(clock())

    async def _bring_all(self) -> None:
        async with self._sending:
            resuming = self._brought_on == 0  # what is asked for first goes on behind the caller's cursor
            self._brought_on = self._connection
            first: list[monitor_pb2.WatchRequest] = []
            for registration_id, wanted in self._standing.bring():
                if registration_id not in self._requests:
                    first.append(monitor_pb2.WatchRequest(request_id=registration_id, register=wanted))
                else:  # some nodes had answered, and the caller was told: there it is of those processes
                    asked = self._requests[registration_id].message.register
                    del asked.found[:]
                    asked.found.extend(wanted.found)
            unanswered = list(self._requests.values())
            for request in unanswered:
                request.again |= resuming or request.connection > 0
            # What was never sent is new; and so is what is asked for behind a deregister: of the same it may be the opposite.
            again = itertools.takewhile(lambda each: each.again and each.message.WhichOneof("kind") == "register", unanswered)
            self._resuming = len(first) + len(list(again))
            for message in first:
                await self._write(message)
            for request in unanswered:
                request.registered.clear()
                request.held.clear()
                await self._send(request)

    async def _send(self, request: Request) -> None:
        # Before the rest is brought nothing is sent: it is in `_requests`, and takes its turn.
        if self._brought_on == self._connection and self._call is not None and request.connection != self._connection:
            request.connection = self._connection
            await self._write(request.message)

    async def _write(self, message: monitor_pb2.WatchRequest) -> None:
        if self._sent_nothing:
            self._sent_nothing = False
            message = self._first(message)
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

    def _first(self, message: monitor_pb2.WatchRequest) -> monitor_pb2.WatchRequest:
        """The request as the first one of a connection."""
        first = monitor_pb2.WatchRequest()
        first.CopyFrom(message)
        if self.settings.linger_ms is not None:
            first.linger_ms = self.settings.linger_ms
        if self._received and self._resuming:  # else nothing is brought again, and what is registered from here on is new
            first.cursor.CopyFrom(self._received.to_proto())
            first.resuming = self._resuming
        return first

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
            self._on_progress(progress_from_proto(message.progress))
        elif kind == "gap":
            self._put(gap_from_proto(message.gap))
        elif kind == "node":
            self._on_node_change(node_change_from_proto(message.node))
        # Else it is a kind that a newer broker knows: what monitors see changes only by addition.

    def _put_events(self, message: events_pb2.EventBatch) -> None:
        node, epoch, boot_id = message.node, message.epoch, message.boot_id
        events: Sequence[events_pb2.Event] = message.events
        if not len(events):
            return
        floor = self._floor.get(node)
        if floor is not None:
            if floor[0] == epoch and events[0].position <= floor[1]:
                events = [event for event in events if event.position > floor[1]]
                if not events:
                    return
            else:
                del self._floor[node]  # positions only grow: the rest of this connection is new
        self._standing.saw(node, boot_id, events)
        self._queued_events += len(events)
        self._put(Batch(node, epoch, events, boot_id))

    def _put(self, *items: Batch | Notice) -> None:
        for item in items:
            self._received.move(item)
            self._queue.append(item)
        if items:
            self._has_news.set()
            self._gate()

    def _on_progress(self, notice: Progress) -> None:
        self._heard_progress = True
        told = [] if self._freshness is None else self._freshness.progress(asyncio.get_running_loop().time(), notice)
        self._put(notice, *told)
        self._standing.progressed()

    def _on_node_change(self, notice: NodeChange) -> None:
        if self._freshness is not None:
            self._freshness.node_changed(asyncio.get_running_loop().time(), notice)
        if notice.state is NodeState.GONE:
            self._standing.node_gone(notice.node)
        self._put(notice)

    def _request(self, request_id: int, kind: str) -> Request | None:
        """What is answered, unless nobody awaits it. Raises BrokerError if it asked for something else."""
        request = self._requests.get(request_id)
        if request is not None and request.message.WhichOneof("kind") != kind:
            raise errors.BrokerError(f"the broker at {self.channel.address} answered a request by what it did not ask for: report it")
        return request

    def _on_registered(self, message: monitor_pb2.Registered) -> None:
        request = self._request(message.request_id, "register")
        answer = Registered.from_proto(message)
        refusal = errors.from_code(message.error.code, message.error.message) if message.HasField("error") else None
        if self._freshness is not None:
            self._freshness.registered(asyncio.get_running_loop().time(), answer)
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
            answer = self._standing.answered(answer, request.message.register)
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
        request = self._request(message.request_id, "deregister")
        if message.HasField("error"):
            if request is not None:
                self._answer(message.request_id, errors.from_code(message.error.code, message.error.message))
            return
        wanted = None
        if request is not None:
            wanted = request.message.deregister.registration
            self._standing.cleared(wanted)
        self._put(Deregistered(message.request_id, message.registration_id, message.event_mask, registration=wanted))
        self._answer(message.request_id, message)

    def _answer(self, request_id: int, answer: monitor_pb2.Deregistered | KmonitorError | None) -> None:
        request = self._requests.pop(request_id, None)
        if request is not None and not request.answer.done():
            if isinstance(answer, KmonitorError):
                request.answer.set_exception(answer)
            else:
                request.answer.set_result(answer)
        self._gate()

    def _awaited(self) -> bool:
        return any(not request.answer.done() for request in self._requests.values())

    def _gate(self) -> None:
        unread = self._queued_events < self.settings.queue_events
        if unread or self._closing or (not self._consuming and self._awaited()):
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
