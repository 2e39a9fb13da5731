# SPDX-License-Identifier: Apache-2.0
"""What a measurement says: figures, and the series of which plots are made."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Better = Literal["less", "more"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table. `low` and `high` are the quartiles of what was measured, in the same unit as `value`."""

    group: str
    """The measurement that it is of: the name of its module."""
    what: str
    value: float
    unit: str
    """x (a ratio), %, us, ms, s, KB, MB, events/s, ..."""
    low: float = math.nan
    high: float = math.nan
    samples: int = 1
    target: float | None = None
    better: Better = "less"
    """Which side of the target is the good one."""
    against: str = ""
    """What it is compared with, in a few words and figures."""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if there is none."""
        if self.target is None:
            return None
        return self.value <= self.target if self.better == "less" else self.value >= self.target


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a plot, or with `kind` "bars" one group of bars: `x` are their names then."""

    group: str
    plot: str
    """The plot's title: series of one group and plot are drawn together."""
    name: str
    x: Sequence[float | str]
    y: Sequence[float]
    x_label: str
    y_label: str
    kind: Literal["line", "bars"] = "line"
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """How a measurement is to be made."""

    quick: bool
    """A smoke test: seconds, and no figure worth keeping. Everything that the whole run does is done once."""
    build: Path
    """Where programs that it compiles go; exists, and is kept between runs."""
    scratch: Path
    """An empty folder, removed afterwards."""


@dataclass(slots=True)
class Result:
    """Of one measurement."""

    figures: list[Figure] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What a reader of the figures must know: what was left out, and why."""


def summary(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile)."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def paired(values: Sequence[float], beside: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles of the ratios of what was measured side by side: values[i] / beside[i]."""
    return summary([value / base for value, base in zip(values, beside, strict=True)])


def percentile(ascending: Sequence[float], share: float) -> float:
    """The value below which lies `share` (0 to 1) of the sorted values."""
    return ascending[min(int(len(ascending) * share), len(ascending) - 1)]
