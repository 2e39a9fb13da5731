# SPDX-License-Identifier: Apache-2.0
"""What a caller asks for, as keyword arguments, made into a kmonitor.v1.Registration. Checked here as in the broker."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypedDict

from kmonitor.v1 import monitor_pb2
from kmonitor.wire import masks, selectors
from kmonitor.wire.errors import BadSelectorError


class Selection(TypedDict, total=False):
    """The arguments of `register` and `deregister`. All may be left out.

    node, nodes: names or globs; none is every node, also those that join later. labels: a node must have them all.
    pid, pidfile (the process that this file of the node names now), cgroup, or unit: at most one; none is every process.
    start_time (in boot-time nanoseconds) and boot_id (the boot that it is of) with pid: that process, and no other that has the pid.
    events: "exit,abort", 0x50, or an EventType; left out it is every process event (for `deregister`, all bits).
    follow: also what the target forks. comms: globs; uids; failures_only: of exits and aborts only those that failed.
    """

    node: str
    nodes: Iterable[str]
    labels: Mapping[str, str]
    pid: int
    start_time: int
    boot_id: str
    pidfile: str
    cgroup: str
    unit: str
    events: str | int
    follow: bool
    comms: Iterable[str]
    uids: Iterable[int]
    failures_only: bool


def registration(selection: Selection, default_events: int = masks.DEFAULT_EVENTS) -> monitor_pb2.Registration:
    """Raises BadMaskError or BadSelectorError."""
    events = selection.get("events", default_events)
    wanted = monitor_pb2.Registration(
        event_mask=masks.parse_mask(events) if isinstance(events, str) else masks.check_mask(int(events)),
        follow=selection.get("follow", False),
    )
    names = [selection["node"]] if "node" in selection else []
    names += selection.get("nodes", ())
    labels = dict(selection.get("labels", {}))
    selectors.check_node_selector(names, labels)
    wanted.nodes.names.extend(names)
    wanted.nodes.labels.update(labels)
    _target(selection, wanted.target)
    comms = [selectors.check_comm(glob) for glob in selection.get("comms", ())]
    uids = [selectors.check_uid(uid) for uid in selection.get("uids", ())]
    if comms or uids or selection.get("failures_only"):
        wanted.filter.CopyFrom(monitor_pb2.EventFilter(comms=comms, uids=uids, failures_only=selection.get("failures_only", False)))
    return wanted


def _target(selection: Selection, target: monitor_pb2.Target) -> None:
    named = [key for key in ("pid", "pidfile", "cgroup", "unit") if key in selection]
    if len(named) > 1:
        raise BadSelectorError(f"{' and '.join(named)} exclude each other: make a registration for each")
    if "start_time" in selection and "pid" not in selection:
        raise BadSelectorError("a start time belongs to a pid: give both")
    if "boot_id" in selection and "pid" not in selection:
        raise BadSelectorError("a boot id belongs to a pid and its start time: give all three")
    if "pid" in selection:
        target.process.pid = selectors.check_pid(selection["pid"])
        start_time = selection.get("start_time", 0)
        if not 0 <= start_time < 1 << 64:
            raise BadSelectorError(f"start time {start_time}: give nanoseconds of the node's boot-time clock")
        target.process.start_time = start_time
        if boot_id := selection.get("boot_id", ""):
            if not start_time:
                raise BadSelectorError("a boot id belongs to a start time: give both")
            target.process.boot_id = selectors.check_boot_id(boot_id)
    elif "pidfile" in selection:
        target.pidfile = selectors.check_pidfile(selection["pidfile"])
    elif "cgroup" in selection:
        target.cgroup = selectors.check_cgroup_path(selection["cgroup"])
    elif "unit" in selection:
        target.unit = selectors.check_unit_name(selection["unit"])
    else:
        target.everything.SetInParent()


def key(wanted: monitor_pb2.Registration) -> bytes:
    """Equal for registrations that the broker takes for the same one: the same nodes, target, filter and `follow`. It is a
    Registration, serialised."""
    same = monitor_pb2.Registration(target=wanted.target)
    same.nodes.names.extend(sorted(set(wanted.nodes.names)))
    same.nodes.labels.update(wanted.nodes.labels)
    same.filter.comms.extend(sorted(set(wanted.filter.comms)))
    same.filter.uids.extend(sorted(set(wanted.filter.uids)))
    same.filter.failures_only = wanted.filter.failures_only
    # All that a group's or a node's processes fork is in the group, or on the node, already.
    same.follow = wanted.follow and of_one_process(wanted)
    return same.SerializeToString(deterministic=True)


def of_one_process(wanted: monitor_pb2.Registration) -> bool:
    """Whether its target is one process of each node, by pid or pidfile."""
    return wanted.target.WhichOneof("kind") in ("process", "pidfile")


def names_one_node(wanted: monitor_pb2.Registration) -> bool:
    """Whether it can only ever match one node."""
    names = wanted.nodes.names
    return len(names) == 1 and not selectors.is_glob(names[0])


def ends_with_process(wanted: monitor_pb2.Registration) -> bool:
    """Whether nothing is left of it when the process that it is of has ended."""
    return of_one_process(wanted) and names_one_node(wanted) and not wanted.follow
