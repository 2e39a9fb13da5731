# SPDX-License-Identifier: Apache-2.0
"""A guard: for each of some processes, wherever they run, is it alive, since when, why did it die, and how sure is that."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from kmonitor.clients import errors
from kmonitor.clients.events import Event
from kmonitor.clients.guard_queue import VerdictQueue
from kmonitor.clients.guard_routes import Routes, concerns
from kmonitor.clients.guarded import Clocks, Guarded, Look, own_offset
from kmonitor.clients.guarded_group import GuardedGroup
from kmonitor.clients.guarded_process import GuardedProcess
from kmonitor.clients.monitor import Monitor
from kmonitor.clients.notifications import Disconnected, Fresh, Notification, Reconnected, Stale
from kmonitor.clients.verdict import Subject, Verdict
from kmonitor.wire import selectors
from kmonitor.wire.errors import BadSelectorError, BrokerUnreachableError, KmonitorError, UsageError

LOOK_AGAIN_S = 0.2
DEREGISTER_S = 1.0
"""So long `remove` waits for a broker that does not answer; it is told all the same when it does."""


class ProcessGuard:
    """Guards subjects through one monitor, whose iteration is then the guard's.

    async with connect() as monitor, ProcessGuard(monitor) as guard:
        await guard.add(Subject("web", node="alpha", pidfile="/run/web.pid"))
        async for verdict in guard:
            ...

    Iteration gives a verdict whenever `life`, `process`, `alive` or `blind` of a subject has changed, in the order in which that
    became known. A consumer that is slow misses none: the queue is of changes, and those are few. But of a group's number of living
    processes it is told the last, if nothing else has changed meanwhile.

    A pid is followed to its end, which is final. A pidfile, unit or control group goes on: DEAD is followed by ALIVE, with another
    process, when it is back. (For a pidfile that means that the agent reads it again every `look_again` seconds while it is not ALIVE;
    a new process that the file names while the old one still lives is found only when that one has ended.)

    While the watch is blind a verdict keeps its `life`, and says why and since when in `blind`. When sight is back, what was missed is
    told: a process that ended meanwhile with its cause if the log has it, else as inferred.
    """

    def __init__(self, monitor: Monitor, *, look_again: float = LOOK_AGAIN_S) -> None:
        """`look_again` in seconds. Raises UsageError."""
        if not look_again > 0:
            raise UsageError(f"look_again={look_again:g}: give seconds, more than 0")
        self._monitor = monitor
        self._look_again = look_again
        self._clocks = Clocks(offset=own_offset())
        self._guarded: dict[str, Guarded] = {}
        self._routes = Routes()
        self._serving: dict[Guarded, asyncio.Task[None]] = {}
        self._refusals: dict[Guarded, KmonitorError] = {}
        """Of those that are being added."""
        self._leaving: set[asyncio.Task[None]] = set()
        self._blinding: dict[str | None, Disconnected | Stale] = {}
        """What stands in the way of all ("" is a connection that is lost, None a broker that says nothing), and of nodes, now."""
        self._queue = VerdictQueue()
        self._news = asyncio.Event()
        """Set when there may be something for whoever iterates."""
        self._known = asyncio.Condition()
        """Notified when something was taken: for `add`."""
        self._reader: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._closed = False

    async def add(self, *subjects: Subject) -> None:
        """Guard these too. Returns when the broker has answered for each: its first verdict is then to be had from `verdict`, and
        comes in the iteration. Raises UsageError for a name that is there already, and what `Monitor.register` raises: then none of
        these is guarded."""
        self._check_open()
        fresh = self._make(subjects)
        self._start()
        for each in fresh:
            self._guarded[each.subject.name] = each
            self._routes.add(each)
            for item in self._blinding.values():
                if concerns(item, each):
                    each.take(item)
        try:
            await self._register(fresh)
            async with self._known:
                await self._known.wait_for(lambda: self._failure is not None or all(map(self._is_known, fresh)))
            self._check_not_refused(fresh)
        except BaseException:
            for each in fresh:
                self._forget(each)
                self._leave(each)
            raise
        self._check_open()

    async def remove(self, name: str) -> None:
        """Guard it no more. Nothing of it comes in the iteration after that. Raises KeyError."""
        guarded = self._guarded[name]
        self._forget(guarded)
        if not guarded.over and self._failure is None and not self._closed:
            await asyncio.wait([self._leave(guarded)], timeout=DEREGISTER_S)

    def verdict(self, name: str) -> Verdict:
        """As it is known now. Raises KeyError."""
        return self._guarded[name].verdict

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """Of all subjects, by name."""
        return {name: guarded.verdict for name, guarded in self._guarded.items()}

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Verdict:
        """Raises what ends the monitor (ClosedError, BrokerUnreachableError, NotAuthorisedError, ...); StopAsyncIteration when the
        guard was closed."""
        while not self._queue:
            if self._closed:
                raise StopAsyncIteration
            if self._failure is not None:
                raise self._failure
            self._news.clear()
            await self._news.wait()
        return self._queue.take()

    async def close(self) -> None:
        """End the guard; the monitor is the caller's. Its registrations stay until that is closed."""
        if self._closed:
            return
        self._closed = True
        tasks = [*self._serving.values(), *self._leaving, *([] if self._reader is None else [self._reader])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._queue.clear()
        await self._notify()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    # ---- who is guarded

    def _make(self, subjects: Sequence[Subject]) -> list[Guarded]:
        names = [subject.name for subject in subjects]
        for name in names:
            if name in self._guarded or names.count(name) > 1:
                raise UsageError(f"{name!r} is guarded already: give each subject a name of its own")
        return [_guarded(subject, self._clocks) for subject in subjects]

    async def _register(self, fresh: Sequence[Guarded]) -> None:
        """All of them. What a pidfile's node could not do with the file is its answer."""
        if not fresh:
            return
        with contextlib.suppress(errors.RegistrationError):
            await self._monitor.register_all([each.wanted for each in fresh])  # one call: a cursor is for all of them
            return
        # Some were refused: asked one by one it is known which. The others are registered, and only asked again.
        results = await asyncio.gather(*(self._monitor.register(**each.wanted) for each in fresh), return_exceptions=True)
        for each, result in zip(fresh, results, strict=True):
            if isinstance(result, BaseException):
                if each.subject.pidfile is None or not isinstance(result, errors.RegistrationError) or not _of_the_file(result):
                    raise result
                self._put(each, each.refused(str(result), by_node=True))

    def _check_not_refused(self, fresh: Sequence[Guarded]) -> None:
        for each in fresh:
            if each in self._refusals:
                raise self._refusals[each]

    def _is_known(self, guarded: Guarded) -> bool:
        return guarded.answered or guarded in self._refusals

    def _leave(self, guarded: Guarded) -> asyncio.Task[None]:
        task = asyncio.create_task(self._deregister(guarded), name=f"kmonitor guard leaves {guarded.subject.name}")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        return task

    async def _deregister(self, guarded: Guarded) -> None:
        """Unless somebody else wants the same."""
        if not self._routes.is_wanted(guarded.key):
            with contextlib.suppress(KmonitorError):  # there may be none any more
                await self._monitor.deregister(**guarded.wanted)

    def _forget(self, guarded: Guarded) -> None:
        if self._guarded.get(guarded.subject.name) is guarded:
            del self._guarded[guarded.subject.name]
        self._queue.drop(guarded)
        self._routes.remove(guarded)
        self._refusals.pop(guarded, None)
        serving = self._serving.pop(guarded, None)
        if serving is not None:
            serving.cancel()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise errors.ClosedError("the guard is closed")

    # ---- what the monitor says

    def _start(self) -> None:
        if self._reader is None:
            self._reader = asyncio.create_task(self._read(), name="kmonitor guard")

    async def _read(self) -> None:
        try:
            async for item in self._monitor:
                self._take(item)
                if not isinstance(item, Event):
                    await self._notify()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._failure = error
            if not isinstance(error, KmonitorError):
                raise
        finally:
            self._news.set()
            if self._failure is not None:
                await self._notify()

    async def _notify(self) -> None:
        self._news.set()
        async with self._known:
            self._known.notify_all()

    def _take(self, item: Notification) -> None:
        if isinstance(item, Disconnected):
            self._blinding[""] = item
        elif isinstance(item, Stale):
            self._blinding[item.node] = item
        elif isinstance(item, Reconnected | Fresh):
            self._blinding.pop(item.node if isinstance(item, Fresh) else "", None)
        for guarded in self._routes.concerned(item):
            self._put(guarded, guarded.take(item))

    def _put(self, guarded: Guarded, verdicts: Iterable[Verdict]) -> None:
        """Tell them, and do what it wants."""
        if self._guarded.get(guarded.subject.name) is not guarded:
            return
        self._routes.moved(guarded)
        for verdict in verdicts:
            self._queue.put(guarded, verdict)
            self._news.set()
        if guarded.leave:
            guarded.leave = False
            self._leave(guarded)
        if guarded.wants_something and guarded not in self._serving:
            self._serving[guarded] = asyncio.create_task(self._serve(guarded), name=f"kmonitor guard serves {guarded.subject.name}")

    # ---- looking again

    async def _serve(self, guarded: Guarded) -> None:
        """Do what it wants, one thing after the other, until it wants nothing. Answers to registrations come in the stream."""
        group = guarded if isinstance(guarded, GuardedGroup) else None
        try:
            while guarded.wants_something:
                if guarded.look is not Look.NO:
                    await self._delay(guarded.look)
                    guarded.look = Look.NO
                    await self._register_again(guarded)
                elif group is not None and group.wants_list is not Look.NO:
                    await self._delay(group.wants_list)
                    await self._list(group)
                elif group is not None:
                    await self._look_up(group)
        except KmonitorError:
            pass  # the stream has ended: whoever iterates is told
        finally:
            self._serving.pop(guarded, None)

    async def _delay(self, look: Look) -> None:
        if look is Look.LATER:
            await asyncio.sleep(self._look_again)

    async def _register_again(self, guarded: Guarded) -> None:
        try:
            await self._monitor.register(**guarded.wanted)
        except errors.RegistrationError as refusal:
            self._put(guarded, guarded.refused(str(refusal), by_node=_of_the_file(refusal)))

    async def _list(self, group: GuardedGroup) -> None:
        subject = group.subject
        group.listing()
        try:
            members = await self._monitor.list_group(subject.node, cgroup=subject.cgroup, unit=subject.unit)
        except KmonitorError as error:
            group.not_listed()
            away = isinstance(error, BrokerUnreachableError | errors.NodeUnreachableError)
            if not away and not group.answered:
                self._refusals[group] = error  # an agent that cannot do it: whoever adds it is to know
            await asyncio.sleep(self._look_again)
        else:
            group.listed(members)
            self._put(group, group.told())
        await self._notify()

    async def _look_up(self, group: GuardedGroup) -> None:
        pids, group.wants_pids = group.wants_pids, ()
        try:
            group.found(await self._monitor.list_processes(group.subject.node, pids=pids))
        except KmonitorError:
            group.not_found()
        self._put(group, group.told())


def _guarded(subject: Subject, its_clocks: Clocks) -> Guarded:
    """Raises BadSelectorError."""
    selectors.check_node_name(subject.node)
    named = [kind for kind in ("pid", "pidfile", "unit", "cgroup") if getattr(subject, kind) is not None]
    if len(named) != 1:
        raise BadSelectorError(f"subject {subject.name!r}: give one of pid, pidfile, unit and cgroup")
    if (subject.start_time or subject.boot_id) and subject.pid is None:
        raise BadSelectorError(f"subject {subject.name!r}: start_time and boot_id belong to a pid")
    if subject.unit is not None or subject.cgroup is not None:
        for glob in subject.comms:
            selectors.check_comm(glob)
        return GuardedGroup(subject, its_clocks)
    if subject.comms:
        raise BadSelectorError(f"subject {subject.name!r}: comms belong to a unit or cgroup")
    return GuardedProcess(subject, its_clocks)


def _of_the_file(refusal: errors.RegistrationError) -> bool:
    return refusal.code == errors.FAILED_PRECONDITION
