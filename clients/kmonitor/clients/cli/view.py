# SPDX-License-Identifier: Apache-2.0
"""The loop of `kmon watch` and `kmon up`: registers, shows what comes, acts on it, and knows when nothing more can come."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from kmonitor.clients.cli.actions import Action
from kmonitor.clients.cli.jobs import Jobs
from kmonitor.clients.cli.keeper import Keeper
from kmonitor.clients.cli.output import say
from kmonitor.clients.cursor import Cursor
from kmonitor.clients.events import Batch
from kmonitor.clients.monitor import Monitor
from kmonitor.clients.notifications import Gap, GapReason, NodeChange, NodeState, Notice, Progress, Registered, RegistrationState
from kmonitor.clients.selection import Selection
from kmonitor.v1 import events_pb2
from kmonitor.wire.errors import GapError, KmonitorError, UsageError

_FORK, _EXIT = 0x08, 0x40
_FINAL = (RegistrationState.EXITED, RegistrationState.NOT_FOUND)


class Sink(Protocol):
    """Where notifications are shown."""

    def batch(self, batch: Batch, limit: int) -> None:
        """Show the first `limit` events."""

    def notice(self, notice: Notice) -> None:
        """Show anything else."""


@dataclass(slots=True)
class Plan:
    """What to show, for how long, and what to do beside."""

    selections: list[Selection]
    count: int | None = None
    seconds: float | None = None
    fail_on_gap: bool = False
    resume: Path | None = None
    linger: float | None = None  # seconds
    cursor: Cursor = field(default_factory=Cursor)
    actions: list[Action] = field(default_factory=list)
    jobs: int = 1  # events that are acted on at a time
    # Whether the end of a watched process is sure to be seen: exits are asked for, and no filter hides them.
    ends_seen: bool = False
    follow: bool = False


class Watched:
    """Which of the targets something can still come from."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._unanswered = len(plan.selections)
        # Processes that run, as far as we know -> the pid that was registered, of which they come.
        self._open: dict[tuple[str, int], int] = {}
        self._running: dict[tuple[int, str], int] = {}  # registration and node -> pid, of those that were found
        self._armed: set[tuple[int, str]] = set()  # registrations by node that may yet come to something
        self._early: set[tuple[str, str, int, int]] = set()  # exits that came before the answer that says RUNNING
        self._delivered = False
        self._found = False
        self._refusal: str | None = None
        self.removed: list[str] = []  # nodes, while something was watched there
        # What was forked before this run is watched, and not known here.
        self._ends_seen = plan.ends_seen and not (plan.follow and plan.cursor)
        self._unsure: set[str] = set()  # nodes where the ends of followed processes may not have been told
        # Behind a cursor, and after a reconnect, exits may come from the log after the answer that says EXITED: not before a
        # progress is all said.
        self._behind = bool(plan.cursor)

    def registered(self, notice: Registered) -> None:
        """A node's answer."""
        if notice.pending == 0 and self._unanswered:
            self._unanswered -= 1
        place = (notice.registration_id, notice.node)
        self._armed.discard((notice.registration_id, ""))
        self._armed.discard(place)
        self._refusal = notice.error or self._refusal
        if notice.state in _FINAL or notice.error:
            self._found |= notice.state is RegistrationState.EXITED
            pid = self._running.pop(place, None)
            # What it has forked may live on, and is followed still.
            alone = notice.node not in self._unsure
            gone = [key for key, root in self._open.items() if key[0] == notice.node and root == pid and (not alone or key[1] == pid)]
            for each in gone:
                del self._open[each]
            self._behind |= bool(gone)
        elif notice.state is RegistrationState.RUNNING and notice.process is not None:
            self._found = True
            self._running[place] = notice.process.pid
            if (notice.node, notice.boot_id, notice.process.pid, notice.process.start_time) not in self._early:
                self._open[notice.node, notice.process.pid] = notice.process.pid
        else:
            self._armed.add(place)

    def node_changed(self, notice: NodeChange) -> None:
        """A node that was removed has nothing to say any more."""
        if notice.state is NodeState.GONE:
            if any(node == notice.node for node, _ in self._open) or any(place[1] == notice.node for place in self._armed):
                self.removed.append(notice.node)
            self._open = {key: root for key, root in self._open.items() if key[0] != notice.node}
            self._armed = {place for place in self._armed if place[1] != notice.node}

    def gap(self, notice: Gap) -> None:
        """What the log no longer has, nobody will tell."""
        if notice.reason is GapReason.LOG:
            self._unsure.add(notice.node)

    def batch(self, batch: Batch) -> None:
        """Processes that ended, and those that came with --follow."""
        if not self._ends_seen or not (self._open or self._behind or self._unanswered):
            return
        node, watched = batch.node, self._open
        for event in batch.events:
            kind = event.type
            if kind == _EXIT:
                watched.pop((node, event.pid), None)
                if self._unanswered:
                    self._early.add((node, batch.boot_id, event.pid, event.start_time))
                self._delivered = True
            elif kind == _FORK and self._plan.follow and (node, event.pid) in watched:
                watched[node, event.child_pid] = watched[node, event.pid]

    def progress(self) -> None:
        """All up to now was delivered."""
        if not self._unanswered:
            self._behind = False

    def over(self) -> bool:
        """Nothing can come."""
        if self._unanswered or self._armed or self._behind:
            return False
        return not self._open if self._ends_seen else not self._found and not self._open

    def check(self) -> None:
        """At the end: raise UsageError if nothing of what was asked for was there to watch."""
        if not self._found and not self._delivered:
            if self.removed:
                raise UsageError(f"nothing to watch: removed was {', '.join(self.removed)}")
            raise UsageError(
                self._refusal or "nothing to watch: no node that answered has what was asked for (kmon ps --node NAME lists what runs)"
            )


async def show(monitor: Monitor, sink: Sink, plan: Plan) -> int:
    """Run the plan to its end; returns the exit status. Raises KmonitorError; GapError with `fail_on_gap`."""
    cursor = plan.cursor.copy()
    if plan.resume is None:
        return await _show(monitor, _View(sink, plan, cursor, None), plan)
    keeper = Keeper(plan.resume, cursor)
    async with keeper.working():
        return await _show(monitor, _View(sink, plan, cursor, keeper), plan)


async def _show(monitor: Monitor, seen: _View, plan: Plan) -> int:
    task = asyncio.current_task()
    assert task is not None
    registering = asyncio.create_task(monitor.register_all(plan.selections))
    # Beside the loop, which shows what comes meanwhile. A refusal ends the loop.
    registering.add_done_callback(lambda done: task.cancel() if not done.cancelled() and done.exception() else None)
    limit = asyncio.timeout(plan.seconds)
    try:
        async with limit:
            async for item in monitor.batches():
                if await seen.take(item):
                    break
    except TimeoutError:
        if not limit.expired():
            raise
    except asyncio.CancelledError:
        if registering.done() and not registering.cancelled() and (error := registering.exception()) is not None:
            task.uncancel()
            raise error from None
        raise
    finally:
        registering.cancel()
        with contextlib.suppress(BaseException):
            await registering
        # To its end, also if we are to end: it may be half way through a failover, and must be neither cut off nor done twice.
        failure = await seen.finish()
    if failure is not None:
        raise failure
    return 0


class _View:
    def __init__(self, sink: Sink, plan: Plan, cursor: Cursor, keeper: Keeper | None) -> None:
        self._sink = sink
        self._plan = plan
        self._left = plan.count if plan.count is not None else 1 << 62
        self._watched = Watched(plan)
        self._cursor = cursor  # what was shown, and acted on
        self._keeper = keeper
        self._jobs: Jobs[Batch | Notice] = Jobs(plan.jobs, self._took)

    async def take(self, item: Batch | Notice) -> bool:
        """Show and do; true if that was the last."""
        if isinstance(item, Batch):
            await self._batch(item)
        else:
            self._sink.notice(item)
            self._jobs.passed(item)
            if isinstance(item, Registered):
                if item.error and not item.node:
                    raise UsageError(item.error)
                self._watched.registered(item)
            elif isinstance(item, NodeChange):
                self._watched.node_changed(item)
            elif isinstance(item, Progress):
                self._watched.progress()
            elif isinstance(item, Gap):
                self._watched.gap(item)
                if self._plan.fail_on_gap:
                    raise GapError(f"events of {item.node} are missing ({item.reason.name})")
        if self._left <= 0:
            return True
        if self._watched.over():
            self._watched.check()
            if self._watched.removed:  # nobody knows what became of it there
                say(f"nothing more will come: what was watched has ended, or was on {', '.join(self._watched.removed)}, now removed")
            else:
                say("everything that was watched has ended")
            return True
        return False

    async def _batch(self, batch: Batch) -> None:
        limit = min(self._left, len(batch))
        if limit < len(batch):
            batch = dataclasses.replace(batch, events=batch.events[:limit])
        self._left -= limit
        if not self._plan.actions:
            self._sink.batch(batch, limit)
            self._took(batch)
        for event in batch.events if self._plan.actions else ():
            one = dataclasses.replace(batch, events=(event,))
            self._sink.batch(one, 1)
            await self._jobs.begin(one, self._act(one, event))
        self._watched.batch(batch)

    async def _act(self, batch: Batch, event: events_pb2.Event) -> None:
        for action in self._plan.actions:
            await action.act(batch, event)

    async def finish(self) -> KmonitorError | None:
        """Wait for what was begun; what has gone wrong with it."""
        return await self._jobs.finish()

    def _took(self, item: Batch | Notice) -> None:
        self._cursor.take(item)
        if self._keeper is not None:
            # Which process a pid was found to be must outlive us from the first moment on.
            self._keeper.moved(at_once=isinstance(item, Registered))
