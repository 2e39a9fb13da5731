# SPDX-License-Identifier: Apache-2.0
"""Processes of this node as monitors are told of them. Apart from what finds them, which is loaded before protobuf."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable
from functools import cache

import grpc.aio

from kmonitor.agent.cgroups import Hierarchy, ids_below
from kmonitor.agent.processes import Found
from kmonitor.agent.procfs import command_line
from kmonitor.agent.slices import in_slices, in_thread
from kmonitor.agent.source import Source
from kmonitor.v1 import agent_pb2, events_pb2, monitor_pb2
from kmonitor.wire.errors import KmonitorError
from kmonitor.wire.selectors import Globs

Answer = Callable[[agent_pb2.AgentMessage], Awaitable[None]]

_CALLS_MOST = 64
"""That wait. More are refused: each holds a filter of up to some MiB."""


def to_proto(found: Found) -> events_pb2.Process:
    """As monitors see it."""
    return events_pb2.Process(
        pid=found.pid,
        ppid=found.ppid,
        uid=found.uid,
        gid=found.gid,
        comm=found.comm,
        start_time=found.start_boottime_ns,
        cgroup_id=found.cgroup_id,
        threads=found.live,
    )


class Listing:
    """Answers the ListProcesses calls of one stream after the other, one at a time. Owned by the event loop's thread."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()

    def start(self, call: agent_pb2.ListProcessesCall, send: Answer) -> None:
        """Answer a call with `send`, as soon as may be."""
        task = asyncio.create_task(self._answer(call, send, refuse=len(self._tasks) >= _CALLS_MOST), name="list processes")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def abandon(self) -> None:
        """The stream has ended: nobody waits for the answers."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, call: agent_pb2.ListProcessesCall, send: Answer, *, refuse: bool) -> None:
        if refuse:
            said = agent_pb2.ProcessList(call_id=call.call_id, error=f"{_CALLS_MOST} other lists are being made: ask again later")
        else:
            async with self._turn:
                said = await answer(self._source, call)
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the stream has ended: who serves it sees why
            await send(agent_pb2.AgentMessage(processes=said))


async def answer(source: Source, asked: agent_pb2.ListProcessesCall) -> agent_pb2.ProcessList:
    """Return what ListProcesses answers. The loop goes on meanwhile, however many processes there are."""
    by_group = asked.filter.WhichOneof("group") is not None
    said = agent_pb2.ProcessList(call_id=asked.call_id, by_group=by_group)
    if by_group and source.watched_cgroups is None:
        said.error = f"source {source.name} does not know in which control group a process is"
        return said
    try:
        found = await in_thread(source.processes.all)
        source.catch_up()
        # Read after the look: who was not seen any more had recorded its end before.
        said.position = source.ring.producer
        if by_group:
            # After the look, too: no group may be missing that a process was seen in.
            said.cgroup_ids.extend(await in_thread(lambda: _group_ids(asked.filter)))
        groups = set(said.cgroup_ids) if by_group else None
        kept = await in_thread(lambda: select(found, asked.filter, groups))
        lines = await in_thread(lambda: [command_line(each.pid, each.start_boottime_ns) for each in kept]) if asked.with_args else []
        said.boottime_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    except (KmonitorError, OSError) as error:
        said.error = str(error)
        return said
    async for process, line in in_slices(itertools.zip_longest(kept, lines)):
        message = to_proto(process)
        if line is not None:
            message.args.extend(line[0])
            message.args_truncated = line[1]
        said.processes.append(message)
    return said


def _group_ids(wanted: monitor_pb2.ProcessFilter) -> list[int]:
    hierarchy = Hierarchy()
    path = hierarchy.find_unit(wanted.unit) if wanted.unit else wanted.cgroup
    group = None if path is None else hierarchy.find_cgroup(path)
    return [] if group is None else ids_below(group[0])


def select(processes: list[Found], wanted: monitor_pb2.ProcessFilter, groups: set[int] | None = None) -> list[Found]:
    """Return the processes that a filter takes, by pid, name and user; and that are in one of `groups`, if those are given."""
    pids, uids, globs = set(wanted.pids), set(wanted.uids), Globs(wanted.comms)

    @cache
    def is_named(comm: str) -> bool:
        return not wanted.comms or globs.match(comm)

    return [
        found
        for found in processes
        if (groups is None or found.cgroup_id in groups)
        and (not pids or found.pid in pids)
        and (not uids or found.uid in uids)
        and is_named(found.comm)
    ]
