# SPDX-License-Identifier: Apache-2.0
"""What stands in the log between blocks: that something of a node is missing here, or that its positions start anew."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass, field

SIZE = 512
"""Bytes that a mark counts for, about."""


class MarkKind(enum.IntEnum):
    """What a mark says. The numbers are in logs on disk."""

    LOST = 1
    """The node's ring had no room for some records."""
    HOLE = 2
    """Positions that never came."""
    EPOCH = 3
    """Positions start anew at `end`: the ring of before, and what was in it, is gone."""
    UNLOGGED = 4
    """Blocks that were routed, and could not be written to the log."""


@dataclass(eq=False, slots=True)
class Mark:
    """Lies behind all of its node's blocks that end at `end` or before. Immutable but for its offset in the log."""

    kind: MarkKind
    node: str
    boot_id: str
    epoch: int
    position: int
    """From where ..."""
    end: int
    """... to where something is missing, bytes."""
    time_ns: int
    """From when ..."""
    end_time_ns: int
    """... to when, Unix nanoseconds."""
    counts: dict[tuple[int, bool], int] = field(default_factory=dict)
    """LOST: (event type, whether asked for by a process's own entry) -> how many."""
    rebooted: bool = False
    """EPOCH: it is another boot, too."""
    offset: int = -1
    """In the log; -1 before it is there."""

    @property
    def size(self) -> int:
        """Bytes that it takes in memory, about."""
        return SIZE

    def pack(self) -> bytes:
        """For a log on disk, which keeps kind, node, boot_id, epoch, position and end apart."""
        counts = [[kind, watched, count] for (kind, watched), count in self.counts.items()]
        times = [self.time_ns, self.end_time_ns]
        return json.dumps({"times": times, "counts": counts, "rebooted": self.rebooted}).encode()

    @classmethod
    def unpack(cls, kind: int, node: str, boot_id: str, epoch: int, position: int, end: int, packed: bytes) -> Mark:
        """What `pack` made. Raises ValueError if it is something else."""
        try:
            content = json.loads(packed)
            begin_ns, end_ns = content["times"]
            counts = {(int(kind), bool(watched)): int(count) for kind, watched, count in content["counts"]}
            rebooted = bool(content["rebooted"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a mark: {error}") from None
        return cls(MarkKind(kind), node, boot_id, epoch, position, end, begin_ns, end_ns, counts, rebooted)
