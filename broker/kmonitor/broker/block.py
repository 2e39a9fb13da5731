# SPDX-License-Identifier: Apache-2.0
"""A block: a committed stretch of one node's ring, as the agent sent it, seen as columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kmonitor.wire.errors import BadRecordError
from kmonitor.wire.record import F_MATCH_PROCESS, SLOT_SIZE, Indices, Slots, check_records, slots_of

ProcessKey = tuple[int, int]
"""(pid, start time in boot-time nanoseconds): with its node and boot a process, for good."""

_POSITIONS = 1 << 64  # as many as the protocol has numbers for
_OVERHEAD = 1024  # of the objects around the bytes; keeps a log of one-record blocks within its bound


class Block:
    """Records of one node, in the order of their positions. Immutable but for its caches and its offset in the log.

    Raises BadRecordError unless `data` is exactly committed records of this version, and its positions are below 2^64.
    """

    __slots__ = (
        "_cache",
        "boot_id",
        "boottime_to_unix_ns",
        "data",
        "encoded",
        "end",
        "epoch",
        "node",
        "offset",
        "partly_encoded_us",
        "position",
        "slots",
        "starts",
    )

    def __init__(self, node: str, epoch: int, position: int, data: bytes, boottime_to_unix_ns: int, boot_id: str = "") -> None:
        """`position` of the first byte; add `boottime_to_unix_ns` to the records' clock to get Unix nanoseconds; an empty `boot_id` is
        not known."""
        self.node = node
        self.boot_id = boot_id
        """The boot that the records' processes are of."""
        self.epoch = epoch
        self.position = position
        self.end = position + len(data)
        """The first position behind the block."""
        if self.end >= _POSITIONS:
            raise BadRecordError("the block's positions do not fit into 64 bits: the agent is faulty")
        self.data = data
        self.boottime_to_unix_ns = boottime_to_unix_ns
        self.offset = -1
        """In the log; -1 before it is there."""
        self.slots: Slots = slots_of(data)
        starts = check_records(self.slots)
        # Only exec and discarded records make this array differ from 0..n-1: spend no memory on the usual case.
        self.starts: Indices | None = None if len(starts) == len(self.slots) else starts
        self.encoded: object | None = None
        """Owned by encode.Encoder: the records as protobuf."""
        self.partly_encoded_us = 0.0
        """What encoding rows of it by themselves has taken, about."""
        self._cache: dict[Any, Any] = {}

    def __len__(self) -> int:
        """How many records it holds."""
        return len(self.slots) if self.starts is None else len(self.starts)

    @property
    def source(self) -> tuple[str, str, int]:
        """(node, boot id, epoch): what blocks that go out in one message have in common."""
        return self.node, self.boot_id, self.epoch

    @property
    def size(self) -> int:
        """Bytes that it takes in memory, without its caches."""
        return len(self.data) + (0 if self.starts is None else self.starts.nbytes) + _OVERHEAD

    def column(self, name: str) -> npt.NDArray[Any]:
        """One field of every record: shape (n,). See kmonitor.wire.record for names and units."""
        found: npt.NDArray[Any] | None = self._cache.get(name)
        if found is None:
            values = self.slots[name]
            found = np.ascontiguousarray(values) if self.starts is None else values[self.starts]
            self._cache[name] = found
        return found

    @property
    def positions(self) -> npt.NDArray[np.uint64]:
        """The position of every record in the node's ring, bytes: shape (n,)."""
        found: npt.NDArray[np.uint64] | None = self._cache.get("positions")
        if found is None:
            starts = np.arange(len(self.slots), dtype=np.uint64) if self.starts is None else self.starts.astype(np.uint64)
            found = starts * np.uint64(SLOT_SIZE) + np.uint64(self.position)
            self._cache["positions"] = found
        return found

    @property
    def processes(self) -> dict[ProcessKey, Indices]:
        """The rows that a process's own entry asked for, by process. Ascending."""
        found: dict[ProcessKey, Indices] | None = self._cache.get("processes")
        if found is None:
            found = self._group_processes()
            self._cache["processes"] = found
        return found

    def _group_processes(self) -> dict[ProcessKey, Indices]:
        if len(self) == 1:  # an isolated event: not worth a dozen array operations
            if not self.column("flags").item() & F_MATCH_PROCESS:
                return {}
            return {(self.column("tgid").item(), self.column("start_boottime_ns").item()): np.zeros(1, dtype=np.intp)}
        rows = np.flatnonzero(self.column("flags") & F_MATCH_PROCESS)
        if len(rows) == 0:
            return {}
        pids = self.column("tgid")[rows]
        starts = self.column("start_boottime_ns")[rows]
        order = np.lexsort((starts, pids))  # stable: rows stay in order within a process
        rows, pids, starts = rows[order], pids[order], starts[order]
        first = np.flatnonzero(np.concatenate(([True], (pids[1:] != pids[:-1]) | (starts[1:] != starts[:-1]))))
        bounds = [*first.tolist(), len(rows)]
        keys = zip(pids[first].tolist(), starts[first].tolist(), strict=True)
        return {key: rows[bounds[at] : bounds[at + 1]] for at, key in enumerate(keys)}

    def memo(self, key: object) -> Any:
        """What `remember` was given under `key` since the last `trim`, or None."""
        return self._cache.get(key)

    def remember(self, key: object, value: Any) -> None:
        """Keep what was computed from this block until `trim`."""
        self._cache[key] = value

    def unix_ns(self, row: int) -> int:
        """Wall clock of a record, Unix nanoseconds."""
        return int(self.column("boottime_ns")[row]) + self.boottime_to_unix_ns

    def trim(self) -> None:
        """Drop the columns: the log keeps blocks for long, and counts only what `size` says."""
        self._cache.clear()
