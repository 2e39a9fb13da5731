# SPDX-License-Identifier: Apache-2.0
"""The tables of a source that has none in the kernel: what is watched, the masks, and the counts of what was lost."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

from kmonitor.agent.errors import BpfError
from kmonitor.agent.libbpf import BPF_EXIST, BPF_NOEXIST
from kmonitor.agent.maps import LOST_NODE, LOST_PROCESS, Watched, pid_key, pid_of

_LOST_TYPES = 8


class WatchedTable:
    """The map `watched`: pid -> Watched. `entries` is for the source itself."""

    def __init__(self, most: int, on_change: Callable[[int, Watched | None], None]) -> None:
        """`on_change` is called behind each update and delete that comes from outside, with the entry that is now there."""
        self.entries: dict[int, Watched] = {}
        self._most = most
        self._on_change = on_change

    def lookup(self, key: bytes, value_size: int) -> bytes | None:
        """The value, or None."""
        entry = self.entries.get(pid_of(key))
        return None if entry is None else entry.pack()[:value_size]

    def update(self, key: bytes, value: bytes, flags: int = 0) -> bool:
        """False if BPF_EXIST or BPF_NOEXIST stood against it. Raises BpfError: E2BIG is a full map."""
        pid, entry = pid_of(key), Watched.unpack(value)
        there = pid in self.entries
        if (flags == BPF_EXIST and not there) or (flags == BPF_NOEXIST and there):
            return False
        if not self.put(pid, entry):
            raise BpfError("cannot write map watched: it is full", errno.E2BIG)
        self._on_change(pid, entry)
        return True

    def delete(self, key: bytes) -> bool:
        """False if there was no such entry."""
        if self.entries.pop(pid_of(key), None) is None:
            return False
        self._on_change(pid_of(key), None)
        return True

    def keys(self, key_size: int) -> Iterator[bytes]:
        """All keys; one that comes or goes meanwhile may be in it or not."""
        return iter([pid_key(pid)[:key_size] for pid in self.entries])

    def put(self, pid: int, entry: Watched) -> bool:
        """By the source itself: a child that is followed. False if the table is full."""
        if pid not in self.entries and len(self.entries) >= self._most:
            return False
        self.entries[pid] = entry
        return True


class MemoryControl:
    """The map `control`: `any_mask` and `all_mask`, and the losses."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        """`on_change` is called behind each change of a mask."""
        self.any_mask = 0
        self.all_mask = 0
        self._lost = ([0] * _LOST_TYPES, [0] * _LOST_TYPES)
        self._on_change = on_change

    def __getitem__(self, name: str) -> int:
        return self.any_mask if name == "any_mask" else {"all_mask": self.all_mask}[name]

    def __setitem__(self, name: str, number: int) -> None:
        if name == "any_mask":
            self.any_mask = number
        elif name == "all_mask":
            self.all_mask = number
        else:
            raise KeyError(name)
        self._on_change()

    def lost(self, *, quick: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Records that were not made since the ring was: by type (and LOST_FOLLOW), node-wide ones and watched ones.

        Of the node-wide ones, the last stands for messages of the kernel that never came: whose and of what type is not known.
        """
        del quick
        return tuple(self._lost[LOST_NODE]), tuple(self._lost[LOST_PROCESS])

    def count(self, which: int, index: int, losses: int) -> None:
        """So many more."""
        self._lost[which][index] += losses
