# SPDX-License-Identifier: Apache-2.0
"""Which process is meant, where a pid alone may be another one's by now."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Identity:
    """A process of a node, for good. `start_time` in boot-time nanoseconds; the boot id is empty if the broker does not tell."""

    boot_id: str
    pid: int
    start_time: int

    def may_be(self, other: Identity) -> bool:
        """Whether this is the other process, as far as both say which they mean."""
        same_boot = self.boot_id == other.boot_id or "" in (self.boot_id, other.boot_id)
        return same_boot and (self.pid, self.start_time) == (other.pid, other.start_time)
