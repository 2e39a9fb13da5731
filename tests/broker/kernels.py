# SPDX-License-Identifier: Apache-2.0
"""A node as plain as can be, for the broker to be held against: processes, the kernel's filter, a ring, and an agent that obeys."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from kmonitor.broker.agents import Agents
from kmonitor.broker.errors import RefusedError
from kmonitor.broker.nodes import Link
from kmonitor.v1 import agent_pb2, events_pb2, monitor_pb2
from kmonitor.wire.record import F_INFERRED, F_MATCH_CGROUP, F_MATCH_NODE, F_MATCH_PROCESS, RECORD_SIZE, RECORD_VERSION, SLOT_SIZE
from tests.broker.records import EXEC, EXIT, FORK, THREAD_EXIT, build, rec

ProcessKey = tuple[int, int]
GROUPS = {"/a": 50, "/a/b": 51, "/c": 60}
SECRET = b"it lies with the ring"
START = 1024
"""Of each epoch's positions. Not 0: a cursor cannot say that nothing was taken of a node from 0 on."""
LATE = 20
"""By the world's clock: a thread's end is recorded no later than this after the end of its process."""
RUNNING = monitor_pb2.REGISTRATION_STATE_RUNNING
EXITED = monitor_pb2.REGISTRATION_STATE_EXITED
NOT_FOUND = monitor_pb2.REGISTRATION_STATE_NOT_FOUND
ARMED = monitor_pb2.REGISTRATION_STATE_ARMED


def above(group: str) -> list[int]:
    """Ids of a control group, then of those above it."""
    return [GROUPS[name] for name in sorted(GROUPS, reverse=True) if group == name or group.startswith(f"{name}/")]


@dataclass(eq=False)
class Process:
    """As the kernel has it."""

    pid: int
    start: int
    group: str
    born: int
    """By the world's clock."""
    parent: Process | None = None
    lives: bool = True

    @property
    def key(self) -> ProcessKey:
        return self.pid, self.start


@dataclass(eq=False)
class Deed:
    """Something that a process did, whether anyone wanted to know or not."""

    at: int
    """By the world's clock."""
    node: str
    epoch: int
    position: int
    """Of its record; or of the next one, if it has none."""
    kind: int
    process: Process
    child: Process | None
    flags: int
    """Who asked for it; 0 is nobody."""
    lost: bool
    """Asked for, but there was no room."""
    known: bool = False
    """The broker has it, or knows that it is lost."""
    safe: bool = False
    """... also after a crash."""
    forgotten: bool = False
    """A broker that has had it in memory is gone."""
    data: bytes = b""

    def __repr__(self) -> str:
        what = "lost" if self.lost else "recorded" if self.flags else "not recorded"
        kind = events_pb2.EventType.Name(self.kind)[11:]  # type: ignore[arg-type]
        return f"<{self.node} {self.epoch}:{self.position} {kind} {self.process.key} at {self.at}, {what}, known={self.known}>"


@dataclass
class Entry:
    """Of the table of watched processes."""

    start: int
    mask: int
    follow: bool
    root: ProcessKey | None = None
    is_root: bool = False
    armed: int = 0
    root_armed: int = 0


@dataclass(eq=False)
class Kernel:
    """One node: what it did stays in `deeds` for ever; what it has told may be forgotten once it is acknowledged."""

    name: str
    clock: Iterator[int]
    epoch: int = 1
    boot: int = 1
    late: list[tuple[int, Process, int]] = field(default_factory=list)
    """Threads whose end is still to be recorded: when their process ended, it, and the mask that its entry had."""
    inbox: list[agent_pb2.BrokerMessage] = field(default_factory=list)
    """What the agent has not read yet."""
    position: int = START
    acked: int = START
    sent: int = START
    """How far this stream has come."""
    processes: dict[int, Process] = field(default_factory=dict)
    watched: dict[int, Entry] = field(default_factory=dict)
    groups: dict[int, int] = field(default_factory=dict)
    node_mask: int = 0
    deeds: list[Deed] = field(default_factory=list)
    ring: list[Deed] = field(default_factory=list)
    losses: list[Deed] = field(default_factory=list)
    """Not told in this stream."""
    told: list[tuple[int, list[Deed]]] = field(default_factory=list)
    """Losses that were told, and count once the stream has come to a position."""
    answers: list[tuple[int, int, int]] = field(default_factory=list)
    """(epoch, position, clock) of each change to the filter."""
    invented: int = 0
    """Ends that the broker may have made up at reboots."""
    number: int = 0
    link: Link | None = None
    agents: Agents | None = None
    starts: Iterator[int] = field(default_factory=lambda: itertools.count(1000))

    @property
    def boot_id(self) -> str:
        return f"boot-{self.boot}"

    # -- what processes do

    def spawn(self, pid: int, group: str) -> Process:
        """One that nobody has forked."""
        process = self.processes[pid] = Process(pid, next(self.starts), group, next(self.clock))
        return process

    def fork(self, parent: Process, *, lost: bool = False) -> Process | None:
        """Into the first pid that is free; None if there are too many already."""
        pid = next((pid for pid in range(1, 9) if pid not in self.processes), None)
        if pid is None:
            return None
        child = self.processes[pid] = Process(pid, next(self.starts), parent.group, next(self.clock), parent)
        entry = self._entry_of(parent)
        if entry is not None and entry.follow:
            root, armed = (parent.key, entry.armed) if entry.is_root or entry.root is None else (entry.root, entry.root_armed)
            self.watched[pid] = Entry(child.start, entry.mask, True, root, root_armed=armed)
        self.act(parent, FORK, child=child, lost=lost)
        return child

    def exit(self, process: Process, *, lost: bool = False, late: bool = False) -> None:
        """The kernel drops its entry, whether there is room to say so or not. `late`: a thread's end is recorded after that."""
        deed = self.act(process, EXIT, lost=lost)
        entry = self._entry_of(process)
        if late:
            self.late.append((deed.at, process, 0 if entry is None else entry.mask))
        if entry is not None:
            del self.watched[process.pid]
        process.lives = False
        del self.processes[process.pid]

    def end_threads(self) -> None:
        """Record the ends of threads whose process has ended before them."""
        late, self.late = self.late, []
        for _, process, mask in late:
            self.act(process, THREAD_EXIT, mask=mask)

    def act(self, process: Process, kind: int, *, child: Process | None = None, lost: bool = False, mask: int = 0) -> Deed:
        """Record it, if it was asked for and there is room. `mask`: of an entry that is there for threads only."""
        entry = self._entry_of(process)
        ids = [each for each in above(process.group) if each in self.groups]
        flags = F_MATCH_PROCESS if (mask if entry is None else entry.mask) & kind else 0
        flags |= F_MATCH_NODE if self.node_mask & kind else 0
        flags |= F_MATCH_CGROUP if any(self.groups[each] & kind for each in ids) else 0
        deed = Deed(next(self.clock), self.name, self.epoch, self.position, kind, process, child, flags, lost and flags != 0)
        self.deeds.append(deed)
        if deed.lost:
            self.losses.append(deed)
        elif flags:
            root = (0, 0) if entry is None or entry.root is None else entry.root
            self._record(
                deed,
                match_cgroup_id=ids[0] if ids else 0,
                child_tgid=child.pid if child else 0,
                child_start_boottime_ns=child.start if child else 0,
                root_tgid=root[0],
                root_start_boottime_ns=root[1],
                root_armed=0 if entry is None else entry.root_armed,
            )
        return deed

    def _record(self, deed: Deed, **fields: int) -> None:
        record = rec(deed.kind, deed.process.pid, flags=deed.flags)
        record.fields |= {"start_boottime_ns": deed.process.start, "boottime_ns": deed.at, **fields}
        if deed.kind == EXEC:
            record.filename, record.args = b"/bin/x", (b"y" * (60 * (deed.at % 5)),)
        deed.data = build([record])
        self.position += len(deed.data)
        self.ring.append(deed)

    def _entry_of(self, process: Process) -> Entry | None:
        entry = self.watched.get(process.pid)
        return entry if entry is not None and entry.start == process.start else None

    def _infer(self, pid: int, start: int) -> None:
        process = self.processes.get(pid)
        if process is None or process.start != start:
            gone = Process(pid, start, "", 0, lives=False)
            deed = Deed(next(self.clock), self.name, self.epoch, self.position, EXIT, gone, None, F_MATCH_PROCESS | F_INFERRED, False)
            self.deeds.append(deed)
            self._record(deed)

    # -- the agent

    def connect(self, agents: Agents) -> None:
        """A stream. What is in the ring is sent again."""
        lost = self._lost([deed for deed in self.deeds if deed.lost and deed.epoch == self.epoch], self.acked, self.position)
        hello = agent_pb2.Hello(
            node=self.name, boot_id=self.boot_id, epoch=self.epoch, position=self.acked, record_version=RECORD_VERSION,
            record_size=RECORD_SIZE, slot_size=SLOT_SIZE, infers_exits=True, lost=lost, secret=SECRET, end_position=self.position,
        )  # fmt: skip
        self.link, self.agents = agents.connect(hello), agents
        self.told = [(self.position, [deed for deed in self.deeds if deed.lost and deed.epoch == self.epoch and not deed.known])]
        self.losses = []
        first = self.link.take()
        assert first[0].WhichOneof("kind") == "welcome"
        self.sent = max(self.acked, first[0].welcome.position)
        self._settle()
        self.inbox = first[1:]  # read when it is read: what is in the ring may go out before

    def disconnect(self) -> None:
        """The stream breaks."""
        if self.link is not None and self.agents is not None:
            self.agents.disconnect(self.link, "it broke")
        self.link = None
        self.told = []
        self.inbox = []

    def start_anew(self, *, reboot: bool) -> None:
        """Ring and tables are gone; after a reboot the processes too."""
        self.disconnect()
        self.epoch += 1
        self.position = self.acked = self.sent = START
        self.ring, self.losses, self.watched, self.groups, self.node_mask = [], [], {}, {}, 0
        self.late = []
        if reboot:
            self.boot += 1
            self.invented += len(self.processes) + 8
            for process in self.processes.values():
                process.lives = False
            self.processes = {}

    def read(self) -> bool:
        """Do what the broker says. Whether there was anything."""
        if self.link is None:
            return False
        messages, self.inbox = [*self.inbox, *self.link.take()], []
        for message in messages:
            self._obey(message)
        return bool(messages)

    def send(self, count: int) -> bool:
        """So many records at most, in one block; then the losses from before that were not told. Whether there was anything."""
        if self.link is None:
            return False
        records = [deed for deed in self.ring if deed.position >= self.sent][:count]
        if records:
            data = b"".join(deed.data for deed in records)
            block = agent_pb2.Block(position=self.sent, data=data, boottime_to_unix_ns=1_000_000)
            if not self._say(agent_pb2.AgentMessage(block=block)):
                return True
            self.sent += len(data)
            for deed in records:
                deed.known = True
        losses = [deed for deed in self.losses if deed.position <= self.sent]
        if losses:
            so_far = [deed for deed in self.deeds if deed.lost and deed.epoch == self.epoch and deed.position <= self.sent]
            if self._say(agent_pb2.AgentMessage(lost=self._lost(so_far, losses[0].position, losses[-1].position))):
                self.losses = [deed for deed in self.losses if deed.position > self.sent]
                self.told.append((losses[-1].position, losses))
        self._settle()
        return bool(records or losses)

    def beat(self) -> None:
        """Say how far it is complete."""
        if self.link is not None:
            position = min([self.sent, *(deed.position for deed in self.losses)])
            beat = agent_pb2.Heartbeat(position=position, time_unix_nano=2_000_000, boottime_ns=self._complete_until())
            self._say(agent_pb2.AgentMessage(heartbeat=beat))

    def _complete_until(self) -> int:
        if self.told:
            return 0  # of what the hello said is lost, not all records around it were sent
        unsent = [deed.at for deed in self.ring if deed.position >= self.sent] + [deed.at for deed in self.losses]
        return min([next(self.clock), *unsent, *(ended + LATE - 1 for ended, _, _ in self.late)])

    def _say(self, message: agent_pb2.AgentMessage) -> bool:
        assert self.link is not None
        assert self.agents is not None
        try:
            self.agents.receive(self.link, message)
        except RefusedError:
            self.disconnect()
            return False
        return True

    def _settle(self) -> None:
        for at, deeds in self.told:
            if at <= self.sent:
                for deed in deeds:
                    deed.known = True
        self.told = [(at, deeds) for at, deeds in self.told if at > self.sent]

    @staticmethod
    def _lost(deeds: list[Deed], begin: int, end: int) -> agent_pb2.Lost:
        lost = agent_pb2.Lost(from_position=begin, to_position=end)
        totals: dict[tuple[int, bool], int] = {}
        for deed in deeds:
            key = deed.kind, bool(deed.flags & F_MATCH_PROCESS)
            totals[key] = totals.get(key, 0) + 1
        for (kind, watched), total in sorted(totals.items()):
            lost.counts.add(type=kind, watched=watched, total=total)
        return lost

    def _obey(self, message: agent_pb2.BrokerMessage) -> None:
        kind = message.WhichOneof("kind")
        if kind == "ack":
            self.acked = max(self.acked, message.ack.position)
            self.ring = [deed for deed in self.ring if deed.position >= self.acked]
        elif kind == "infer_exits":
            for each in message.infer_exits.processes:
                self._infer(each.pid, each.start_time)
        elif kind == "interest" and self.link is not None:
            answer = self._apply(message.interest)
            self._say(agent_pb2.AgentMessage(applied=answer))

    # -- the filter, as agent/kmonitor/agent/interest.py sets it

    def _apply(self, interest: agent_pb2.Interest) -> agent_pb2.InterestApplied:
        self.number += 1
        answer = agent_pb2.InterestApplied(
            version=interest.version, position=self.position, number=self.number, end_position=self.position, boottime_ns=next(self.clock)
        )
        if interest.reset:
            kept = {each.pid for each in interest.processes if each.event_mask}
            following = any(each.follow for each in interest.processes)
            self.watched = {pid: entry for pid, entry in self.watched.items() if pid in kept or (following and entry.follow)}
            self.groups = {}
        for group in interest.groups:
            self.groups.pop(GROUPS[group.cgroup], None)
            if group.event_mask:
                self.groups[GROUPS[group.cgroup]] = group.event_mask
                answer.groups.add(cgroup=group.cgroup, state=ARMED, cgroup_ids=above(group.cgroup))
        self.node_mask = interest.node_mask
        for each in interest.processes:
            entry = self.watched.get(each.pid)
            if not each.event_mask:
                if entry is not None and each.start_time in {0, entry.start}:
                    del self.watched[each.pid]
            elif each.look_up:
                self._arm(each, answer)
            elif entry is not None and each.start_time in {0, entry.start}:
                entry.mask, entry.follow = each.event_mask, each.follow
        self.answers.append((self.epoch, self.position, next(self.clock)))
        return answer

    def _arm(self, wanted: agent_pb2.Interest.ProcessInterest, answer: agent_pb2.InterestApplied) -> None:
        process = self.processes.get(wanted.pid)
        if process is None or (wanted.start_time and process.start != wanted.start_time):
            state = EXITED if wanted.start_time else NOT_FOUND
            answer.processes.add(pid=wanted.pid, start_time=wanted.start_time, state=state)
            return
        entry, old = Entry(process.start, wanted.event_mask, wanted.follow), self._entry_of(process)
        entry.is_root, entry.armed = wanted.root, self.number
        if old is not None:
            entry.root, entry.root_armed = old.root, old.root_armed
            if not wanted.start_time or old.root is not None:
                entry.mask, entry.follow = entry.mask | old.mask, entry.follow or old.follow
            if not wanted.root:
                entry.is_root, entry.armed = old.is_root, old.armed
        self.watched[wanted.pid] = entry
        found = events_pb2.Process(pid=process.pid, start_time=process.start)
        answer.processes.add(pid=wanted.pid, start_time=wanted.start_time, state=RUNNING, process=found)
