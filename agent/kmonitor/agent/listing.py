# SPDX-License-Identifier: Apache-2.0
"""Processes of this node as monitors are told of them. Apart from what finds them, which is loaded before protobuf."""

from __future__ import annotations

from kmonitor.agent import cgroups
from kmonitor.agent.errors import CaptureError
from kmonitor.agent.processes import Found
from kmonitor.agent.source import Source
from kmonitor.v1 import agent_pb2, events_pb2, monitor_pb2
from kmonitor.wire.selectors import Globs


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


def answer(source: Source, asked: agent_pb2.ListProcessesCall) -> agent_pb2.ProcessList:
    """What ListProcesses answers."""
    found = source.processes.all()
    source.catch_up()
    # Read after the look: who was not seen any more had recorded its end before.
    said = agent_pb2.ProcessList(call_id=asked.call_id, position=source.ring.producer)
    if asked.filter.WhichOneof("group") is not None:
        said.by_group = True
        if source.watched_cgroups is None:
            said.error = f"source {source.name} does not know in which control group a process is"
            return said
        try:
            # After the look, too: no group may be missing that a process was seen in.
            said.cgroup_ids.extend(_group_ids(asked.filter))
        except CaptureError as error:
            said.error = str(error)
            return said
        within = set(said.cgroup_ids)
        found = [process for process in found if process.cgroup_id in within]
    said.processes.extend(select(found, asked.filter))
    return said


def _group_ids(wanted: monitor_pb2.ProcessFilter) -> list[int]:
    path = cgroups.find_unit(wanted.unit) if wanted.unit else wanted.cgroup
    group = None if path is None else cgroups.find_cgroup(path)
    return [] if group is None else cgroups.ids_below(group[0])


def select(processes: list[Found], wanted: monitor_pb2.ProcessFilter) -> list[events_pb2.Process]:
    """Processes by pid, name and user."""
    pids, uids, comms = set(wanted.pids), set(wanted.uids), Globs(wanted.comms)
    return [
        to_proto(found)
        for found in processes
        if (not pids or found.pid in pids) and (not uids or found.uid in uids) and (not wanted.comms or comms.match(found.comm))
    ]
