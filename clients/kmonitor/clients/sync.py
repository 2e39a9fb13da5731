# SPDX-License-Identifier: Apache-2.0
"""The monitor without asyncio: the same methods, blocking. An event loop runs in a thread of its own until `close`."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from kmonitor.clients import errors, freshness
from kmonitor.clients import monitor as asynchronous
from kmonitor.clients.cursor import Cursor
from kmonitor.clients.events import Batch, Event
from kmonitor.clients.monitor import STALE_AFTER_S, Registration
from kmonitor.clients.notifications import Deregistered, Notice, Notification, Process
from kmonitor.clients.selection import Selection
from kmonitor.clients.stream import QUEUE_EVENTS
from kmonitor.v1 import monitor_pb2

T = TypeVar("T")


class Monitor:
    """As `kmonitor.clients.Monitor`. Iterate from one thread at a time; the other methods may be called from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, thread: threading.Thread, inner: asynchronous.Monitor) -> None:
        self._loop = loop
        self._thread = thread
        self._inner = inner
        self._batches = inner.batches()
        self._next: asyncio.Task[Batch | Notice] | None = None  # of the loop's thread: outlives a `next` that ran out of time
        self._ready: deque[Notification] = deque()
        self._cursor = inner.cursor
        self._complete_until: dict[str, int] = {}

    @property
    def address(self) -> str:
        """HOST:PORT of the broker."""
        return self._inner.address

    @property
    def cursor(self) -> Cursor:
        """A copy of how far the caller has come."""
        return self._cursor.copy()

    @property
    def complete_until(self) -> dict[str, int]:
        """As `Monitor.complete_until`."""
        return dict(self._complete_until)

    def register(self, **what: Unpack[Selection]) -> Registration:
        """As `Monitor.register`."""
        return self._run(self._inner.register(**what))

    def register_all(self, selections: Sequence[Selection]) -> list[Registration]:
        """As `Monitor.register_all`."""
        return self._run(self._inner.register_all(selections))

    def deregister(self, registration: Registration | None = None, **what: Unpack[Selection]) -> Deregistered:
        """As `Monitor.deregister`."""
        return self._run(self._inner.deregister(registration, **what))

    def list_nodes(self, *names: str, labels: Mapping[str, str] | None = None) -> list[monitor_pb2.Node]:
        """As `Monitor.list_nodes`."""
        return self._run(self._inner.list_nodes(*names, labels=labels))

    def remove_node(self, node: str) -> None:
        """As `Monitor.remove_node`."""
        self._run(self._inner.remove_node(node))

    def list_processes(
        self, node: str, *, pids: Iterable[int] = (), comms: Iterable[str] = (), uids: Iterable[int] = (), with_args: bool = False
    ) -> list[Process]:
        """As `Monitor.list_processes`."""
        return self._run(self._inner.list_processes(node, pids=pids, comms=comms, uids=uids, with_args=with_args))

    def wait(
        self,
        *,
        node: str,
        pid: int | None = None,
        start_time: int = 0,
        boot_id: str = "",
        pidfile: str | None = None,
        timeout: float | None = None,
        on_notice: Callable[[Notice], None] | None = None,
    ) -> Event:
        """As `Monitor.wait`. `on_notice` is called in the loop's thread."""
        return self._run(
            self._inner.wait(
                node=node, pid=pid, start_time=start_time, boot_id=boot_id, pidfile=pidfile, timeout=timeout, on_notice=on_notice
            )
        )

    def next(self, timeout: float | None = None) -> Notification:
        """The next notification. Raises TimeoutError if none came for `timeout` seconds; none is lost by that."""
        while not self._ready:
            item = self._run(self._fetch(timeout))
            if isinstance(item, Batch):
                self._ready.extend(item)  # one change of threads a batch, not one an event
            else:
                self._ready.append(item)
        taken = self._ready.popleft()
        if isinstance(taken, Event):
            batch = Batch(taken.node, taken.epoch, (taken.raw,), taken.boot_id)
            self._cursor.take(batch)
            self._cursor.forget_ended(batch, batch.events)
        else:
            self._cursor.take(taken)
            if isinstance(taken, Deregistered):
                self._cursor.forget_deregistered(taken)
            self._complete_until = freshness.complete_until(self._complete_until, taken)
        return taken

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Notification:
        return self.next()

    async def _fetch(self, seconds: float | None) -> Batch | Notice:
        if self._next is None:
            self._next = asyncio.ensure_future(anext(self._batches))
        done, _ = await asyncio.wait([self._next], timeout=seconds)
        if not done:
            raise TimeoutError(f"no notification for {seconds} s")
        task, self._next = self._next, None
        return task.result()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if not self._thread.is_alive():
            coroutine.close()
            raise errors.ClosedError("the monitor is closed")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:  # above all KeyboardInterrupt: what nobody waits for must not run on
            future.cancel()
            raise

    async def _shut(self) -> None:
        if self._next is not None:
            self._next.cancel()
            await asyncio.gather(self._next, return_exceptions=True)
        await self._inner.close()

    def close(self) -> None:
        """End the stream, its registrations, and the thread."""
        if self._thread.is_alive():
            self._run(self._shut())
            _stop(self._loop, self._thread)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


async def _end_tasks() -> None:
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
        loop.run_until_complete(_end_tasks())
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


def connect(
    address: str | None = None,
    *,
    cursor: Cursor | None = None,
    reconnect: bool = True,
    queue_events: int = QUEUE_EVENTS,
    linger: float | None = None,
    resumable: bool = False,
    stale_after: float | None = STALE_AFTER_S,
    credentials: grpc.ChannelCredentials | None = None,
) -> Monitor:
    """As `kmonitor.clients.connect`; use it in a `with`, or call `close`."""
    opening = asynchronous.connect(
        address,
        cursor=cursor,
        reconnect=reconnect,
        queue_events=queue_events,
        linger=linger,
        resumable=resumable,
        stale_after=stale_after,
        credentials=credentials,
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=_serve, args=(loop,), name="kmonitor monitor", daemon=True)
    thread.start()
    try:
        inner = asyncio.run_coroutine_threadsafe(opening.open(), loop).result()
    except BaseException:
        _stop(loop, thread)
        raise
    return Monitor(loop, thread, inner)
