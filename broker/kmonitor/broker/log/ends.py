# SPDX-License-Identifier: Apache-2.0
"""How far each node and epoch has come, which a log knows for longer than the entries themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from kmonitor.broker.block import Block
from kmonitor.broker.log import Dropped, End, Entry
from kmonitor.broker.mark import Mark, MarkKind
from kmonitor.wire.record import SLOT_SIZE

EPOCHS = 16
"""How many epochs of a node are remembered."""


class Ends:
    """Node -> epoch -> End, the epochs in the order in which they came first."""

    def __init__(self, on_forget: Callable[[str, int], None] | None = None) -> None:
        """`on_forget` is called with the node and the epoch that is remembered no longer."""
        self._nodes: dict[str, dict[int, End]] = {}
        self._on_forget = on_forget

    def of(self, node: str) -> dict[int, End]:
        """Not to be changed."""
        return self._nodes.get(node, {})

    def get(self, node: str, epoch: int) -> End | None:
        """None if the epoch is not known, or forgotten."""
        found = self._nodes.get(node)
        return None if found is None else found.get(epoch)

    def all(self) -> Iterator[tuple[str, int, End]]:
        """(node, epoch, end) of all."""
        return ((node, epoch, end) for node, epochs in self._nodes.items() for epoch, end in epochs.items())

    def nodes(self) -> list[str]:
        """Return the nodes of which anything is known."""
        return list(self._nodes)

    def forget(self, node: str) -> None:
        """Forget all of a node."""
        for epoch in self._nodes.pop(node, {}):
            if self._on_forget is not None:
                self._on_forget(node, epoch)

    def load(self, node: str, epoch: int, end: End) -> None:
        """What was remembered before, in order."""
        self._nodes.setdefault(node, {})[epoch] = end

    def advance(self, entry: Entry) -> int:
        """An entry came in, with its offset: the largest `end` of its node and epoch so far."""
        epochs = self._nodes.get(entry.node)
        if epochs is None:
            epochs = self._nodes[entry.node] = {}
        end = epochs.get(entry.epoch)
        if end is None:
            epochs[entry.epoch] = End(entry.end, entry.offset)
            for epoch in list(epochs)[:-EPOCHS]:
                del epochs[epoch]
                if self._on_forget is not None:
                    self._on_forget(entry.node, epoch)
            return entry.end
        end.offset = entry.offset
        end.position = max(end.position, entry.end)
        return end.position

    def drop(self, node: str, epoch: int, dropped: Dropped) -> None:
        """Retention took it."""
        end = self.get(node, epoch)
        if end is None:
            return
        if end.dropped is None:
            end.dropped = dropped
        elif end.dropped.last <= dropped.last:
            # Of a loss behind the last record the end is where that record begins, or ends.
            end.dropped = dataclasses.replace(dropped, end=max(end.dropped.end, dropped.end))


def dropped_of(entry: Entry) -> Dropped | None:
    """What is to be remembered when retention takes an entry; None if nobody misses it."""
    if isinstance(entry, Mark):
        return None if entry.kind == MarkKind.EPOCH else Dropped(entry.end, entry.end, entry.end_time_ns)
    if not len(entry):
        return None
    slot = _slot(entry, -1)
    return Dropped(entry.position + slot * SLOT_SIZE, entry.end, _unix_ns(entry, slot))


def times_of(entry: Entry) -> tuple[int, ...]:
    """From when to when it is, Unix nanoseconds. A block without records has no times."""
    if isinstance(entry, Mark):
        return entry.time_ns, entry.end_time_ns
    return (_unix_ns(entry, _slot(entry, 0)), _unix_ns(entry, _slot(entry, -1))) if len(entry) else ()


# Not by the block's columns, which are computed as a whole, and kept.


def _slot(block: Block, row: int) -> int:
    return row % len(block.slots) if block.starts is None else int(block.starts[row])


def _unix_ns(block: Block, slot: int) -> int:
    return int(block.slots["boottime_ns"][slot]) + block.boottime_to_unix_ns
