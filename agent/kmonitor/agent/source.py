# SPDX-License-Identifier: Apache-2.0
"""What a source of events gives to the rest of the agent, however it captures. Positions, blocks and masks mean the same in all."""

from __future__ import annotations

import select
from collections.abc import Iterator
from typing import Protocol

from kmonitor.agent.processes import Found, Look


class Ring(Protocol):
    """Records in the order of their positions, kept until they are released. See ring.Ring."""

    @property
    def size(self) -> int:
        """Bytes that it holds."""

    @property
    def position(self) -> int:
        """Where the next read begins."""

    @property
    def wakeups(self) -> select.epoll:
        """Readable when there is something to read and `prepare_sleep` was the last word."""

    @property
    def consumer(self) -> int:
        """All before it was released."""

    @property
    def producer(self) -> int:
        """Where the next record will lie."""

    @property
    def behind(self) -> bool:
        """Not all that there is can be seen: the source has yet to take it in."""

    def has_unread(self) -> bool:
        """Whether anything, committed or not, lies behind `position`."""

    def committed_ahead(self) -> bool:
        """Whether the record at `position` is one that can be read: something must lie there."""

    def read(self, limit: int) -> bytes | memoryview | None:
        """Committed records from `position` on, at most about `limit` bytes, and step over them; None if there are none. It may be the
        ring's memory: it holds until they are released."""

    def release(self, position: int) -> None:
        """Everything before `position` is not needed any more."""

    def rewind(self, position: int = 0) -> None:
        """Read again what was not released, from `position` on if that is later."""

    def prepare_sleep(self) -> bool:
        """Ask to be woken. False if there is something to read already."""

    def prepare_nap(self, fill: int, *, calm: bool) -> bool:
        """Ask to be woken when `fill` bytes can be read, or earlier, unless `calm`, by what is urgent: the exit of a watched process.
        False if so many can be already."""

    def awake(self) -> bool:
        """No more wake-ups; forget those that came. Whether there was what was asked for."""


class Control(Protocol):
    """The masks, and the counts of what was lost."""

    def __getitem__(self, name: str) -> int: ...

    def __setitem__(self, name: str, number: int) -> None: ...

    def lost(self, *, quick: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return how many records were not made since the ring was: by type (and LOST_FOLLOW), node-wide ones and watched ones. With
        `quick`, leave out what it takes long to find out, and was not found yet."""


class Table(Protocol):
    """A map of what is watched: keys and values as bytes, laid out as in bpf/kmonitor.h. See libbpf.Map."""

    def lookup(self, key: bytes, value_size: int) -> bytes | None:
        """The value, or None."""

    def update(self, key: bytes, value: bytes, flags: int = 0) -> bool:
        """False if BPF_EXIST or BPF_NOEXIST stood against it. Raises BpfError: E2BIG is a full map."""

    def delete(self, key: bytes) -> bool:
        """False if there was no such entry."""

    def keys(self, key_size: int) -> Iterator[bytes]:
        """All keys."""


class Processes(Protocol):
    """What runs on this node, with start times in the grain that the source's records have."""

    def all(self) -> list[Found]:
        """Every process in scope, zombies too."""

    def look_up(self, pids: list[int]) -> Look:
        """Those of `pids` that are there."""


class Feed(Protocol):
    """What a stream to the broker is made from: records, and the counts of those that are missing."""

    @property
    def name(self) -> str:
        """ "core", "bcc" or "netlink"."""

    @property
    def epoch(self) -> int:
        """Names the ring: when it was made, in Unix nanoseconds."""

    @property
    def secret(self) -> bytes:
        """Proves to the broker that this agent holds the ring; empty if an older version made it."""

    def begin_epoch(self) -> None:
        """Name the ring anew, with what is in it: the broker knows another one by its name."""

    @property
    def record_version(self) -> int:
        """Of the records in the ring."""

    @property
    def ring(self) -> Ring: ...

    @property
    def control(self) -> Control: ...


class Source(Feed, Protocol):
    """A running source. `close` ends it, unless it is pinned."""

    @property
    def adopted(self) -> bool:
        """Whether it was running already: an agent before this one made it."""

    @property
    def watched(self) -> Table: ...

    @property
    def watched_cgroups(self) -> Table | None:
        """None if this source cannot tell in which control group a process is."""

    @property
    def processes(self) -> Processes: ...

    async def prepare(self, node_mask: int) -> None:
        """Get to know what it takes to capture this for the whole node, which the masks are about to ask for. It may take long; the loop
        goes on meanwhile. Raises CaptureError, MissingCapabilityError."""

    def catch_up(self) -> None:
        """Until all that has happened so far was matched against the tables as they are: what is armed next has no part in it."""

    def infer_exit(self, pid: int, start_boottime_ns: int, known: Found | None = None) -> bool:
        """Tell the end of a process that was looked up and does not run: an inferred PROCESS_EXIT, at a position of its own.

        `known`: what the look-up still found of it, if it is a zombie. The entry of `watched` for this very process is removed. False:
        not told yet, as the ring has no room, or the real end may come any moment; nothing is counted as lost, ask again a little
        later. Raises BpfError.
        """

    def close(self) -> None:
        """Give back what this process holds."""
