# SPDX-License-Identifier: Apache-2.0
"""What every performance must be, whatever the scene."""

from __future__ import annotations

from tests.lab.compare import CLOCK_SLACK_NS, Line, differences, inconsistencies
from tests.lab.workload import Performance


def exact(performance: Performance, node: str) -> None:
    """Seen as it was: each event once, in order, without a gap, at its time."""
    gaps = performance.watch.of_kind("gap")
    wrong = differences(performance.truth, performance.events) + inconsistencies(
        performance.events, node, named="names" in performance.knowledge.knows
    )
    wrong += [f"gap: {gap}" for gap in gaps]
    wrong += [f"not at its time: {line}" for line in performance.events if not _in_time(performance, line)]
    if wrong:
        told = "\n".join(map(str, performance.truth[:40]))
        seen = "\n".join(map(str, performance.events[:40]))
        raise AssertionError("\n".join([*wrong[:20], "-- it was:", told, "-- it was seen as:", seen]))


def _in_time(performance: Performance, line: Line) -> bool:
    return bool(performance.began_ns - CLOCK_SLACK_NS <= line["time"] <= performance.ended_ns + CLOCK_SLACK_NS)


def of_type(lines: list[Line], *types: str) -> list[Line]:
    """Those of some types, in order."""
    return [line for line in lines if line["type"] in types]
