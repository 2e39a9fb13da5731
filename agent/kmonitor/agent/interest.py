# SPDX-License-Identifier: Apache-2.0
"""Puts what the broker asks for into the source's tables, and says what became of each process.

The promise: a process that is told as RUNNING is armed, and its end will be in the ring; one that is told as EXITED or
NOT_FOUND will have no event for who asked. Never both, and never neither.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import time

from kmonitor.agent import libbpf
from kmonitor.agent.errors import BpfError
from kmonitor.agent.groups import GroupTable
from kmonitor.agent.listing import to_proto
from kmonitor.agent.maps import (
    ANY_CGROUP,
    ANY_WATCHED,
    KEY_SIZE,
    NO_ROOT,
    WATCHED_FOLLOW,
    WATCHED_ROOT,
    WATCHED_SIZE,
    Watched,
    pid_key,
    pid_of,
)
from kmonitor.agent.processes import HIDDEN_ADVICE, Found, Look
from kmonitor.agent.procfs import is_other_grain
from kmonitor.agent.slices import in_slices, in_thread
from kmonitor.agent.source import Source
from kmonitor.v1 import agent_pb2, monitor_pb2
from kmonitor.wire.errors import KmonitorError

log = logging.getLogger("kmonitor-agent")

_RUNNING = monitor_pb2.REGISTRATION_STATE_RUNNING
_EXITED = monitor_pb2.REGISTRATION_STATE_EXITED
_NOT_FOUND = monitor_pb2.REGISTRATION_STATE_NOT_FOUND
_Wanted = agent_pb2.Interest.ProcessInterest


class InterestTable:
    """The map `watched`, and the masks in `control`; `groups` has the rest. Owned by the event loop's thread.

    Nothing here holds the loop for long, however much is asked for: look-ups are made in threads, and entries written in slices. One
    change is made at a time.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._processes = source.processes
        self.groups = GroupTable(source)
        self._masks_seen = 0
        """OR of every process mask since the last reset: bits in any_mask that may be of use."""
        self._number = 0
        """Of the last change."""

    async def apply(self, interest: agent_pb2.Interest) -> agent_pb2.InterestApplied:
        """Make the kernel let through what `interest` says. The answer has a result for each that was to be looked up.

        What cannot be done is an error in the answer: of the one target, or of all.
        """
        answer = agent_pb2.InterestApplied(version=interest.version, position=self._source.ring.producer, number=self._next_number())
        try:
            await self._apply(interest, answer)
        except (KmonitorError, OSError) as error:
            log.warning("what the broker asks for cannot be applied: %s", error)
            answer.error = str(error)
        answer.end_position, answer.boottime_ns = self._source.ring.producer, time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        return answer

    async def _apply(self, interest: agent_pb2.Interest, answer: agent_pb2.InterestApplied) -> None:
        # All that takes long and can be done before: little may happen between the position that is told and the masks.
        findings = await self.groups.look_up(interest.groups)
        await self._source.prepare(interest.node_mask)
        wants, masks = False, 0
        async for process in in_slices(interest.processes):
            wants |= bool(process.event_mask)
            masks |= process.event_mask
        self._source.catch_up()
        answer.position = self._source.ring.producer
        if interest.reset:
            self.groups.reset(findings)
        async for group in in_slices(interest.groups):
            self.groups.apply(group, findings, answer)
        self._source.control["all_mask"] = interest.node_mask
        # Before the entries: one that is there already when its process ends must be seen.
        self._masks_seen |= masks
        self._set_any_mask(armed=wants or self._any_watched())
        if interest.reset:
            self._masks_seen = masks | await self._forget_others(interest)
            self._set_any_mask(armed=wants or self._any_watched())
        async for process in in_slices(interest.processes):
            if not process.event_mask:
                self._remove(process)
        await self._arm(interest, answer)
        if not wants:
            self._set_any_mask(armed=self._any_watched())

    def _next_number(self) -> int:
        """Of this change: entries have it, and outlive this agent. So it is larger than all that earlier agents gave, too."""
        tenths = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 100_000_000
        self._number = max(self._number + 1, tenths) & 0xFFFFFFFF
        return self._number

    def _any_watched(self) -> bool:
        return next(self._source.watched.keys(KEY_SIZE), None) is not None

    def _set_any_mask(self, *, armed: bool) -> None:
        if not armed:
            self._masks_seen = 0
        mask = self._source.control["all_mask"]
        if armed:
            mask |= ANY_WATCHED | self._masks_seen
        if group_mask := self.groups.mask():
            mask |= group_mask | ANY_CGROUP
        self._source.control["any_mask"] = mask

    def _entry(self, pid: int) -> Watched | None:
        value = self._source.watched.lookup(pid_key(pid), WATCHED_SIZE)
        return None if value is None else Watched.unpack(value)

    async def _forget_others(self, interest: agent_pb2.Interest) -> int:
        """Drop the processes that an earlier broker, or an earlier stream, had asked for and this one does not. Return the OR of the masks
        of those that stay all the same.

        Entries that follow stay if anything is followed: children that were made since the broker last heard of this node
        are armed, and it cannot know them yet. An entry too many costs records that nobody gets, one too few an exit.
        """
        kept: set[int] = set()
        following = False
        async for process in in_slices(interest.processes):
            if process.event_mask:
                kept.add(process.pid)
            following |= process.follow
        masks = 0
        keys = await in_thread(lambda: list(self._source.watched.keys(KEY_SIZE)))
        async for key in in_slices(keys):
            if pid_of(key) in kept:
                continue
            entry = self._entry(pid_of(key))
            if entry is None:
                continue
            if following and entry.flags & WATCHED_FOLLOW:
                masks |= entry.mask
                continue
            self._source.watched.delete(key)
        return masks

    def _remove(self, process: _Wanted) -> None:
        entry = self._entry(process.pid)
        if entry is not None and process.start_time in (0, entry.start_boottime_ns):
            self._source.watched.delete(pid_key(process.pid))

    async def _look_up(self, pids: list[int]) -> Look:
        """In a thread: to look at all processes of a node takes tens of milliseconds."""
        return await in_thread(lambda: self._processes.look_up(pids)) if pids else Look()

    async def _arm(self, interest: agent_pb2.Interest, answer: agent_pb2.InterestApplied) -> None:
        again = interest.reset
        before = await self._look_up([process.pid async for process in in_slices(interest.processes) if _is_asked(process)])
        armed: list[tuple[_Wanted, Found, bool]] = []
        async for process in in_slices(interest.processes):
            if not process.event_mask:
                continue
            if not process.look_up:
                try:
                    self._change(process)
                except BpfError as error:  # nobody waits for an answer: the entry goes on with the mask that it has
                    log.warning("what is watched of process %d cannot be changed: %s", process.pid, error)
                continue
            found = before.get(process.pid)
            pinned = bool(process.start_time)
            if process.pid in before.hidden:
                _refuse(answer, process, f"process {process.pid} is there, but /proc hides it from the agent: {HIDDEN_ADVICE}")
            elif found is None:
                _answer(answer, process, _EXITED if pinned else _NOT_FOUND)
            elif again and not found.live and pinned and self.will_tell(process.pid, process.start_time):
                # It has given up its last thread, and the probe has yet to be called: the end will be in the ring.
                _answer(answer, process, _RUNNING, found)
            elif found.live and pinned and is_other_grain(found.start_boottime_ns, process.start_time):
                # It lives. But its events would be those of another start time, which is another process to all who know it.
                text = f"source {self._source.name} tells start times in another grain than the source before it: register the process anew"
                _refuse(answer, process, text)
            elif not found.live or (pinned and found.start_boottime_ns != process.start_time):
                _answer(answer, process, _EXITED, found if found.start_boottime_ns == process.start_time or not pinned else None)
            else:
                try:
                    armed.append((process, found, self._set(process, found)))
                except BpfError as error:
                    full = error.errno == errno.E2BIG
                    text = "the node's table of watched processes is full: give the agent a larger --watched-max"
                    _refuse(answer, process, text if full else f"the process cannot be armed: {error}")
        after = await self._look_up([found.pid for _, found, _ in armed])
        async for process, found, was_there in in_slices(armed):
            now = after.get(process.pid)
            lives = now is not None and now.live and now.start_boottime_ns == found.start_boottime_ns
            lives = lives or process.pid in after.hidden
            lives = lives or (again and was_there and self.will_tell(process.pid, process.start_time))
            _answer(answer, process, _RUNNING if lives or not self._missed(found, was_there) else _EXITED, found)

    def _set(self, process: _Wanted, found: Found) -> bool:
        """Arm; True if it was armed before."""
        mask, flags, root, armed = process.event_mask, WATCHED_FOLLOW if process.follow else 0, NO_ROOT, self._number
        old = self._entry(found.pid)
        was_there = old is not None and old.start_boottime_ns == found.start_boottime_ns
        if old is not None and was_there:
            root = old.root  # what is above it stays above it, whoever asks for it too
            if not process.start_time or old.root.pid:
                # The broker cannot know yet that this is a process that it has armed by name and start time before, or one
                # that a followed process forked and the ring had no room to tell.
                mask, flags = mask | old.mask, flags | old.flags & WATCHED_FOLLOW
            if not process.root:
                flags, armed = flags | old.flags & WATCHED_ROOT, old.armed
        if process.root:
            flags |= WATCHED_ROOT
        entry = Watched(found.start_boottime_ns, mask, flags, root, armed)
        # BPF_EXIST: if the probe took the entry away just now, the process has ended, and a new one would stay for ever.
        self._source.watched.update(pid_key(found.pid), entry.pack(), libbpf.BPF_EXIST if was_there else libbpf.BPF_ANY)
        return was_there

    def will_tell(self, pid: int, start_boottime_ns: int) -> bool:
        """Of a zombie: whether the probe has an entry for the process that it has not used up."""
        entry = self._entry(pid)
        return entry is not None and entry.start_boottime_ns == start_boottime_ns

    def _missed(self, found: Found, was_there: bool) -> bool:
        """The process ended while it was being armed: whether the probe did not see it with the new entry.

        An entry that was there before stays: the probe has told, or is about to tell, those who asked earlier, and whether it
        used the old mask or the new one cannot be known. So who asks now is told EXITED, and gets no event.
        """
        if was_there:
            return True
        entry = self._entry(found.pid)
        if entry is None:
            return False  # the probe used it up: the end is in the ring
        return self._source.watched.delete(pid_key(found.pid))

    def _change(self, process: _Wanted) -> None:
        """Another mask for an entry that is there. None is made: without one the process has ended, and was told."""
        entry = self._entry(process.pid)
        if entry is None or process.start_time not in (0, entry.start_boottime_ns):
            return
        flags = (WATCHED_FOLLOW if process.follow else 0) | entry.flags & WATCHED_ROOT
        new = dataclasses.replace(entry, mask=process.event_mask, flags=flags)
        self._source.watched.update(pid_key(process.pid), new.pack(), libbpf.BPF_EXIST)


def _is_asked(process: _Wanted) -> bool:
    """Whether it is to be armed, and an answer is wanted."""
    return bool(process.event_mask) and process.look_up


def _answer(
    answer: agent_pb2.InterestApplied,
    process: _Wanted,
    state: monitor_pb2.RegistrationState.ValueType,
    found: Found | None = None,
) -> None:
    result = answer.processes.add(pid=process.pid, start_time=process.start_time, state=state)
    if found is not None:
        result.process.CopyFrom(to_proto(found))


def _refuse(answer: agent_pb2.InterestApplied, process: _Wanted, error: str) -> None:
    answer.processes.add(pid=process.pid, start_time=process.start_time, error=error)
