# SPDX-License-Identifier: Apache-2.0
"""A monitor that writes down all that it is told, and a judge who knows what the nodes did and finds what is missing or too much."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from kmonitor.broker.errors import Code
from kmonitor.v1 import events_pb2, monitor_pb2
from kmonitor.wire.record import F_INFERRED
from tests.broker.kernels import ARMED, EXITED, GROUPS, NOT_FOUND, RUNNING, Deed, Kernel, Process, ProcessKey
from tests.broker.records import EXIT, FORK, THREAD_EXIT

RING = monitor_pb2.GAP_REASON_RING
AGENT = monitor_pb2.GAP_REASON_AGENT
Item = monitor_pb2.Notification | tuple[str, int, events_pb2.Event]


@dataclass(eq=False)
class Told:
    """From where on a wish holds on a node, as the broker has said."""

    epoch: int
    position: int
    key: ProcessKey | None
    boot_id: str


@dataclass(eq=False)
class Wish:
    """A registration."""

    message: monitor_pb2.Registration
    asked_at: int = 0
    """By the world's clock."""
    ended_at: int | None = None
    told: dict[str, list[Told]] = field(default_factory=dict)
    over: set[str] = field(default_factory=set)
    """Nodes of which it was said that the process has ended, or that there is none."""

    @property
    def mask(self) -> int:
        return self.message.event_mask

    @property
    def pid(self) -> int:
        return self.message.target.process.pid

    def is_about(self, process: Process) -> bool:
        """Whether it may mean this process."""
        if self.pid:
            at: Process | None = process
            while at is not None:
                if at.pid == self.pid:
                    return True
                if not self.message.follow or at.born < self.asked_at:
                    return False
                at = at.parent
            return False
        group = self.message.target.cgroup
        return not group or process.group == group or process.group.startswith(f"{group}/")

    def allows(self, deed: Deed) -> bool:
        """Whether this may be told for it."""
        in_time = self.asked_at <= deed.at and (self.ended_at is None or deed.at <= self.ended_at)
        return in_time and bool(self.mask & deed.kind) and self.is_about(deed.process)


@dataclass(eq=False)
class Monitor:
    """Its streams come and go; it stays. It keeps its cursor as docs and protocol tell a client to."""

    number: int
    wishes: list[Wish]
    names_stream: bool
    deeds: dict[tuple[str, int, int], Deed]
    """(node, epoch, position) -> what was recorded there."""
    positions: dict[str, tuple[int, int]] = field(default_factory=dict)
    log: tuple[int, int] = (0, 0)
    stream_id: int = 0
    wire: deque[Item] = field(default_factory=deque)
    """Sent and not taken."""
    taken: dict[Deed, None] = field(default_factory=dict)
    ends: dict[tuple[str, ProcessKey], Deed | None] = field(default_factory=dict)
    gaps: list[monitor_pb2.Gap] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What it took, for people."""

    # -- what it takes

    def cursor(self) -> monitor_pb2.Cursor:
        cursor = monitor_pb2.Cursor(log_id=self.log[0], number=self.log[1], stream_id=self.stream_id if self.names_stream else 0)
        for node, (epoch, position) in self.positions.items():
            cursor.positions.add(node=node, epoch=epoch, position=position)
        return cursor

    def sent(self, raw: bytes) -> None:
        """On its way. Events may be taken one by one."""
        message = monitor_pb2.Notification.FromString(raw)
        if message.WhichOneof("kind") == "events":
            self.wire.extend((message.events.node, message.events.epoch, event) for event in message.events.events)
        else:
            self.wire.append(message)

    def take(self) -> None:
        """The next of what was sent."""
        item = self.wire.popleft()
        if isinstance(item, tuple):
            self._event(*item)
            return
        kind = item.WhichOneof("kind")
        self.notes.append(str(item).replace("\n", " "))
        if kind == "gap":
            self._gap(item.gap)
        elif kind == "registered":
            self._registered(item.registered)
        elif kind == "progress":
            for at in item.progress.nodes:
                self._before(at.node, at.epoch, at.position)
            self.log = item.progress.log_id, item.progress.number
            self.stream_id = item.progress.stream_id or self.stream_id

    def _event(self, node: str, epoch: int, event: events_pb2.Event) -> None:
        self.notes.append(f"{node} {epoch}:{event.position} {event.type} {event.pid}")
        at = self.positions.get(node, (0, -1))
        assert epoch >= at[0], self.says("an epoch that was over")
        # A gap without numbers says that something may be missing there: of one registration, while another one has it all.
        known_to_miss = any(
            (gap.node, gap.epoch) == (node, epoch) and gap.from_position <= event.position < gap.to_position and not gap.lost
            for gap in self.gaps
        )
        assert epoch > at[0] or event.position > at[1] or known_to_miss, self.says("an event that the cursor is behind")
        self.positions[node] = epoch, max(event.position, at[1] if epoch == at[0] else 0)
        key = event.pid, event.start_time
        deed = self.deeds.get((node, epoch, event.position))
        if event.type == EXIT:
            before = self.ends.get((node, key))
            # Told by a broker that crashed, and gone with its ring: nobody but the monitor knows of it any more.
            forgotten = event.inferred and before is not None and not before.known and before.epoch != epoch
            assert (node, key) not in self.ends or forgotten, self.says(f"a second end of {key}")
            self.ends[node, key] = deed
        if event.inferred:
            assert any(wish.pid and wish.mask & EXIT and (wish.message.follow or wish.pid == event.pid) for wish in self.wishes)
            if deed is None or (deed.kind, deed.process.key) != (EXIT, key):
                # The broker has made it, at a reboot: at a position behind all that it had, where the ring may have had something else
                # that nobody will ever read.
                return
        assert deed is not None, self.says("an event of nothing")
        assert (deed.kind, deed.process.key) == (event.type, key)
        assert deed not in self.taken
        assert event.inferred or any(wish.allows(deed) or self._may_be_early(wish, deed) for wish in self.wishes), self.says(
            f"{deed}, for which nobody has asked"
        )
        self.taken[deed] = None

    @staticmethod
    def _may_be_early(wish: Wish, deed: Deed) -> bool:
        """Of a node of which it had taken nothing when it came back, with its place gone: what somebody else had registered is told from
        where that began. Not of a process by number: that might be another one. But of the tree that it was told of, as they knew it."""
        if wish.pid and wish.message.follow:
            keys = {told.key for told in wish.told.get(deed.node, ())}
            at: Process | None = deed.process
            while at is not None and at.key not in keys:
                at = at.parent
            is_about = at is not None
        else:
            is_about = not wish.pid and wish.is_about(deed.process)
        return is_about and wish.ended_at is None and bool(wish.mask & deed.kind)

    def _gap(self, gap: monitor_pb2.Gap) -> None:
        at = self.positions.get(gap.node, (0, -1))
        assert gap.epoch >= at[0], self.says("a gap in an epoch that was over")
        if gap.number:
            assert all((gap.log_id, gap.number) != (each.log_id, each.number) for each in self.gaps), self.says("a gap twice")
            self.log = gap.log_id, gap.number
        self.gaps.append(gap)
        self._before(gap.node, gap.epoch, gap.to_position)

    def _registered(self, message: monitor_pb2.Registered) -> None:
        self.stream_id = message.stream_id or self.stream_id
        if message.HasField("error"):
            assert message.error.code == Code.ABORTED, self.says("refused")  # deregistered before it was answered
            return
        wish = self.wishes[message.registration_id]
        if message.state in {RUNNING, ARMED}:
            key = (message.process.pid, message.process.start_time) if message.state == RUNNING else None
            wish.told.setdefault(message.node, []).append(Told(message.epoch, message.position, key, message.boot_id))
            wish.over.discard(message.node)
        elif message.state in {EXITED, NOT_FOUND}:
            wish.over.add(message.node)
        if self.positions.get(message.node, (0, 0))[0] != message.epoch:
            self._before(message.node, message.epoch, message.position)

    def _before(self, node: str, epoch: int, position: int) -> None:
        at = self.positions.get(node)
        assert not position or at is None or epoch >= at[0], self.says("something of an epoch that was over")
        if position and epoch and (at is None or at[0] != epoch or at[1] < position - 1):
            self.positions[node] = epoch, position - 1

    def forget_unplaced(self) -> None:
        """It comes back. Of a node of which it has taken nothing, and that was armed at position 0, a cursor cannot say so: what came
        of that node meanwhile may be missing."""
        for each in self.wishes:
            for node in each.told.keys() - self.positions.keys():
                del each.told[node]

    def says(self, what: str) -> str:
        """With what came before it."""
        return "\n".join([f"monitor {self.number} was told: {what}", *self.notes[-25:]])

    # -- what it should have taken

    def judge(self, kernel: Kernel) -> None:
        """All is quiet, and it has taken everything: what it was not told of must lie in a gap."""
        gaps = [gap for gap in self.gaps if gap.node == kernel.name]
        lost: Counter[tuple[int, int]] = Counter()
        counted: Counter[tuple[int, int]] = Counter()
        for deed in self.owed(kernel):
            if deed in self.taken or any(_covers(gap, deed) and not gap.lost for gap in gaps):
                continue
            if deed.lost:
                lost[deed.epoch, deed.kind] += 1
            elif any(_covers(gap, deed) for gap in gaps):
                counted[deed.epoch, deed.kind] += 1
            else:
                raise AssertionError(self.says(f"... but not of {deed}; {self.positions}"))
        self._judge_counts(kernel, gaps, lost, counted)
        self._judge_ends(kernel, gaps)

    def _judge_counts(
        self, kernel: Kernel, gaps: list[monitor_pb2.Gap], lost: Counter[tuple[int, int]], counted: Counter[tuple[int, int]]
    ) -> None:
        of_ring: Counter[tuple[int, int]] = Counter()
        of_log: Counter[tuple[int, int]] = Counter()
        for gap in gaps:
            for each in gap.lost:
                (of_ring if gap.reason == RING else of_log)[gap.epoch, each.type] += each.count
        for place, count in lost.items():
            assert count <= of_ring[place], self.says(f"{count} lost {place} and {of_ring[place]} told")
        for place, count in of_ring.items():
            most = sum(deed.lost and (deed.epoch, deed.kind) == place for deed in kernel.deeds)
            assert count <= most, self.says(f"{most} lost {place} and {count} told")
        for place, count in counted.items():
            assert count <= of_log[place], self.says(f"{count} dropped {place} and {of_log[place]} told")
        for place, count in of_log.items():
            most = sum(
                (deed.epoch, deed.kind) == place and deed not in self.taken and any(_covers(gap, deed) for gap in gaps)
                for deed in kernel.deeds
                if deed.data
            )
            assert count <= most + kernel.invented, self.says(f"{most} dropped {place} and {count} told")

    def _judge_ends(self, kernel: Kernel, gaps: list[monitor_pb2.Gap]) -> None:
        """Nobody waits for the end of a process that is gone."""
        for wish in self.wishes:
            if wish.ended_at is not None or not wish.mask & EXIT or kernel.name in wish.over:
                continue
            for told in wish.told.get(kernel.name, ()):
                alive = told.key is not None and any(each.key == told.key for each in kernel.processes.values())
                if told.key is None or alive or (kernel.name, told.key) in self.ends:
                    continue
                ends = [deed for deed in kernel.deeds if deed.kind == EXIT and deed.process.key == told.key]
                hidden = any(_covers(gap, deed) for gap in gaps for deed in ends) or (kernel.invented and gaps)
                assert hidden, self.says(f"... but not of the end of {told.key}")

    def owed(self, kernel: Kernel) -> dict[Deed, None]:
        """What the node did that the monitor has a right to."""
        found: dict[Deed, None] = {}
        for wish in self.wishes:
            if wish.ended_at is None and kernel.name in wish.told:
                self._owe(kernel, wish, found)
        return found

    def _owe(self, kernel: Kernel, wish: Wish, found: dict[Deed, None]) -> None:
        told = wish.told[kernel.name]
        first = told[0].epoch, told[0].position
        blanks = [gap for gap in self.gaps if gap.node == kernel.name and gap.reason not in {RING, AGENT} and not gap.lost]
        roots: set[ProcessKey] = {each.key for each in told if each.key is not None}
        children: set[ProcessKey] = set()
        for deed in kernel.deeds:
            place = deed.epoch, deed.position
            if place < first or deed.at < self._armed_at(kernel, told, deed.epoch):
                continue
            if wish.pid:
                if any((gap.epoch, gap.to_position) <= place for gap in blanks if (gap.epoch, gap.to_position) > first):
                    # Nobody has kept its place: from there on it is a new registration, and children of before are not its own.
                    children -= {each for each in children if self._born(kernel, each) < (*self._blank(blanks, place), True)}
                is_root = deed.process.key in roots and any(
                    (each.epoch, each.position) <= place and self._answered_at(kernel, each) <= deed.at
                    for each in told
                    if each.key == deed.process.key
                )
                if not is_root and deed.process.key not in children:
                    continue
                if deed.kind == THREAD_EXIT and self._ended_in_a_gap(kernel, deed):
                    continue
                if deed.flags & F_INFERRED and kernel.name in wish.over:
                    continue  # who asked anew, as its stream came back, has it from the answer
                known = deed.safe or (deed.epoch == kernel.epoch and not deed.lost)
                if deed.kind == FORK and wish.message.follow and deed.child is not None and not deed.lost and known:
                    children.add(deed.child.key)
            elif deed.flags & F_INFERRED or not wish.is_about(deed.process):
                continue  # inferred ends are for those who have registered the process
            if deed.kind & wish.mask:
                found[deed] = None

    @staticmethod
    def _answered_at(kernel: Kernel, told: Told) -> int:
        """When the node's filter was last changed there."""
        return max((at for epoch, position, at in kernel.answers if (epoch, position) == (told.epoch, told.position)), default=0)

    @classmethod
    def _armed_at(cls, kernel: Kernel, told: list[Told], epoch: int) -> int:
        """When the node's filter was last changed at the first position that it was told; in later epochs when it was first set."""
        if epoch == told[0].epoch:
            return cls._answered_at(kernel, told[0])
        return min((at for answer, _, at in kernel.answers if answer == epoch), default=1 << 62)

    def _ended_in_a_gap(self, kernel: Kernel, thread_exit: Deed) -> bool:
        """When its process had ended, where nobody kept its place, the registration was over: nothing more of it is told."""
        return any(
            deed.kind == EXIT and deed.process is thread_exit.process and deed not in self.taken and _covers(gap, deed)
            for deed in kernel.deeds
            for gap in self.gaps
            if gap.node == kernel.name and not gap.lost
        )

    @staticmethod
    def _born(kernel: Kernel, key: ProcessKey) -> tuple[int, int, bool]:
        """Where, and whether that was recorded: else it was before what has this position."""
        forks = (deed for deed in kernel.deeds if deed.child is not None and deed.child.key == key)
        return next((deed.epoch, deed.position, bool(deed.data)) for deed in forks)

    @staticmethod
    def _blank(blanks: list[monitor_pb2.Gap], place: tuple[int, int]) -> tuple[int, int]:
        return max((gap.epoch, gap.to_position) for gap in blanks if (gap.epoch, gap.to_position) <= place)


def _covers(gap: monitor_pb2.Gap, deed: Deed) -> bool:
    if gap.reason == RING:
        return False
    if gap.epoch == deed.epoch:
        # What has no record of its own has the position of the next one.
        # How much was lost, a broker took along whose log was in memory: it is told that something is missing.
        # And where nobody kept a place, the gap begins where a cursor is: that was lost before the record there, and told behind it.
        begun = gap.from_position - deed.lost <= deed.position or (deed.lost and deed.forgotten)
        return begun and deed.position < gap.to_position + (not deed.data)
    if gap.epoch < deed.epoch or gap.from_position or gap.lost:
        return False
    # The ring of before is gone, and what had not come from it; or nobody has kept the monitor's place since.
    return gap.reason != AGENT or not deed.known


def wish(mask: int, *, pid: int = 0, group: str = "", follow: bool = False, node: str = "") -> monitor_pb2.Registration:
    """A registration."""
    assert group in {"", *GROUPS}
    made = monitor_pb2.Registration(event_mask=mask, follow=follow)
    if pid:
        made.target.process.pid = pid
    if group:
        made.target.cgroup = group
    if node:
        made.nodes.names.append(node)
    return made
