# SPDX-License-Identifier: Apache-2.0
"""One monitor's registrations and spans, and what is still to be sent to it. May outlive its stream: see resume.py."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
from bisect import bisect
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kmonitor.broker.block import Block
from kmonitor.broker.encode import Encoder
from kmonitor.broker.errors import Code, RefusedError
from kmonitor.broker.keys import Key
from kmonitor.broker.log import Entry, EventLog
from kmonitor.broker.losses import told
from kmonitor.broker.mark import Mark
from kmonitor.broker.matching import Matcher, Span
from kmonitor.broker.nodes import Node
from kmonitor.broker.notices import node_change
from kmonitor.broker.outbox import MESSAGES_MOST, Missed, Notice, Outbox, OverflowedError, count_types
from kmonitor.broker.registered import Registered
from kmonitor.broker.registrations import ArmState, Registration
from kmonitor.broker.router import Router
from kmonitor.broker.turns import Turns
from kmonitor.v1 import monitor_pb2
from kmonitor.wire.record import Indices

REQUESTS_HELD_ABOVE = 256 << 10
"""Bytes of unsent messages above which no more requests are read from the stream."""
REQUESTS_PENDING = 1024
"""Requests that no node has answered yet, above which no more are read."""
PAST_REGISTRATIONS = 4096
"""Registrations that are over, kept for a stream that comes back."""
ANSWER_BYTES = 1024
"""So much more may wait for each registration: all of them are answered at once when a node comes back."""
MISSED_MARKS = 1024
MISSED_ROWS = 1 << 16
"""So many rows that retention has taken are known one by one, for a session without a stream."""


@dataclass(slots=True)
class Cursor:
    """What a client has taken from an earlier stream."""

    positions: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Node -> (epoch, position of the last event)."""
    log_id: int = 0
    number: int = 0
    """The last mark of our log that it was told of; 0 if it says nothing of that."""
    stream_id: int = 0
    """Of the earlier stream; 0 if that is not said."""


@dataclass(frozen=True, slots=True)
class _Part:
    """The session's rows of one block."""

    offset: int
    node: str
    epoch: int
    positions: npt.NDArray[np.uint64]
    types: npt.NDArray[np.uint8]
    times: tuple[int, int]
    end: int


@dataclass(slots=True)
class Evicted:
    """What the log has dropped while there was no stream to bring it to."""

    marks: list[Mark] = field(default_factory=list)
    whole: bool = True
    """Whether all of it is known."""
    _parts: list[_Part] = field(default_factory=list)
    _rows: int = 0

    def add_mark(self, mark: Mark) -> None:
        """A mark that concerns the session is about to go."""
        self.marks.append(mark)
        if len(self.marks) > MISSED_MARKS:
            self.give_up()

    def give_up(self) -> None:
        """From here on it is only known that something was dropped."""
        self.whole = False
        self.marks.clear()
        self._parts.clear()

    def add(self, block: Block, rows: Indices) -> None:
        """These rows of a block are about to go."""
        self._rows += len(rows)
        if self._rows > MISSED_ROWS:
            self.give_up()
        if self.whole and len(rows):
            times = block.unix_ns(int(rows[0])), block.unix_ns(int(rows[-1]))
            types = block.column("type")[rows]
            self._parts.append(_Part(block.offset, block.node, block.epoch, block.positions[rows], types, times, block.end))

    @classmethod
    def together(cls, several: Sequence[Evicted]) -> Evicted:
        """What any of these sessions had there: each mark and row once."""
        if len(several) == 1:
            return several[0]
        marks = {mark.offset: mark for each in several for mark in each.marks}
        parts: dict[int, list[_Part]] = {}
        for each in several:
            for part in each._parts:
                parts.setdefault(part.offset, []).append(part)
        return cls([marks[at] for at in sorted(marks)], _parts=[_union(parts[at]) for at in sorted(parts)])

    def behind(
        self, positions: Mapping[str, tuple[int, int]], floors: Mapping[str, int], is_later: Callable[[str, int, int], bool]
    ) -> list[tuple[int, str, int, Missed]]:
        """What a client with this cursor has not taken, between marks of the same node: (log offset, node, epoch, that).

        `positions`: node -> (epoch, last position taken); `floors`: node -> log offset before which it has taken everything; `is_later`:
        whether one epoch of a node came after another.
        """
        found: dict[tuple[str, int, int], tuple[int, Missed]] = {}
        marks: dict[str, list[int]] = {}
        for mark in self.marks:
            marks.setdefault(mark.node, []).append(mark.offset)
        for part in self._parts:
            if part.offset < floors.get(part.node, 0):
                continue
            taken = positions.get(part.node)
            if taken is not None and part.epoch != taken[0] and not is_later(part.node, part.epoch, taken[0]):
                continue
            same = taken is not None and part.epoch == taken[0]
            first = int(np.searchsorted(part.positions, np.uint64(taken[1]), side="right")) if taken is not None and same else 0
            if first == len(part.positions):
                continue
            missed = Missed(int(part.positions[first]), part.end, *part.times, count_types(part.types[first:]))
            _, before = found.setdefault((part.node, part.epoch, bisect(marks.get(part.node, ()), part.offset)), (part.offset, missed))
            if before is not missed:
                before.add(missed)
        return [(offset, node, epoch, missed) for (node, epoch, _), (offset, missed) in found.items()]


def _union(parts: list[_Part]) -> _Part:
    """The rows of one block that are in any of its parts."""
    positions, first = np.unique(np.concatenate([part.positions for part in parts]), return_index=True)
    types = np.concatenate([part.types for part in parts])[first]
    times = min(part.times[0] for part in parts), max(part.times[1] for part in parts)
    return dataclasses.replace(parts[0], positions=positions, types=types, times=times)


class Keeper(Protocol):
    """Remembers sessions for a broker that is started again."""

    def session_changed(self, session: Session) -> None:
        """It goes on with what another stream had."""
        ...

    def span_changed(self, session: Session, span: Span, *, there: bool) -> None:
        """It is there, or has ended (`there`), or is of no use any more."""
        ...

    def registration_changed(self, registration: Registration) -> None:
        """It was made, or has got another state, or (of no session any more) is gone."""
        ...


class Session:
    """Takes what the broker gives it, never blocks it, and gives it out to the one task that sends."""

    def __init__(self, log: EventLog, encoder: Encoder, router: Router, lagging: set[Outbox], linger: float = 0.0) -> None:
        """`linger`: seconds for which it outlives its stream."""
        self.stream_id = secrets.randbits(62) | 1
        """Names the stream, and one that takes up where it ended."""
        self.id = secrets.randbits(62)
        """Under which it is remembered."""
        self.log = log
        self.linger = linger
        self.keeper: Keeper | None = None
        """Remembers it, where the broker outlives itself."""
        self.matcher = Matcher(self._span_changed, self._changed)
        self.outbox = Outbox(log, encoder, router, self.matcher, lagging, self._rebooted, self.stream_id)
        self.registrations = Registered()
        self.past: dict[Key, Registration] = {}
        """Registrations that are over, and still have spans."""
        self.cursor: Cursor | None = None
        """What the client took from an earlier stream, if it brought that."""
        self.told_of_absence: dict[str, tuple[int, int, int]] = {}
        """Node -> (epoch, from, to): the positions where, as a gap says, nobody kept its place there."""
        self.goes_on_with = 0
        """Names an earlier stream that it is to go on with, until all of that is known."""
        self.resuming = 0
        """Register requests that are still to come before anything is delivered."""
        self.begun = False
        """Whether a request of its client was taken, or refused."""
        self.detached = False
        """Whether its stream has ended."""
        self.detached_from = 0
        """Log offset before which it was not counted what is dropped."""
        self.evicted = Evicted()
        self.forerunners: list[Session] = []
        """Those of the stream that it goes on with, until all of that is known."""
        self.donors: dict[Session, None] = {}
        """The sessions that it goes on with, until all of that is known."""
        self.donor_spans: dict[Session, tuple[int, dict[Key, list[Span]]]] = {}
        """Their spans by registration, and of which version of their matchers that is."""
        self.reads_from = 0
        """Log offset from which on it had something to read when it came back."""
        self.floors: dict[str, int] = {}
        """The same by node."""
        self.before: list[Notice] = []
        """What is to be told before anything of that."""
        self.failure: RefusedError | None = None
        """Why the broker ended the stream."""
        self.pending = 0
        """Answers to requests that are still to come from agents."""
        self._serials = 0
        self._calm = asyncio.Event()
        self._calm.set()

    @property
    def takes(self) -> bool:
        """Whether there is a stream to bring anything to."""
        return self.failure is None and not self.detached

    def next_serial(self) -> int:
        """A number for a registration that no other of the session has had."""
        self._serials += 1
        return self._serials

    def offer(self, block: Block, rows: Indices) -> None:
        """Rows of a block for this session."""
        if self.takes:
            self.outbox.offer(block, rows)

    def offer_mark(self, mark: Mark) -> None:
        """A mark in the log: a session without a stream finds it there."""
        if self.failure is not None or self.detached:
            return
        try:
            self.outbox.offer_mark(mark)
        except OverflowedError:
            self._overflowed()

    def tell(self, message: bytes, *, absent: str = "") -> None:
        """A notification, behind all that came before it. A session that lets too many gather is ended. `absent`: the node of which it
        says that nobody kept its place there."""
        if self.failure is not None or self.detached:
            return
        try:
            self.outbox.put(message, MESSAGES_MOST + ANSWER_BYTES * len(self.registrations), absent=absent)
        except OverflowedError:
            self._overflowed()
        self._weigh()

    def progress(self, nodes: list[tuple[str, int, int, int]]) -> None:
        """How far the nodes are that it watches: (node, epoch, position, Unix nanoseconds).

        Nothing before its first request: with that it may come to go on with an earlier stream, and is to be told from where that was on.
        """
        if self.begun and self.failure is None and not self.detached:
            with contextlib.suppress(OverflowedError):  # it has much to read before that
                self.outbox.put_progress(nodes)

    def note_absence(self, node: str, epoch: int, first: int, until: int) -> None:
        """It is told that nobody kept its place on a node between two positions. A stream that comes back may not have taken that."""
        before = self.told_of_absence.get(node)
        if before is not None and before[0] == epoch:
            first, until = min(first, before[1]), max(until, before[2])
        self.told_of_absence[node] = epoch, first, until
        self._changed()

    def pends(self, answers: int) -> None:
        """So many more answers are awaited; fewer, if negative."""
        self.pending += answers
        self._weigh()

    def fail(self, failure: RefusedError) -> None:
        """End the stream. The first reason counts."""
        if self.failure is None:
            self.failure = failure
        self.outbox.close()
        self._calm.set()

    def detach(self) -> None:
        """The stream has ended, and one that takes up where it ended may come."""
        self.detached = True
        self.detached_from = self.log.oldest
        self.outbox.close()
        self.matcher.recall()

    def evicting(self, entry: Entry) -> None:
        """The log is about to drop an entry: of what this session had there, the numbers remain."""
        if isinstance(entry, Block):
            self.evicted.add(entry, self.outbox.select(entry))
        elif told(entry, self.matcher, self.log.log_id) is not None:
            self.evicted.add_mark(entry)

    async def ready_for_request(self) -> None:
        """Wait until the monitor has read enough of what it caused for its next request to be taken."""
        await self._calm.wait()

    async def batches(self, turns: Turns) -> AsyncIterator[list[bytes]]:
        """What is to be sent, for as long as the stream lives. Raises RefusedError when the broker ends it."""
        clock = asyncio.get_running_loop().time
        sent_at = float("-inf")
        while True:
            await self.outbox.filled.wait()
            if not self.outbox.messages_bytes and (wait := turns.wait_s(clock(), sent_at)) and self.failure is None:
                await asyncio.sleep(wait)
            if self.failure is not None:
                raise self.failure
            batch = self.outbox.take()
            self._weigh()
            if batch:
                sent_at = clock()
                turns.sent(sent_at, len(batch))
                yield batch
            if len(self.outbox):
                await asyncio.sleep(0)  # a long stretch of the log must not keep others waiting

    def registration_of(self, key: Key) -> Registration | None:
        """One that stands, or one that is over and may still have something to bring."""
        return self.registrations.get(key) or self.past.get(key)

    def over(self, registration: Registration) -> None:
        """It is over on all nodes that it names."""
        if not self.registrations.remove(registration) or not registration.had_spans:
            return
        self.past[registration.key] = registration
        if len(self.past) > PAST_REGISTRATIONS:
            forgotten = self.past.pop(next(iter(self.past)))
            if self.keeper is not None:
                self.keeper.registration_changed(forgotten)

    def concerned(self, node: Node) -> list[int]:
        """Ids of the registrations that hold on a node, or will once it is armed."""
        found = []
        for registration in self.registrations.about(node.name):
            arm = registration.arm_on(node.name)
            if registration.key.terms.selects(node.name, node.labels) if arm is None else arm.state is not ArmState.OVER:
                found.append(registration.id)
        return found

    def _span_changed(self, span: Span, there: bool) -> None:
        if self.keeper is not None:
            self.keeper.span_changed(self, span, there=there)

    def _changed(self) -> None:
        if self.keeper is not None:
            self.keeper.session_changed(self)

    def _rebooted(self, mark: Mark) -> bytes | None:
        ids = [registration.id for registration in self.registrations.values() if registration.arm_on(mark.node) is not None]
        return node_change(mark.node, monitor_pb2.NODE_STATE_REBOOTED, mark.boot_id, "it came back with another boot id", ids)

    def _overflowed(self) -> None:
        self.fail(RefusedError(Code.RESOURCE_EXHAUSTED, "the monitor does not read: too many messages wait for it"))

    def _weigh(self) -> None:
        # While it says what it had before, nothing is given to it: it could wait for ever.
        held = self.outbox.messages_bytes > REQUESTS_HELD_ABOVE or self.pending > REQUESTS_PENDING
        if self.failure is None and held and not self.resuming:
            self._calm.clear()
        else:
            self._calm.set()
