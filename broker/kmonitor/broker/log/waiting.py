# SPDX-License-Identifier: Apache-2.0
"""What the writer of the log has still to do, in order: bounded by what is there, however long the disk is full or does not answer."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator

from kmonitor.broker.block import Block
from kmonitor.broker.log import Entry
from kmonitor.broker.log.ends import times_of
from kmonitor.broker.log.writer import Add, Flush, Next, Order, Put
from kmonitor.broker.mark import Mark, MarkKind

BATCH_BYTES = 8 << 20
BATCH_ORDERS = 4096
"""One transaction has at most so much: a lot is written in several."""
COMPACTED_FROM = 4096
"""So many orders, and those that a later one makes needless are looked for."""

_Ring = tuple[str, int]
"""(node, epoch)."""


class Waiting:
    """Orders that wait, and those that the writer has."""

    def __init__(self, stored: Iterable[tuple[str, str]]) -> None:
        """`stored`: (space, key) of the values that are in the database."""
        self._orders: dict[int, Order] = {}
        """By a number that ascends."""
        self._flying: dict[int, Order] = {}
        """What the writer has. All of it was there before `_orders`."""
        self._first: list[Order] = []
        """To be done before those of `_orders`."""
        self._first_flying: list[Order] = []
        self._next = 0
        self._may_go: dict[_Ring, deque[int]] = {}
        """Numbers of the entries in `_orders` that can be given up."""
        self._unwritten: dict[int, None] = {}
        """Offsets of all entries, ascending."""
        self._stored = set(stored)
        self.compacts_from = COMPACTED_FROM
        self._kept = 0
        """How many orders the last look left."""

    def __len__(self) -> int:
        """How many orders the writer has not got yet."""
        return len(self._orders) + len(self._first)

    def __iter__(self) -> Iterator[Order]:
        """All, those that the writer has too."""
        return itertools.chain(self._first_flying, self._flying.values(), self._first, self._orders.values())

    @property
    def is_urgent(self) -> bool:
        """Whether somebody waits for one of them."""
        return any(isinstance(order, Flush | Next) for order in self._orders.values())

    def append(self, order: Order) -> None:
        """Behind all others."""
        self._orders[self._next] = order
        if isinstance(order, Add):
            self._unwritten[order.entry.offset] = None
            if _can_be_given_up(order.entry):
                self._may_go.setdefault(_ring(order.entry), deque()).append(self._next)
        self._next += 1
        if len(self._orders) >= max(self.compacts_from, 2 * self._kept):
            self._compact()

    def put_first(self, order: Order) -> None:
        """Ahead of all that waits."""
        self._first.append(order)

    def first_unwritten(self) -> int | None:
        """Offset of the first entry that is not in the database; None if all are."""
        return next(iter(self._unwritten), None)

    def take(self) -> list[Order]:
        """What the writer is to do next: all, or the first part of a lot. One of `done` and `failed` comes before the next."""
        size = 0
        flying: dict[int, Order] = {}
        for number, order in self._orders.items():
            size += order.entry.size if isinstance(order, Add) else 0
            # Not between a block and what it has caused: both are committed, or none.
            if flying and isinstance(order, Add) and (size > BATCH_BYTES or len(flying) >= BATCH_ORDERS):
                break
            flying[number] = order
        if len(flying) == len(self._orders):
            self._orders = {}
            self._may_go = {}
        else:
            for number, order in flying.items():
                del self._orders[number]
                if isinstance(order, Add) and _can_be_given_up(order.entry):
                    numbers = self._may_go[_ring(order.entry)]
                    numbers.popleft()
                    if not numbers:
                        del self._may_go[_ring(order.entry)]
        self._flying = flying
        self._first_flying, self._first = self._first, []
        return [*self._first_flying, *flying.values()]

    def done(self) -> None:
        """What was taken is in the database."""
        for order in self._flying.values():
            if isinstance(order, Add):
                del self._unwritten[order.entry.offset]
            elif isinstance(order, Put) and order.value is None:
                self._stored.discard((order.space, order.key))
            elif isinstance(order, Put):
                self._stored.add((order.space, order.key))
        self._flying = {}
        self._first_flying = []

    def failed(self) -> None:
        """Nothing of what was taken is in the database: it waits again."""
        for number, order in reversed(self._flying.items()):
            if isinstance(order, Add) and _can_be_given_up(order.entry):
                self._may_go.setdefault(_ring(order.entry), deque()).appendleft(number)
        back = {number: order for number, order in self._flying.items() if not isinstance(order, Flush)}
        self._orders = {**back, **{number: order for number, order in self._orders.items() if not isinstance(order, Flush)}}
        self._flying = {}
        self._first, self._first_flying = self._first_flying + self._first, []

    def give_up(self, node: str, epoch: int, position: int) -> tuple[Mark, list[Entry]] | None:
        """Make one mark of what waits, and ends at `position` or before: that mark, and what it stands for. None if there is nothing."""
        numbers = self._may_go.get((node, epoch))
        gone: list[int] = []
        adds: list[Add] = []
        while numbers and isinstance(add := self._orders[numbers[0]], Add) and add.entry.end <= position:
            gone.append(numbers.popleft())
            adds.append(add)
        if numbers is None or not gone:
            return None
        # In the place of the last: who has read up to the middle of them must come upon it.
        numbers.appendleft(gone[-1])
        if len(gone) == 1 and isinstance(adds[0].entry, Mark):
            return None
        entries = [add.entry for add in adds]
        mark = _unlogged(entries)
        for number, entry in zip(gone[:-1], entries, strict=False):
            del self._orders[number]
            del self._unwritten[entry.offset]
        self._orders[gone[-1]] = Add(mark, adds[-1].reach)
        return mark, entries

    def _compact(self) -> None:
        """Of what is put under one key only the last matters, unless an entry lies between: that is never there without what was before it.
        And a value that came and went meanwhile need not be written at all."""
        kept = {(order.space, order.key) for order in self._flying.values() if isinstance(order, Put)}
        latest: dict[tuple[str, str], int] = {}
        for number, order in list(self._orders.items()):
            if isinstance(order, Add):
                kept.update(latest)
                latest.clear()
            elif isinstance(order, Put):
                key = order.space, order.key
                if key in latest:
                    del self._orders[latest.pop(key)]
                if order.value is None and key not in kept and key not in self._stored:
                    del self._orders[number]
                else:
                    latest[key] = number
        self._kept = len(self._orders)


def _ring(entry: Entry) -> _Ring:
    return entry.node, entry.epoch


def _can_be_given_up(entry: Entry) -> bool:
    return isinstance(entry, Block) or entry.kind == MarkKind.UNLOGGED


def _unlogged(entries: list[Entry]) -> Mark:
    """One mark for all of these, of one node and epoch, with the offset of the last."""
    times = [time_ns for entry in entries for time_ns in times_of(entry)]
    last = entries[-1]
    position, end = min(entry.position for entry in entries), max(entry.end for entry in entries)
    mark = Mark(MarkKind.UNLOGGED, last.node, last.boot_id, last.epoch, position, end, min(times, default=0), max(times, default=0))
    mark.offset = last.offset
    return mark
