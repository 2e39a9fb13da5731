# SPDX-License-Identifier: Apache-2.0
"""The report: one table as Markdown and as JSON, and plots."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from bench.figure import Figure, Result, Series
from bench.machine import facts

_VERDICTS = {None: "", True: "yes", False: "**no**"}


def amount(value: float, unit: str) -> str:
    """A value with as many digits as it deserves."""
    if math.isnan(value):
        return "?"
    digits = 3 if unit == "x" else 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    text = f"{value:,.{digits}f}"
    return text if unit == "x" else f"{text} {unit}"


def line(figure: Figure) -> str:
    """One line for a terminal."""
    parts = [f"{figure.what}: {amount(figure.value, figure.unit)}"]
    if figure.samples > 1:
        parts.append(f"({_spread(figure)} in {figure.samples})")
    if figure.target is not None:
        parts.append(f"to reach {_target(figure)}: {'yes' if figure.met else 'NO'}")
    if figure.against:
        parts.append(f"[{figure.against}]")
    return "  ".join(parts)


def show(result: Result) -> None:
    """For those who run one measurement by hand."""
    for figure in result.figures:
        print(line(figure))
    for note in result.notes:
        print(f"note: {note}")


def write(folder: Path, results: Mapping[str, Result], seconds: Mapping[str, float], *, quick: bool) -> None:
    """results.json, results.md, plots/*.svg."""
    machine = facts()
    record = {
        "machine": machine,
        "quick": quick,
        "seconds": {name: round(taken, 1) for name, taken in seconds.items()},
        "figures": [_plain(figure) for result in results.values() for figure in result.figures],
        "series": [dataclasses.asdict(series) for result in results.values() for series in result.series],
        "notes": {name: result.notes for name, result in results.items() if result.notes},
    }
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    plots = draw(folder / "plots", itertools.chain.from_iterable(result.series for result in results.values()))
    (folder / "results.md").write_text(_markdown(machine, results, plots, quick=quick), encoding="utf-8")


def _plain(figure: Figure) -> dict[str, object]:
    """For JSON, which knows no NaN."""
    plain = {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in dataclasses.asdict(figure).items()}
    return plain | {"met": figure.met}


def _markdown(machine: Mapping[str, str], results: Mapping[str, Result], plots: Mapping[str, list[Path]], *, quick: bool) -> str:
    out = ["# Measurements", ""]
    if quick:
        out += ["A smoke test (`make bench-quick`): the figures mean nothing.", ""]
    out += [", ".join(f"{name} {value}" for name, value in machine.items()) + ".", ""]
    out += ["Medians; in brackets the quartiles. Whatever is compared ran interleaved, and ratios are medians of paired ratios.", ""]
    for name, result in results.items():
        out += [f"## {name}", "", "| what | measured | to reach | reached | beside |", "|---|---|---|---|---|"]
        for figure in result.figures:
            spread = f" ({_spread(figure)})" if figure.samples > 1 else ""
            target = "" if figure.target is None else _target(figure)
            cells = (figure.what, amount(figure.value, figure.unit) + spread, target, _VERDICTS[figure.met], figure.against)
            out.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        out += ["", *(f"- {note}" for note in result.notes), *([""] if result.notes else [])]
        out += [f"![{path.stem}](plots/{path.name})\n" for path in plots.get(name, ())]
    return "\n".join(out).rstrip() + "\n"


def _spread(figure: Figure) -> str:
    unit = "x" if figure.unit == "x" else ""
    return f"{amount(figure.low, unit).strip()} to {amount(figure.high, unit).strip()}"


def _target(figure: Figure) -> str:
    assert figure.target is not None
    return f"{'at most' if figure.better == 'less' else 'at least'} {amount(figure.target, figure.unit)}"


def draw(folder: Path, series: Iterable[Series]) -> dict[str, list[Path]]:
    """Group -> its plots, as SVG."""
    import matplotlib as mpl  # noqa: PLC0415 -- takes a second to import, and only this needs it

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "kmonitor"  # the same picture from the same figures
    from matplotlib import pyplot as plt  # noqa: PLC0415

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    made: dict[str, list[Path]] = {}
    together = itertools.groupby(sorted(series, key=lambda one: (one.group, one.plot)), key=lambda one: (one.group, one.plot))
    for (group, title), lines in together:
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        several = list(lines)
        for index, one in enumerate(several):
            if one.kind == "bars":
                width = 0.8 / len(several)
                at = [place + (index - (len(several) - 1) / 2) * width for place in range(len(one.x))]
                axes.bar(at, list(one.y), width, label=one.name)
                axes.set_xticks(range(len(one.x)), [str(name) for name in one.x])
            else:
                axes.plot([float(value) for value in one.x], list(one.y), marker="o", label=one.name)
        axes.set(title=title, xlabel=several[0].x_label, ylabel=several[0].y_label)
        if several[0].log_x:
            axes.set_xscale("log")
        if several[0].log_y:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
        axes.grid(visible=True, alpha=0.3)
        path = folder / f"{group}-{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}.svg"
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
        made.setdefault(group, []).append(path)
    return made
