# SPDX-License-Identifier: Apache-2.0
"""Sessions that outlive their streams, and streams that take up where an earlier one ended.

When a stream ends its session stays for a while: its registrations go on being armed, its spans go on following processes. A
stream that brings a cursor, and registers the same, gets copies of these spans, from its cursor on, and begins by reading the log
there. From then on it is a session like any other that was behind.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator

from kmonitor.broker.arms import Arms
from kmonitor.broker.errors import Code, RefusedError
from kmonitor.broker.idle import Backlog
from kmonitor.broker.keys import Pidfile, Process
from kmonitor.broker.log import EventLog
from kmonitor.broker.losses import number_of, told
from kmonitor.broker.matching import Span
from kmonitor.broker.nodes import Node
from kmonitor.broker.notices import gap
from kmonitor.broker.outbox import Notice, gap_of
from kmonitor.broker.registrations import Arm, ArmState, Registration
from kmonitor.broker.sessions import Cursor, Evicted, Session
from kmonitor.v1 import monitor_pb2
from kmonitor.wire.masks import EventType

DETACHED_MOST = 1024
"""Sessions without a stream; the one that has waited longest goes when there are more."""

LINGERS_MOST = 10
"""However busy the broker is: it would let go of no session any more."""
_LOOK_S = 0.25
"""So often it is looked whether it still is."""

_LAST = (1 << 64) - 1

_LOG = monitor_pb2.GAP_REASON_LOG


class Lingering:
    """The sessions without a stream, and how others take over from them."""

    def __init__(self, arms: Arms, log: EventLog, sessions: dict[Session, None], forget: Callable[[Session], None]) -> None:
        """`sessions`: all there are. `forget`: ends one for good."""
        self._arms = arms
        self._log = log
        self._sessions = sessions
        self._forget = forget
        self._loop = asyncio.get_running_loop()
        self._timers: dict[Session, asyncio.Handle] = {}
        self._coming: dict[int, int] = {}
        """Stream id -> how many streams there are that are about to go on with it."""

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._timers))

    def __len__(self) -> int:
        return len(self._timers)

    def keep(self, session: Session) -> None:
        """The stream has ended: keep its place for `session.linger` seconds."""
        session.detach()
        while len(self._timers) >= DETACHED_MOST:
            self.drop(next(iter(self._timers)))
        self._keep_on(session)

    def _keep_on(self, session: Session) -> None:
        """For its time from now on, at least."""
        self._timers[session] = self._loop.call_later(session.linger, self._run_out, session, self._loop.time())

    def _run_out(self, session: Session, since: float, backlog: Backlog | None = None) -> None:
        """Its time is over. Whoever it waits for may have come long ago, and wait for his own turn: see `Agents._check_lease`.

        `since`, on the loop's clock: when its time began. `backlog`: what was to be dealt with when it ended.
        """
        if session.stream_id in self._coming:
            self._keep_on(session)
            return
        backlog = backlog or Backlog(self._loop)
        if backlog.look_again():
            self._timers[session] = self._loop.call_soon(self._run_out, session, since, backlog)
        elif backlog.waits() and self._loop.time() - since < LINGERS_MOST * session.linger:
            self._timers[session] = self._loop.call_later(_LOOK_S, self._run_out, session, since, backlog)
        else:
            self.drop(session)

    def _of_stream(self, stream_id: int) -> list[Session]:
        return [session for session in self._sessions if session.stream_id == stream_id]

    def drop(self, session: Session) -> None:
        """Nobody came, or somebody else has it now."""
        timer = self._timers.pop(session, None)
        if timer is not None:
            timer.cancel()
            self._forget(session)

    def stop(self) -> None:
        """No more is dropped."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    # -- a stream that comes back

    def expect(self, session: Session, stream_id: int) -> None:
        """A stream has come with a cursor of this stream, which is to be dealt with when its turn comes. What that one had registered does
        not go before its session has said all that it wants, or is gone: see `settle`."""
        if stream_id and not session.goes_on_with:
            session.goes_on_with = stream_id
            self._coming[stream_id] = self._coming.get(stream_id, 0) + 1

    def settle(self, session: Session) -> None:
        """It has said all that it wants, or will not."""
        stream_id, session.goes_on_with = session.goes_on_with, 0
        if not stream_id:
            return
        self._coming[stream_id] -= 1
        if not self._coming[stream_id]:
            del self._coming[stream_id]
        for other in self._of_stream(stream_id):
            if (timer := self._timers.get(other)) is not None:
                timer.cancel()
                self._keep_on(other)

    def begin(self, session: Session, message: monitor_pb2.Cursor, requests: int) -> None:
        """A stream has brought a cursor, and will bring so many register requests before anything is delivered to it.

        Raises RefusedError if nobody can have come as far as it says: who believed it would keep silent until the node comes there.
        """
        positions = {item.node: (item.epoch, item.position) for item in message.positions}
        for name, (epoch, position) in positions.items():
            node = self._arms.nodes.get(name)
            far = position == _LAST
            if node is not None and node.up and node.epoch == epoch:
                far |= position >= node.farthest
            if far:
                self.settle(session)
                raise _beyond(name, position)
        # Of another log, or not to be believed: marks are rather told a second time than not at all.
        number = message.number if message.log_id == self._log.log_id and message.number <= self._log.end else 0
        cursor = Cursor(positions, message.log_id, number, message.stream_id)
        session.cursor = cursor
        session.matcher.taken = dict(positions)
        session.resuming = max(requests, 1)
        self.expect(session, cursor.stream_id)
        for other in [each for each in self._of_stream(cursor.stream_id) if each is not session]:
            session.forerunners.append(other)
            for name, (epoch, first, until) in other.told_of_absence.items():
                session.note_absence(name, epoch, first, until)  # who comes back before all of this is known comes back to this one
            # It is the same monitor, and we may not have noticed yet that its stream broke.
            session.stream_id = session.outbox.stream_id = other.stream_id
            if session.keeper is not None:
                session.keeper.session_changed(session)
            if not other.detached:
                other.fail(RefusedError(Code.ALREADY_EXISTS, "another stream goes on with what this one registered"))
        session.reads_from, session.floors = self._place(cursor)
        session.outbox.gather(session.reads_from, session.floors, cursor.number)

    def returned(self, node: Node) -> None:
        """It is known how far the ring of a node has come that was away: end the streams whose cursors are further."""
        for session in list(self._sessions):
            epoch, position = session.matcher.taken.get(node.name, (0, 0))
            if epoch == node.epoch and position >= node.farthest:
                if session.detached:
                    self.drop(session)
                else:
                    session.fail(_beyond(node.name, position))

    def requested(self, session: Session) -> None:
        """One of these requests was taken, or refused."""
        if session.resuming:
            session.resuming -= 1
            if not session.resuming:
                places = [(span.node, span.epoch, span.first - 1) for span in self._untaken(session)]
                ready = self._log.locate(places)
                if ready is None:
                    self._finish(session)
                else:
                    ready.add_done_callback(lambda _: self._finish(session) if session in self._sessions and session.takes else None)

    def adopt(self, registration: Registration, mask: int) -> bool:
        """Give a registration of a stream that comes back what an earlier one had. False if there is none that had the same."""
        session = registration.session
        assert isinstance(session, Session)
        assert session.cursor is not None
        donor = self._donor(session, registration, mask)
        if donor is None:
            return False
        theirs = donor.session
        assert isinstance(theirs, Session)
        # Of the same key: it may have been over, and registered again, since the client took its last.
        copied = [span for span in self._spans_of(session, theirs, donor) if span.mask & mask]
        its_own = theirs.stream_id == session.stream_id
        anew = set() if its_own else _not_its_own(registration, session.cursor, copied)
        copied = [span for span in copied if span.node not in anew]
        if anew and not copied:
            return False  # it is registered anew, behind a gap
        kept = {span.node for span in copied}
        for arm in donor.arms:
            name = arm.node
            mine = registration.make_arm(name)
            if name in anew:  # behind a gap
                mine.absent = session.cursor.positions.get(name, (0, 0))
                continue
            mine.process, mine.named = arm.process, arm.named
            mine.state = arm.state if arm.state in {ArmState.ARMED, ArmState.OVER} else ArmState.AWAY
            mine.unheard = arm.unheard  # the node came with another ring: it is still to be told
            if its_own:
                mine.absent = arm.absent  # the node was away all the while
            elif name not in kept:
                # Who has kept the place may be an earlier stream of this monitor's, that is still to be told itself.
                mine.absent = self._earlier(name, session.cursor.positions.get(name, (0, 0)), arm.absent)
            if arm.process is not None and name not in registration.found:
                registration.find({name: Process(*arm.process)})
        registration.had_spans = donor.had_spans
        self._say_what_came_before(registration, session.cursor, copied, its_own=its_own)
        if not its_own and mask & ~donor.mask:
            # They have never had these bits, and this monitor may have: what is missing of them is told when they are armed.
            for arm in registration.arms:
                arm.absent = session.cursor.positions.get(arm.node, (0, 0))
        session.matcher.has_forgotten(theirs.matcher.remembers_from)
        for span in copied:
            if span.end is None:
                self._go_on(registration, span, mask)
        for span in copied:
            if span.end is not None:
                self._keep_past(registration, span, mask)
        session.registrations.add(registration)
        session.donors[theirs] = None
        # Somebody else's place is kept for him; and so is what may be somebody else's.
        donor.taken |= its_own
        if theirs.detached and not its_own and not session.cursor.stream_id:
            donor.lent = True
            self._arms.note(donor)
        return True

    def _spans_of(self, session: Session, theirs: Session, donor: Registration) -> list[Span]:
        version, by_key = session.donor_spans.get(theirs, (-1, {}))
        if version != theirs.matcher.version:
            by_key = {}
            for span in theirs.matcher.all_spans():
                by_key.setdefault(span.arm.registration.key, []).append(span)
            session.donor_spans[theirs] = theirs.matcher.version, by_key
        return by_key.get(donor.key, [])

    def _is_later(self, node: str, epoch: int, other: int) -> bool:
        """Whether a node's epoch came after another one; also if nothing is known of that one."""
        epochs = list(self._log.ends(node))
        return other not in epochs or epoch not in epochs or epochs.index(epoch) > epochs.index(other)

    def _is_over(self, name: str, epoch: int, taken: int) -> bool:
        """Whether a node's epoch came before the one that the client is in, and has not come back. One of which the log has, or has had,
        nothing comes before those that it knows: others begin with a mark."""
        node, epochs = self._arms.nodes.get(name), list(self._log.ends(name))
        return taken in epochs and epoch not in epochs[epochs.index(taken) :] and (node is None or node.epoch != epoch)

    def _earlier(self, node: str, one: tuple[int, int], other: tuple[int, int] | None) -> tuple[int, int]:
        """Of two places (epoch, position) the one that came first."""
        if other is None:
            return one
        if one[0] == other[0]:
            return min(one, other)
        return one if self._is_later(node, other[0], one[0]) else other

    def _say_what_came_before(self, registration: Registration, cursor: Cursor, spans: list[Span], *, its_own: bool) -> None:
        """Where these spans begin later than the client has come: they are somebody else's, who came when this monitor had gone; or its
        own, of a node that came back when nobody could be told what had been missed there."""
        session = registration.session
        assert isinstance(session, Session)
        begins: dict[tuple[str, int], dict[int, int]] = {}
        for span in spans:
            if span.root or span.process is None:
                by_bit = begins.setdefault((span.node, span.epoch), {})
                for bit in EventType:
                    if span.mask & registration.mask & bit:
                        by_bit[bit] = min(span.first, by_bit.get(bit, span.first))
        for (node, epoch), firsts in begins.items():
            if self._is_over(node, epoch, cursor.positions.get(node, (0, 0))[0]):
                continue
            first = max(firsts.values(), default=0)
            arm = registration.arm_on(node)
            absent = arm.absent if arm is not None else None
            at = absent or (None if its_own else cursor.positions.get(node))
            if at is None or (absent is None and at[0] != epoch):
                self._say_what_was_unheard(session, arm, cursor, epoch, first)
                continue
            taken = at[1] if at[0] == epoch else -1
            if first > taken:  # where nobody had asked for anything, positions stand still whatever happens: an empty range says that, too
                positions, times = (taken + 1, first), (0, time.time_ns())
                session.before.append((node, epoch, gap(node, _LOG, epoch, positions=positions, times=times, counts={})))
                session.note_absence(node, epoch, *positions)
            if arm is not None:
                arm.absent = None

    def _say_what_was_unheard(self, session: Session, arm: Arm | None, cursor: Cursor, epoch: int, first: int) -> None:
        """Of the ring that a node came with, before the arm was armed there."""
        node = None if arm is None else self._arms.nodes.get(arm.node)
        if arm is None or arm.unheard is None or node is None or node.epoch != epoch:
            return
        start, arm.unheard = arm.unheard, None
        taken_epoch, taken = cursor.positions.get(node.name, (0, 0))
        if taken_epoch == epoch:
            start = max(start, taken + 1)
        told_epoch, _, until = session.told_of_absence.get(node.name, (0, 0, 0))
        if told_epoch == epoch:
            start = max(start, until)  # for another registration
        if first > start:
            session.note_absence(node.name, epoch, start, first)
            told_now = gap(node.name, _LOG, epoch, positions=(start, first), times=(0, time.time_ns()), counts={})
            session.before.append((node.name, epoch, told_now))

    def _go_on(self, registration: Registration, span: Span, mask: int) -> None:
        arm = registration.make_arm(span.node)
        copy = self._copy(arm, span, mask)
        self._arms.router.add(copy)
        if copy.lingers:
            self._arms.router.linger(copy, copy.exit_ns)
        node = self._arms.nodes.get(span.node)
        if copy.process is None or copy.lingers:
            return
        arm.spans += 1
        if node is not None:
            follow = registration.key.terms.follow
            if copy.root:
                node.interest.want_process(arm, *copy.process, mask=registration.mask, follow=follow, ask=None, root=True)
            else:
                node.interest.learn_process(arm, *copy.process, mask=registration.mask, follow=follow)

    def _keep_past(self, registration: Registration, span: Span, mask: int) -> None:
        arm = registration.make_arm(span.node)
        copy = self._copy(arm, span, mask)
        if span.end is None:
            return
        if copy.root and copy.follow and arm.spans:
            # Children of it live: what is above them is known by it.
            copy.end = None
            self._arms.router.add(copy)
            self._arms.router.end(copy, span.end, span.end_offset)
        else:
            copy.owner.matcher.add(copy)
            copy.owner.matcher.ended(copy, span.end_offset)

    def _copy(self, arm: Arm, span: Span, mask: int) -> Span:
        # With its own beginning: what the client has taken is left out by its position, and a fork among that must be known.
        return dataclasses.replace(span, owner=arm.registration.session, arm=arm, mask=span.mask & mask, id=0)

    def _donor(self, session: Session, registration: Registration, mask: int) -> Registration | None:
        """The registration of another session that has most of what is wanted, best the one that this stream had itself."""
        best: tuple[tuple[bool, bool, int], Registration] | None = None
        for other in itertools.chain(session.forerunners, self._sessions):
            if other is session or other not in self._sessions:
                continue
            theirs = other.registration_of(registration.key)
            if theirs is None or not _same_processes(registration, theirs):
                continue
            covered = (theirs.mask & mask).bit_count()
            rank = (other.stream_id == session.stream_id, other.detached and not theirs.taken and not theirs.lent, covered)
            if covered and (best is None or rank > best[0]):
                best = rank, theirs
                if rank == (True, True, mask.bit_count()):
                    break  # none can be better, and there may be very many sessions
        return None if best is None else best[1]

    def _place(self, cursor: Cursor) -> tuple[int, dict[str, int]]:
        """From where on the log is to be read, and for each node from where on there may be something that was not taken."""
        floors: dict[str, int] = {}
        start = self._log.end
        latest = 0
        for name, (epoch, position) in cursor.positions.items():
            ends = self._log.ends(name)
            if not ends:
                continue
            offset = self._log.offset_behind(name, epoch, position)
            if offset is None:  # of a ring that this log has never known: all that it has of the node came later, or is not its own
                floors[name] = cursor.number  # ... but what it had passed before it was told of that
                start = min(start, max(cursor.number, self._log.oldest))
                continue
            offset = max(offset, 0)
            latest = max(latest, offset)
            last = max(end.offset for end in ends.values())
            if position >= ends[epoch].position - 1 and ends[epoch].offset == last < cursor.number:
                offset = self._log.end  # quiet since
            floors[name] = offset
            start = min(start, offset)
        # A node of which the client has nothing: what came before the last that it has of any would have come before that.
        for name in self._nodes_in_log():
            if name not in floors:
                floors[name] = latest
                start = min(start, latest)
        return start, floors

    def _nodes_in_log(self) -> list[str]:
        return [node.name for node in self._arms.nodes if self._log.ends(node.name)]

    def _untaken(self, session: Session) -> Iterator[Span]:
        """Its spans on nodes of which it has taken nothing yet."""
        assert session.cursor is not None
        for name in session.matcher.nodes_known() - session.cursor.positions.keys():
            yield from session.matcher.spans_on(name)

    def _finish(self, session: Session) -> None:
        """All that is brought again was brought: say what cannot be delivered, then deliver."""
        assert session.cursor is not None
        for name in session.matcher.nodes_known() - session.cursor.positions.keys():
            # Nothing was taken of it yet: it was armed where its positions begin, or came when the monitor had gone.
            spans = session.matcher.spans_on(name)
            offsets = [self._log.offset_behind(name, span.epoch, span.first - 1) for span in spans]
            session.floors[name] = min((max(offset, 0) for offset in offsets if offset is not None), default=session.floors.get(name, 0))
            session.reads_from = min(session.reads_from, session.floors[name])
        absences = session.before + self._absences(session, session.cursor) + list(self._forgotten(session, session.cursor))
        session.outbox.gathered(session.reads_from, self._evicted(session, session.cursor), absences)
        session.before = []
        donors, session.donors = session.donors, {}
        session.forerunners = []
        session.donor_spans.clear()
        self.settle(session)
        for theirs in donors:
            everything = (*theirs.registrations.values(), *theirs.past.values())
            if theirs.detached and all(each.taken for each in everything):
                self.drop(theirs)

    def _absences(self, session: Session, cursor: Cursor) -> list[Notice]:
        """What its earlier stream was told of absence, or whoever has kept its place, and it has not taken, as far as one can know."""
        found: list[Notice] = []
        for theirs in dict.fromkeys([*session.forerunners, *session.donors]):
            for node, (epoch, first, until) in theirs.told_of_absence.items():
                taken_epoch, taken = cursor.positions.get(node, (0, -1))
                if self._is_over(node, epoch, taken_epoch):
                    continue
                # From its cursor on: it is told before all else that may have come since, and leads to its end. But a cursor within it may
                # have come there by other registrations' events.
                start = min(first, taken + 1) if taken_epoch == epoch else 0
                # Of an empty one its position does not tell whether it was taken: rather twice than not at all.
                if taken_epoch != epoch or taken + 1 < until + (first == until):
                    found.append((node, epoch, gap(node, _LOG, epoch, positions=(start, until), times=(0, time.time_ns()), counts={})))
                    session.note_absence(node, epoch, first, until)
        return found

    def _evicted(self, session: Session, cursor: Cursor) -> list[Notice]:
        """Gaps for what retention has taken, or the earlier session has forgotten."""
        out: list[Notice] = []
        counted_from = 0
        for theirs in session.donors:
            if not theirs.evicted.whole or not theirs.detached or session.outbox.evicted_while_gathering:
                counted_from = self._log.end
            counted_from = max(counted_from, theirs.detached_from)
        # First those without numbers: they begin where the client is, and others do not.
        for name in session.matcher.nodes_known():
            if session.floors.get(name, 0) < counted_from:
                out += self._dropped(session, name, *cursor.positions.get(name, (0, -1)))
        evicted = Evicted.together([theirs.evicted for theirs in session.donors])
        missed = evicted.behind(cursor.positions, session.floors, self._is_later)
        counted = [(offset, (node, epoch, gap_of(each, node, epoch, _LOG))) for offset, node, epoch, each in missed]
        for mark in evicted.marks:
            message = told(mark, session.matcher, self._log.log_id)
            begun = mark.offset >= session.floors.get(mark.node, 0)
            if message is not None and begun and number_of(mark) > cursor.number:
                counted.append((mark.offset, (mark.node, mark.epoch, message)))
        return out + [notice for _, notice in sorted(counted)]

    def _forgotten(self, session: Session, cursor: Cursor) -> Iterator[Notice]:
        """Gaps where so many processes have ended that the session does not know any more whose the records were."""
        for name in session.matcher.nodes_known():
            if session.floors.get(name, 0) >= session.matcher.remembers_from:
                continue
            known, taken = cursor.positions.get(name, (None, -1))
            for epoch, end in self._log.ends(name).items():
                if epoch == known:
                    first = taken + 1
                elif (known is None or self._is_later(name, epoch, known)) and session.matcher.spans_between(name, epoch, 0, end.position):
                    first = 0
                else:
                    continue
                if first <= end.position:
                    yield name, epoch, gap(name, _LOG, epoch, positions=(first, end.position), times=(0, time.time_ns()), counts={})

    def _dropped(self, session: Session, name: str, epoch: int, position: int) -> Iterator[Notice]:
        """What retention has taken of a node, nobody has counted it, and the client has come to a position of an epoch."""
        behind = epoch not in self._log.ends(name)
        for each, end in self._log.ends(name).items():
            behind = behind or each == epoch
            taken = position if each == epoch else -1
            if not behind or end.dropped is None or taken >= end.dropped.last:
                continue
            # A loss may have been told where the client is.
            spans = session.matcher.spans_between(name, each, taken + 1, max(taken + 1, end.dropped.end - 1))
            if spans:
                # Of a later ring also that it came: the mark that says so may be gone, too.
                positions = max(taken + 1, min(span.first for span in spans)) if each == epoch else 0, end.dropped.end
                yield name, each, gap(name, _LOG, each, positions=positions, times=(0, end.dropped.time_ns), counts={})


def _beyond(name: str, position: int) -> RefusedError:
    return RefusedError(Code.INVALID_ARGUMENT, f"the cursor's position {position} of node {name!r} is beyond all that there was")


def _not_its_own(registration: Registration, cursor: Cursor, spans: list[Span]) -> set[str]:
    """The nodes of these spans, which are of somebody else's registration, where a client must not go on with them."""
    epochs: dict[str, set[int]] = {}
    for span in spans:
        epochs.setdefault(span.node, set()).add(span.epoch)
    # Of what was before they came, in a later ring, nobody knows anything. And what they knew by that name, where the client has taken
    # nothing, may have been another process, which had ended before it came.
    by_name = isinstance(registration.key.target, Process | Pidfile)
    return {name for name, found in epochs.items() if (cursor.positions[name][0] not in found if name in cursor.positions else by_name)}


def _same_processes(mine: Registration, theirs: Registration) -> bool:
    for name, process in mine.found.items():
        arm = theirs.arm_on(name)
        if arm is not None and arm.process is not None and not Process(*arm.process).may_be(process):
            return False
    return True
