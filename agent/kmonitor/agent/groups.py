# SPDX-License-Identifier: Apache-2.0
"""The control groups and units that somebody asks for: in the source's table by the id that the kernel gives them, while it is theirs.

A name outlives its group: a unit that is started again has a new one, with another id. The kernel matches ids alone, so somebody must look.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kmonitor.agent.cgroups import Hierarchy, id_of
from kmonitor.agent.errors import BpfError, CaptureError
from kmonitor.agent.maps import CGROUP_KEY_SIZE, cgroup_key, cgroup_of, pack_mask
from kmonitor.agent.slices import in_thread
from kmonitor.agent.source import Source
from kmonitor.v1 import agent_pb2, monitor_pb2

LEVELS_MOST = 32
"""Of a group that is watched, the root's included: CGROUP_LEVEL_MAX of the probe, which looks no deeper."""
RESTART_SECONDS = 2.0
"""So long a name may be without a group and still be one that is started again: systemd removes a unit's group in between."""

Wanted = agent_pb2.Interest.GroupInterest
Name = tuple[str, str]
"""Of a group: "unit" or "cgroup", and which."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a look at the hierarchy has shown of a name."""

    error: str = ""
    folder: Path | None = None
    """None: there is no such group."""
    ids: tuple[int, ...] = ()
    """Its id, then those of the groups above it."""


Findings = Mapping[Name, Finding]


@dataclass(frozen=True, slots=True)
class _Armed:
    """A name that is asked for, and the group that it had when it was armed."""

    cgroup_id: int
    folder: Path
    mask: int


def look_up(groups: Iterable[Wanted]) -> Findings:
    """Return what each name means now, from one look at the hierarchy. It reads file systems: call it in a thread."""
    try:
        hierarchy = Hierarchy()
    except (CaptureError, OSError) as error:
        return {_name(group): Finding(str(error)) for group in groups}
    return {name: _find(hierarchy, name) for name in {_name(group) for group in groups}}


class GroupTable:
    """What is in `watched_cgroups`, and for whom. Owned by the event loop's thread."""

    def __init__(self, source: Source) -> None:
        self._name = source.name
        self._table = source.watched_cgroups
        self._armed: dict[Name, _Armed] = {}
        self._masks: dict[int, dict[Name, int]] = {}
        """By group: a group may be asked for by path and by unit."""
        self._told: set[Name] = set()
        """Those of which it was said that they changed, and which were not asked for again yet."""
        self._gone_since: dict[Name, float] = {}
        """Those that have no group now, and since when, on the monotonic clock in seconds."""

    def mask(self) -> int:
        """Return the OR of all."""
        mask = 0
        for armed in self._armed.values():
            mask |= armed.mask
        return mask

    async def look_up(self, groups: Iterable[Wanted]) -> Findings:
        """Return what those names mean now that are to be armed. The loop goes on meanwhile."""
        wanted = [group for group in groups if group.event_mask]
        if self._table is None or not wanted:
            return {}
        return await in_thread(lambda: look_up(wanted))

    def reset(self, findings: Findings) -> None:
        """Forget all but what was found, which is to be applied next: no moment without."""
        self._armed.clear()
        self._masks.clear()
        self._told.clear()
        self._gone_since.clear()
        if self._table is None:
            return
        kept = {finding.ids[0] for finding in findings.values() if finding.ids}
        for key in list(self._table.keys(CGROUP_KEY_SIZE)):
            if cgroup_of(key) not in kept:
                self._table.delete(key)

    def apply(self, group: Wanted, findings: Findings, answer: agent_pb2.InterestApplied) -> None:
        """Arm a group, which was looked up, or with an empty mask forget it."""
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
        found = findings[name]
        if found.error:
            result.error = found.error
        elif len(found.ids) > LEVELS_MOST:
            self._forget(name)
            result.error = f"the control group is {len(found.ids) - 1} levels below the root, and at most {LEVELS_MOST - 1} can be watched"
            return
        if found.folder is None:
            self._forget(name)
            result.state = monitor_pb2.REGISTRATION_STATE_NOT_FOUND
            return
        old = self._armed.get(name)
        if old is not None and old.cgroup_id != found.ids[0]:
            self._forget(name)
        try:
            self._arm(name, _Armed(found.ids[0], found.folder, group.event_mask))
        except BpfError as failure:
            self._forget(name)
            full = failure.errno == errno.E2BIG
            result.error = "the node's table of watched control groups is full" if full else f"cannot be armed: {failure}"
            return
        result.state = monitor_pb2.REGISTRATION_STATE_ARMED
        result.cgroup_ids.extend(found.ids)

    async def changed(self) -> agent_pb2.GroupsChanged | None:
        """Return the names whose group is another one now, or is gone and stays so; each once, until it is asked for again.

        Raises CaptureError if that cannot be found out now.
        """
        looked_at = dict(self._armed)
        ids = await in_thread(lambda: {name: id_of(armed.folder) for name, armed in looked_at.items()})
        message = agent_pb2.GroupsChanged()
        now = time.monotonic()
        for name, armed in looked_at.items():
            if self._armed.get(name) != armed:
                continue  # asked for anew meanwhile
            found = ids[name]
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

    def _arm(self, name: Name, armed: _Armed) -> None:
        self._armed[name] = armed
        self._masks.setdefault(armed.cgroup_id, {})[name] = armed.mask
        self._write(armed.cgroup_id)

    def _forget(self, name: Name) -> None:
        old = self._armed.pop(name, None)
        if old is None:
            return
        masks = self._masks[old.cgroup_id]
        del masks[name]
        if not masks:
            del self._masks[old.cgroup_id]
        self._write(old.cgroup_id)

    def _write(self, cgroup_id: int) -> None:
        """The mask of all who mean this group."""
        assert self._table is not None
        mask = 0
        for each in self._masks.get(cgroup_id, {}).values():
            mask |= each
        if mask:
            self._table.update(cgroup_key(cgroup_id), pack_mask(mask))
        else:
            self._table.delete(cgroup_key(cgroup_id))


def _name(group: Wanted) -> Name:
    return ("unit", group.unit) if group.unit else ("cgroup", group.cgroup)


def _find(hierarchy: Hierarchy, name: Name) -> Finding:
    kind, text = name
    try:
        path = hierarchy.find_unit(text) if kind == "unit" else text
        found = hierarchy.find_cgroup(path) if path is not None else None
    except CaptureError as error:
        return Finding(str(error))
    return Finding() if found is None else Finding("", found[0], tuple(found[1]))
