# SPDX-License-Identifier: Apache-2.0
"""Processes of this node as monitors are told of them. Apart from what finds them, which is loaded before protobuf."""

from __future__ import annotations

import fnmatch

from kmonitor.agent.processes import Found
from kmonitor.v1 import events_pb2, monitor_pb2


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


def select(processes: list[Found], wanted: monitor_pb2.ProcessFilter) -> list[events_pb2.Process]:
    """What ListProcesses answers: running processes by pid, name and user."""
    pids, uids = set(wanted.pids), set(wanted.uids)
    return [
        to_proto(found)
        for found in processes
        if (not pids or found.pid in pids)
        and (not uids or found.uid in uids)
        and (not wanted.comms or any(fnmatch.fnmatchcase(found.comm, glob) for glob in wanted.comms))
    ]
