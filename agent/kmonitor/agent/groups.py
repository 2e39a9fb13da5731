# SPDX-License-Identifier: Apache-2.0
"""The control groups and units that somebody asks for: in the source's table by the id that the kernel gives them, while it is theirs.

A name outlives its group: a unit that is started again has a new one, with another id. The kernel matches ids alone, so somebody must look.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kmonitor.agent import cgroups
from kmonitor.agent.errors import BpfError, CaptureError
from kmonitor.agent.maps import CGROUP_KEY_SIZE, cgroup_key, cgroup_of, pack_mask
from kmonitor.agent.source import Source
from kmonitor.v1 import agent_pb2, monitor_pb2

RESTART_SECONDS = 2.0
"""So long a name may be without a group and still be one that is started again: systemd removes a unit's group in between."""

Wanted = agent_pb2.Interest.GroupInterest


@dataclass(frozen=True, slots=True)
class _Armed:
    """A name that is asked for, and the group that it had when it was armed."""

    cgroup_id: int
    folder: Path
    mask: int


class GroupTable:
    """What is in `watched_cgroups`, and for whom. All calls are synchronous, and made from one thread."""

    def __init__(self, source: Source) -> None:
        self._name = source.name
        self._table = source.watched_cgroups
        self._armed: dict[tuple[str, str], _Armed] = {}
        self._told: set[tuple[str, str]] = set()
        """Those of which it was said that they changed, and which were not asked for again yet."""
        self._gone_since: dict[tuple[str, str], float] = {}
        """Those that have no group now, and since when, on the monotonic clock in seconds."""

    def mask(self) -> int:
        """OR of all."""
        mask = 0
        for armed in self._armed.values():
            mask |= armed.mask
        return mask

    def reset(self, wanted: Iterable[Wanted]) -> None:
        """Forget all but what is in `wanted`, which is to be applied next: no moment without."""
        self._armed.clear()
        self._told.clear()
        self._gone_since.clear()
        if self._table is None:
            return
        kept = {found[1][0] for group in wanted if group.event_mask and (found := _find(group)[1]) is not None}
        for key in list(self._table.keys(CGROUP_KEY_SIZE)):
            if cgroup_of(key) not in kept:
                self._table.delete(key)

    def apply(self, group: Wanted, answer: agent_pb2.InterestApplied) -> None:
        """Arm a group, or with an empty mask forget it."""
        name = _name(group)
        self._told.discard(name)
        self._gone_since.pop(name, None)
        if not group.event_mask:
            self._forget(name)
            return
        result = answer.groups.add()
        if group.unit:
            result.unit = group.unit
        else:
            result.cgroup = group.cgroup
        if self._table is None:
            result.error = f"source {self._name} does not know in which control group a process is: register single processes"
            return
        error, found = _find(group)
        if error:
            result.error = error
        if found is None:
            self._forget(name)
            result.state = monitor_pb2.REGISTRATION_STATE_NOT_FOUND
            return
        folder, ids = found
        old = self._armed.get(name)
        if old is not None and old.cgroup_id != ids[0]:
            self._forget(name)
        self._armed[name] = _Armed(ids[0], folder, group.event_mask)
        try:
            self._write(ids[0])
        except BpfError as failure:
            del self._armed[name]
            if failure.errno != errno.E2BIG:
                raise
            result.error = "the node's table of watched control groups is full"
            return
        result.state = monitor_pb2.REGISTRATION_STATE_ARMED
        result.cgroup_ids.extend(ids)

    def changed(self) -> agent_pb2.GroupsChanged | None:
        """Names whose group is another one now, or is gone and stays so; each is said once, until it is asked for again."""
        message = agent_pb2.GroupsChanged()
        now = time.monotonic()
        for name, armed in self._armed.items():
            found = _id_of(armed.folder)
            if found == armed.cgroup_id:
                self._gone_since.pop(name, None)
                continue
            if name in self._told or (found == 0 and now - self._gone_since.setdefault(name, now) < RESTART_SECONDS):
                continue
            self._told.add(name)
            kind, text = name
            if kind == "unit":
                message.groups.add(unit=text)
            else:
                message.groups.add(cgroup=text)
        return message if message.groups else None

    def _forget(self, name: tuple[str, str]) -> None:
        old = self._armed.pop(name, None)
        if old is not None:
            self._write(old.cgroup_id)

    def _write(self, cgroup_id: int) -> None:
        """The mask of all who mean this group: it may be asked for by path and by unit."""
        assert self._table is not None
        mask = 0
        for armed in self._armed.values():
            mask |= armed.mask if armed.cgroup_id == cgroup_id else 0
        if mask:
            self._table.update(cgroup_key(cgroup_id), pack_mask(mask))
        else:
            self._table.delete(cgroup_key(cgroup_id))


def _name(group: Wanted) -> tuple[str, str]:
    return ("unit", group.unit) if group.unit else ("cgroup", group.cgroup)


def _find(group: Wanted) -> tuple[str, tuple[Path, list[int]] | None]:
    """(what is wrong, the group's folder, and its id and those of the groups above it)."""
    try:
        path = cgroups.find_unit(group.unit) if group.unit else group.cgroup
        return "", cgroups.find_cgroup(path) if path is not None else None
    except CaptureError as error:
        return str(error), None


def _id_of(folder: Path) -> int:
    try:
        return folder.stat().st_ino
    except OSError:
        return 0
