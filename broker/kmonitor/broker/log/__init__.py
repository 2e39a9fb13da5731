# SPDX-License-Identifier: Apache-2.0
"""What was: the blocks of all nodes and the marks between them, in the order in which they came; and what the broker must remember.

`memory` and `sqlite` are its forms.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kmonitor.broker.block import Block
from kmonitor.broker.mark import Mark

Entry = Block | Mark

DEFAULT_LOG_BYTES = 256 << 20
"""Of the log in memory."""


@dataclass(slots=True)
class End:
    """How far the log has, or has had, one node and epoch."""

    position: int
    """Behind the last byte: the largest `end` of its entries."""
    offset: int
    """Of the last entry."""
    dropped: Dropped | None = None
    """Where what retention took ends; None if it took nothing."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """The end of what retention took of one node and epoch: of its last block with a record, or of a later mark that tells of a loss."""

    last: int
    """The position of the last record; of a mark its `end`. Who has come so far misses nothing."""
    end: int
    """The first position behind it."""
    time_ns: int
    """Of the last record, or to when the mark says that something is missing, Unix nanoseconds; 0 if that is not known."""


class Page(NamedTuple):
    """What was read."""

    entries: list[Entry]
    following: int
    """Where to read on: below it nothing else is."""


class EventLog(Protocol):
    """Entries by offset: ascending over all nodes, never used twice. And a store of small values, for what the broker must know again.

    Offsets begin at 0, and each is one above the one before, but that some are left out: see `give_up`, and a form of log that outlives a
    crash leaves some out after one, since those of entries that were lost with it may be known to clients.

    All calls come from the event loop's thread and return at once, but where it is said that they wait for a disk; so do the callbacks.
    An entry can be read from its `append` on. What is appended is committed in this order: what comes after something is never there
    without it. Of values that were put under one key only the last is sure to be written.
    """

    on_evict: Callable[[int], int | None] | None
    """Called with an offset before the entries below it are dropped: while it is called, `read` returns those, and does not wait. It
    may return an offset up to which they can be dropped now: it is called again for the rest, in a later turn of the event loop."""
    is_missed: Callable[[int], bool] | None
    """Asked first, with the same offset: False if nobody wants to know what is dropped, and `on_evict` need not be called."""
    on_commit: Callable[[int], None] | None
    """Called with `committed` whenever it has grown."""
    on_trouble: Callable[[str], None] | None
    """Called with one line when writing fails, and with an empty one when it works again."""

    @property
    def log_id(self) -> int:
        """Names this log, for as long as offsets go on: random, not 0, below 2^63."""
        ...

    @property
    def durable(self) -> bool:
        """Whether it outlives the broker."""
        ...

    @property
    def oldest(self) -> int:
        """Offset of the first entry that is still there; `end` if there is none."""
        ...

    @property
    def end(self) -> int:
        """Offset that the next entry will get."""
        ...

    @property
    def committed(self) -> int:
        """All entries below it are safe: they outlive a crash, as far as this form of log promises that."""
        ...

    def append(self, entry: Entry) -> int:
        """Put an entry in, set its `offset` and return it."""
        ...

    def read(self, offset: int, max_bytes: int) -> list[Entry]:
        """Entries from `offset` (or `oldest`, if that is later) on, about `max_bytes` of them; at least one if there is one. May wait for
        a disk, unless it is called in `on_evict`."""
        ...

    def fetch(self, offset: int, max_bytes: int) -> Page | asyncio.Future[Page]:
        """As `read`, and never waits: what lies on a disk comes later. An eviction meanwhile may have told of some of it already."""
        ...

    def locate(self, places: Iterable[tuple[str, int, int]]) -> asyncio.Future[None] | None:
        """Make ready that `offset_behind` can be asked for each (node, epoch, position) without waiting; None if it can already."""
        ...

    def offset_behind(self, node: str, epoch: int, position: int) -> int | None:
        """From which offset on all entries of the node lie that hold anything behind `position`, those of later epochs too; with -1,
        marks at position 0 as well.

        Later in the log: a node may come back to an epoch after another one, and what lies between is behind what came before it.
        May be below `oldest`; then some of them are gone. None if the log has never known this epoch, or has forgotten it. May wait for a
        disk, unless `locate` was asked before.
        """
        ...

    def ends(self, node: str) -> dict[int, End]:
        """Epoch -> how far it has come, of the node's last 16 epochs, oldest first. Not to be changed."""
        ...

    def nodes(self) -> list[str]:
        """Return the names of the nodes that `ends` knows."""
        ...

    def forget(self, node: str) -> None:
        """Forget the `ends` of a node whose entries are all gone."""
        ...

    def put(self, space: str, key: str, value: bytes | None) -> None:
        """Remember a value under a key of a space; None forgets it. It is written with, or before, what is appended next."""
        ...

    def values(self, space: str) -> dict[str, bytes]:
        """All that is remembered in a space, what was put just now too. Not after `forget_values`."""
        ...

    def forget_values(self) -> None:
        """Nobody will ask for `values` again before the log is opened anew: what is put is not to be kept in memory beside."""
        ...

    def give_up(self, node: str, epoch: int, position: int) -> None:
        """Never write those blocks that end at `position` or before and are not committed yet: bounds the memory of what waits in trouble.

        In place of the last of them comes one Mark UNLOGGED for them all, which is written when it can be; blocks that are being
        written now are only given up if that fails. The offsets of the others are left out from then on. `committed` does not wait for what
        was given up, but for the mark as for any entry. Takes effect when the caller has returned to the event loop.
        """
        ...

    async def flush(self) -> None:
        """Until all that was appended and put so far is committed, or cannot be: see `on_trouble`."""
        ...

    async def close(self) -> None:
        """Flush, and give everything back. Takes some seconds at most: what cannot be written is said in the broker's own log."""
        ...
