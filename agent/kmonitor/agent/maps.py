# SPDX-License-Identifier: Apache-2.0
"""The values of the probe's maps, as bpf/kmonitor.h lays them out; a test compares both through the object's BTF."""

from __future__ import annotations

import dataclasses
import mmap
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from kmonitor.agent.misses import MADE_BY, SKIPPED, Misses
from kmonitor.wire.masks import TYPE_NAMES

ANY_WATCHED = 0x100
ANY_CGROUP = 0x200
ANY_LEARN = 0x400
WATCHED_FOLLOW = 0x1
WATCHED_ROOT = 0x4
LOST_NODE = 0
LOST_PROCESS = 1
LOST_FOLLOW = 7
NEVER_WOKEN = (1 << 64) - 1
"""More bytes than a ring holds."""

CONTROL_DTYPE: np.dtype[Any] = np.dtype(
    {
        "names": [
            "any_mask",
            "all_mask",
            "sleeping",
            "pidns_level",
            "epoch",
            "object_crc",
            "pidns_inum",
            "lost",
            "wake_above",
            "calm",
            "reserved",
            "made_good",
            "skipped",
            "missed",
        ],
        "formats": [
            "<u4",
            "<u4",
            "<u4",
            "<u4",
            "<u8",
            "<u4",
            "<u4",
            ("<u8", (2, 8)),
            "<u8",
            "<u4",
            "<u4",
            ("<u8", (3,)),
            ("<i8", (3,)),
            ("<u8", (3,)),
        ],
        "offsets": [0, 4, 8, 12, 16, 24, 28, 32, 160, 168, 172, 176, 200, 224],
        "itemsize": 248,
    }
)
PROCESS_DTYPE: np.dtype[Any] = np.dtype(
    {
        "names": ["start_boottime_ns", "cgroup_id", "tgid", "ppid", "uid", "gid", "live", "status", "comm"],
        "formats": ["<u8", "<u8", "<u4", "<u4", "<u4", "<u4", "<u4", "<u4", "S16"],
        "offsets": [0, 8, 16, 20, 24, 28, 32, 36, 40],
        "itemsize": 56,
    }
)
_WATCHED = struct.Struct("<QIIQIIII")
_CONFIG = struct.Struct("<IIIII")
_GONE = struct.Struct("<QQIIII16s")
_KEY = struct.Struct("<I")
_CGROUP_KEY = struct.Struct("<Q")
WATCHED_SIZE = _WATCHED.size
KEY_SIZE = _KEY.size
CGROUP_KEY_SIZE = _CGROUP_KEY.size


@dataclass(frozen=True, slots=True)
class Root:
    """Where an entry has its follow from: the nearest process above it that was registered itself. Zero: nothing above it is followed."""

    start_boottime_ns: int
    pid: int
    armed: int


NO_ROOT = Root(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Watched:
    """An entry of the map `watched`."""

    start_boottime_ns: int
    mask: int
    flags: int
    root: Root = NO_ROOT
    """Where it was copied from at a fork."""
    armed: int = 0
    """The number of the change that last armed it for a registration of its own."""

    def pack(self) -> bytes:
        """As in the map."""
        return _WATCHED.pack(self.start_boottime_ns, self.mask, self.flags, *dataclasses.astuple(self.root), self.armed, 0)

    @classmethod
    def unpack(cls, value: bytes) -> Watched:
        """From the map."""
        start_boottime_ns, mask, flags, root_start, root_pid, root_armed, armed, _ = _WATCHED.unpack(value)
        return cls(start_boottime_ns, mask, flags, Root(root_start, root_pid, root_armed), armed)


def pack_config(*, pidns_inum: int, has_group_dead: bool, victim_is_task: bool, fill_mark: int, copies: int) -> bytes:
    """struct kmonitor_config."""
    return _CONFIG.pack(pidns_inum, has_group_dead, victim_is_task, fill_mark, copies)


def pack_gone(start_boottime_ns: int, cgroup_id: int, pid: int, ppid: int, uid: int, gid: int, comm: bytes) -> bytes:
    """struct kmonitor_gone."""
    return _GONE.pack(start_boottime_ns, cgroup_id, pid, ppid, uid, gid, comm)


def pid_key(pid: int) -> bytes:
    """A key of the map `watched`."""
    return _KEY.pack(pid)


def pid_of(key: bytes) -> int:
    """The pid of a key of `watched`."""
    return int(_KEY.unpack(key)[0])


def cgroup_key(cgroup_id: int) -> bytes:
    """A key of the map `watched_cgroups`."""
    return _CGROUP_KEY.pack(cgroup_id)


def cgroup_of(key: bytes) -> int:
    """The id of a key of `watched_cgroups`."""
    return int(_CGROUP_KEY.unpack(key)[0])


def pack_mask(mask: int) -> bytes:
    """A value of `watched_cgroups`."""
    return _KEY.pack(mask)


class Control:
    """The map `control`, memory-mapped: what the agent and the probe say to each other without a system call."""

    def __init__(self, fd: int, misses: Misses | None = None) -> None:
        """`misses` are the caller's."""
        self._misses = misses
        self._memory = mmap.mmap(fd, mmap.PAGESIZE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._value = np.frombuffer(self._memory, dtype=CONTROL_DTYPE, count=1)
        self._sleeping = self._value["sleeping"]
        self._wake_above = self._value["wake_above"]
        self._calm = self._value["calm"]
        self._lost = self._value["lost"][0]
        self._skipped = [self._value[name][0] for name in ("made_good", "skipped", "missed")]

    def __getitem__(self, name: str) -> int:
        return int(self._value[name][0])

    def __setitem__(self, name: str, number: int) -> None:
        self._value[name][0] = number

    def set_sleeping(self, asleep: bool) -> None:
        """Say whether the reader must be woken. The caller fences, and looks at the ring once more, before it sleeps."""
        self._sleeping[0] = asleep

    def set_nap(self, wake_above: int = NEVER_WOKEN, *, calm: bool = False) -> None:
        """Say above how many bytes that wait to be released the reader must be woken, and, if `calm`, that what is urgent is no reason."""
        self._wake_above[0] = wake_above
        self._calm[0] = calm

    def lost(self, *, quick: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return how many records were not made since the ring was: by type (and "could not follow"), node-wide ones and watched ones.

        With `quick`, do not ask the kernel for runs that it has skipped since the last time: that takes some 0.1 ms.
        """
        node, process = self._lost.tolist()
        missed = self._skipped[2].tolist() if quick or self._misses is None else self._misses.count(*self._skipped)
        for indices, runs in zip(_MISSED, missed, strict=True):
            for index in indices:
                process[index] += runs
        return tuple(node), tuple(process)

    def close(self) -> None:
        """Unmap."""
        del self._value, self._sleeping, self._wake_above, self._calm, self._lost, self._skipped
        self._memory.close()


TYPE_BITS: tuple[int, ...] = tuple(TYPE_NAMES)
"""Event bit by index of `lost`; index LOST_FOLLOW has none."""
_MISSED = [
    [TYPE_BITS.index(kind) for kind in made] + [LOST_FOLLOW] * (program == "kmonitor_fork")
    for program, made in zip(SKIPPED, MADE_BY, strict=True)
]
"""Indices of `lost`, by program of SKIPPED. A child that was not seen is not followed either."""
