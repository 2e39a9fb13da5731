# SPDX-License-Identifier: Apache-2.0
"""Which registrations follow a process that nobody has told the broker of, by the root that its records carry.

A child is known from its parent's PROCESS_FORK. If the ring had no room for that record the kernel follows the child all the
same, and the child's records say which registered process it has that from, and how long that one had been armed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from kmonitor.broker.block import ProcessKey
from kmonitor.broker.matching import Span
from kmonitor.broker.multimap import Multimap

_NUMBERS = 1 << 32  # that agents have for changes


class Trees:
    """The spans that follow on one node, by process, for the processes that are roots: those that agents were asked to arm.

    The span of a root that has ended stays for as long as its registration has an open one: what the root forked may live.
    So this holds a span for each root and registration at most, and not for each process.
    """

    def __init__(self) -> None:
        self.unchecked: set[ProcessKey] = set()
        """Roots that have told nothing yet since any process is followed. Each may itself be one that a followed process forked unheard."""
        self._spans: Multimap[ProcessKey, Span] = Multimap()
        self._open: dict[Hashable, int] = {}
        """Arm -> its open spans that follow, of all processes."""
        self._roots: Multimap[Hashable, ProcessKey] = Multimap()
        """Arm -> where it is in `_spans`."""

    def opened(self, span: Span, process: ProcessKey, others: Iterable[Span]) -> None:
        """A process has a span. `others`: those that it has already."""
        if span.root and (span.follow or self._open):
            self.unchecked.add(process)
        if not span.follow:
            return
        self._open[span.arm] = self._open.get(span.arm, 0) + 1
        if process not in self._spans:
            if not span.root:
                return
            for other in others:
                if other.follow:
                    self._note(process, other)
        self._note(process, span)

    def ended(self, span: Span, process: ProcessKey, *, last: bool) -> None:
        """A span of a process has ended. `last`: it has no other."""
        if last:
            self.unchecked.discard(process)
        if not span.follow:
            return
        self._open[span.arm] -= 1
        if self._open[span.arm]:
            return
        del self._open[span.arm]
        if not self._open:
            self.unchecked.clear()
        for root in self._roots.pop(span.arm):
            for each in list(self._spans[root]):
                if each.arm == span.arm:
                    self._spans.discard(root, each)

    def above(self, root: ProcessKey, armed: int, epoch: int) -> list[Span]:
        """The spans that follow what `root` forked while `armed` was the number of the change that had armed it last.

        Not of registrations that came later: children that were there before are not theirs.
        """
        return [span for span in self._spans.get(root) if span.epoch == epoch and (armed - span.since) % _NUMBERS < _NUMBERS // 2]

    def __len__(self) -> int:
        """How many roots are known."""
        return len(self._spans)

    def _note(self, root: ProcessKey, span: Span) -> None:
        self._spans.add(root, span)
        self._roots.add(span.arm, root)
