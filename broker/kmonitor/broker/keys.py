# SPDX-License-Identifier: Apache-2.0
"""What a registration asks for, checked and in canonical form."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sized
from dataclasses import dataclass

from kmonitor.broker.block import ProcessKey
from kmonitor.broker.filters import NO_FILTER, Filter
from kmonitor.broker.interest import Group
from kmonitor.v1 import monitor_pb2
from kmonitor.wire.errors import BadSelectorError
from kmonitor.wire.masks import check_mask
from kmonitor.wire.selectors import (
    Globs,
    check_boot_id,
    check_cgroup_path,
    check_comm,
    check_globs,
    check_node_selector,
    check_pid,
    check_pidfile,
    check_unit_name,
    has_labels,
    is_glob,
)

NODES_NAMED = 16_384
"""Nodes that one message says something of: a cursor, or what was found earlier."""
_NODE_NAME_MOST = 253
LIST_LIMIT = 1024
"""Names, labels, globs or uids in one registration."""


@dataclass(frozen=True, slots=True)
class Process:
    """One process by pid; start time 0 is whichever has the pid."""

    pid: int
    start: int
    boot_id: str = ""
    """The boot that the start time is of; empty if that is not said."""

    @property
    def key(self) -> ProcessKey:
        """(pid, start time), as a node's interest and records have it."""
        return self.pid, self.start

    def may_be(self, other: Process) -> bool:
        """Whether this is the other process, as far as both say which they mean."""
        return (
            self.pid == other.pid
            and (self.start == other.start or 0 in {self.start, other.start})
            and (self.boot_id == other.boot_id or "" in {self.boot_id, other.boot_id})
        )


@dataclass(frozen=True, slots=True)
class Pidfile:
    """The process that a file of the node names when the node is asked."""

    path: str


Target = Process | Group | Pidfile | None
"""None is every process of the node."""


class Terms:
    """What is asked for beside the target: most registrations differ in that only. Made by `terms`, so that equal ones are the same."""

    __slots__ = ("__weakref__", "_globs", "exact", "exact_names", "filter", "follow", "labels", "names")

    def __init__(self, names: tuple[str, ...], labels: tuple[tuple[str, str], ...], follow: bool, wanted: Filter) -> None:
        self.names = names
        self.labels = labels
        self.follow = follow
        self.filter = wanted
        self.exact_names = tuple(name for name in names if not is_glob(name))
        """Those of the names that are no globs."""
        self._globs = Globs(names)
        self.exact = bool(names) and len(self.exact_names) == len(names)
        """Whether it names all the nodes it can ever select."""

    def selects(self, node: str, labels: dict[str, str]) -> bool:
        """Whether it is about this node."""
        return (not self.names or self._globs.match(node)) and has_labels(labels, self.labels)


_terms: weakref.WeakValueDictionary[tuple[object, ...], Terms] = weakref.WeakValueDictionary()


def terms(names: Iterable[str], labels: Iterable[tuple[str, str]], wanted: Filter, *, follow: bool) -> Terms:
    """The terms with these names and labels, in any order."""
    key = (tuple(sorted(set(names))), tuple(sorted(labels)), follow, wanted or NO_FILTER)
    found = _terms.get(key)
    if found is None:
        found = _terms[key] = Terms(*key)
    return found


@dataclass(frozen=True, slots=True)
class Key:
    """What makes two registrations the same: registering again adds bits to the mask."""

    terms: Terms
    target: Target


def parse_key(message: monitor_pb2.Registration) -> Key:
    """Check a registration. Raises BadMaskError or BadSelectorError."""
    check_mask(message.event_mask)
    names, labels, comms, uids = message.nodes.names, message.nodes.labels, message.filter.comms, message.filter.uids
    for what, items in (("node names", names), ("labels", labels), ("comm globs", comms), ("uids", uids)):
        check_list_length(what, items)
    check_node_selector(names, labels)
    check_globs(comms, "comm")
    for glob in comms:
        check_comm(glob)
    target = _target(message.target)
    # All that a group's or a node's processes fork is in the group, or on the node, already.
    follow = message.follow and isinstance(target, Process | Pidfile)
    wanted = NO_FILTER
    if message.HasField("filter"):
        wanted = Filter(tuple(sorted(set(comms))), tuple(sorted(set(uids))), message.filter.failures_only)
    return Key(terms(names, labels.items(), wanted, follow=follow), target)


def _target(message: monitor_pb2.Target) -> Target:
    kind = message.WhichOneof("kind")
    if kind == "process":
        return _process(message.process)
    if kind == "cgroup":
        return Group("cgroup", check_cgroup_path(message.cgroup))
    if kind == "unit":
        return Group("unit", check_unit_name(message.unit))
    if kind == "pidfile":
        return Pidfile(check_pidfile(message.pidfile))
    return None


def _process(message: monitor_pb2.ProcessTarget | monitor_pb2.RegisterRequest.FoundProcess) -> Process:
    pid, boot_id = check_pid(message.pid), message.boot_id
    if boot_id and not message.start_time:
        raise BadSelectorError("a boot id belongs to a start time: give both")
    return Process(pid, message.start_time, check_boot_id(boot_id) if boot_id else "")


def check_list_length(what: str, items: Sized) -> None:
    """Raise BadSelectorError if a request names more than it can."""
    if len(items) > LIST_LIMIT:
        raise BadSelectorError(f"{len(items)} {what} in one request: at most {LIST_LIMIT}")


def check_nodes_named(names: Iterable[str]) -> None:
    """Raise BadSelectorError if there are more of these than a broker knows nodes, or one is longer than a node's name can be."""
    names = list(names)
    if len(names) > NODES_NAMED or max(map(len, names), default=0) > _NODE_NAME_MOST:
        raise BadSelectorError(f"{len(names)} nodes are named: at most {NODES_NAMED}, each by at most {_NODE_NAME_MOST} characters")


def parse_found(messages: Iterable[monitor_pb2.RegisterRequest.FoundProcess], target: Target) -> dict[str, Process]:
    """Node -> process that the target is there, as the client knows. Raises BadSelectorError."""
    messages = list(messages)
    check_nodes_named(item.node for item in messages)
    found = {item.node: process for item in messages if (process := _process(item)).start}
    if isinstance(target, Process):
        for node, process in found.items():
            if not process.may_be(target):
                raise BadSelectorError(f"the process found on {node!r} is not the one of the registration: leave it out")
    return found if isinstance(target, Process | Pidfile) else {}
