# SPDX-License-Identifier: Apache-2.0
"""What a mark in the log means for one session: the same whether it is told live, or read from the log later."""

from __future__ import annotations

from kmonitor.broker.mark import Mark, MarkKind
from kmonitor.broker.matching import Matcher
from kmonitor.broker.notices import gap
from kmonitor.v1 import monitor_pb2

_REASONS = {
    MarkKind.LOST: monitor_pb2.GAP_REASON_RING,
    MarkKind.HOLE: monitor_pb2.GAP_REASON_AGENT,
    MarkKind.EPOCH: monitor_pb2.GAP_REASON_AGENT,
    MarkKind.UNLOGGED: monitor_pb2.GAP_REASON_LOG,
}


def number_of(mark: Mark) -> int:
    """Under which a mark that is in the log is known outside: 1 for its first entry."""
    return mark.offset + 1


def told(mark: Mark, matcher: Matcher, log_id: int) -> bytes | None:
    """The gap that a session is told of; None if nothing of its own can be missing."""
    counts: dict[int, int] = {}
    if mark.kind is MarkKind.LOST:
        counts = _counts(mark, matcher)
        if not counts:
            return None
    elif mark.kind is MarkKind.EPOCH:
        if not any(span.epoch != mark.epoch and not 0 <= span.end_offset <= mark.offset for span in matcher.spans_on(mark.node)):
            return None
    elif not matcher.spans_between(mark.node, mark.epoch, mark.position, mark.end):
        return None
    return gap(
        mark.node,
        _REASONS[mark.kind],
        mark.epoch,
        positions=(mark.position, mark.end),
        times=(mark.time_ns, mark.end_time_ns),
        counts=counts,
        number=number_of(mark),
        log_id=log_id,
    )


def _counts(mark: Mark, matcher: Matcher) -> dict[int, int]:
    """By type, what was lost that may have been this session's."""
    # Also those that have ended since, at the very position where it stands: told live, they would have been open.
    spans = [
        span
        for span in matcher.spans_on(mark.node)
        if span.epoch == mark.epoch
        and span.first <= mark.end
        and (span.end is None or span.end > mark.position or (span.end == mark.position and span.end_offset > mark.offset))
    ]
    own, wide, follows = 0, 0, False
    for span in spans:
        follows |= span.follow
        if span.process is not None:
            own |= span.mask
        else:
            wide |= span.mask
    counts: dict[int, int] = {}
    for (kind, watched), count in mark.counts.items():
        # What a process's own entry asked for may be wanted by a wider registration too; not the other way round.
        # Type 0, watched: a child that could not be followed, of which every event is missing. Not watched: what the kernel
        # could not tell the agent of (source netlink), of any type and whoever's.
        if kind & (wide | own if watched else wide) or (kind == 0 and (follows if watched else spans)):
            counts[kind] = counts.get(kind, 0) + count
    return counts
