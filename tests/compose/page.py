# SPDX-License-Identifier: Apache-2.0
"""Reads the tour out of docs/lab.md: what it says to type, and what it says one sees.

A code block that begins with `$ ` is one command and the lines that it prints; any other is lines of the first terminal, that of the last
`up`. What is shown must come, in this order; other lines may come between. Times, durations, sizes and versions may be others; … is
anything. Process ids may be others, but one that is shown twice below the same heading must be the same process twice.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "lab.md"

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# Where a pid stands on the page: behind the word of an event, an arrow, "pid", or in brackets behind a name.
_PID = r"(?P<pid>(?<=FORK )\d+|(?<=EXEC )\d+|(?<=EXIT )\d+|(?<=ABORT )\d+|(?<=→ )\d+|(?<=pid )\d+|(?<=\()\d+(?=\)))"
_VARIES = re.compile(
    _PID
    + r"|(?P<any>…)"
    + r"|(?P<time>\d\d:\d\d:\d\d\.\d{3})"
    + r"|(?P<lived>(?:(?<=after )|(?<=for )|(?<=\())[\d.]+ (?:us|ms|s)\b|\d+m\d\ds)"
    + r"|(?P<size>[\d.]+ (?:[KM]i)?B\b)"
    + r"|(?P<version>(?<= )\d+(?:\.\d+)+(?= ))"
)
_FOR = {
    "any": ".*",
    "time": r"\d\d:\d\d:\d\d\.\d{3}",
    "lived": r"(?:[\d.]+ (?:us|ms|s)|\d+m\d\ds)",
    "size": r"[\d.]+ (?:[KMG]i)?B",
    "version": r"\d\S*",
}


@dataclasses.dataclass
class Step:
    """A command, and what comes of it: lines that it prints itself, and lines of the monitor."""

    command: str
    prints: list[str] = dataclasses.field(default_factory=list)
    seen: list[list[str]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Scene:
    """What is below one heading."""

    heading: str
    steps: list[Step] = dataclasses.field(default_factory=list)


def tours(page: Path = PAGE) -> list[list[Scene]]:
    """From each `up` to the next: what belongs to one first terminal."""
    found: list[list[Scene]] = []
    for scene in scenes(page):
        if " up " in scene.steps[0].command:
            found.append([])
        found[-1].append(scene)
    return found


def scenes(page: Path = PAGE) -> list[Scene]:
    """All headings that have commands, in the page's order. ValueError if something is seen before anything was done."""
    found: list[Scene] = []
    fresh = True  # the next indented line begins a block
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            found.append(Scene(line.lstrip("# ")))
        if not line.startswith("    "):
            fresh = True
            continue
        text = line[4:]
        steps = found[-1].steps
        if text.startswith("$ "):
            steps.append(Step(text[2:]))
        elif not steps:
            raise ValueError(f"{page.name}, {found[-1].heading}: nothing was typed yet, and this is to be seen: {text}")
        elif fresh:
            steps[-1].seen.append([text])
        elif steps[-1].seen:
            steps[-1].seen[-1].append(text)
        else:
            steps[-1].prints.append(text)
        fresh = False
    return [scene for scene in found if scene.steps]


def plain(line: str) -> str:
    """A line as the page has it: no colours, one space where there are many, no rule behind a notice."""
    return re.sub(r"\s+", " ", ANSI.sub("", line)).rstrip("─ ").strip()


@dataclasses.dataclass
class Pattern:
    """A line of the page. `pids` are those of the page, in the order in which `regex` has groups for them."""

    regex: re.Pattern[str]
    pids: list[str]

    @classmethod
    def of(cls, shown: str) -> Pattern:
        """From a line of the page."""
        text, at, pids = plain(shown), 0, []
        parts = []
        for match in _VARIES.finditer(text):
            parts.append(re.escape(text[at : match.start()]))
            at = match.end()
            kind = match.lastgroup or ""
            if kind == "pid":
                pids.append(match[0])
            parts.append(_FOR.get(kind, r"(\d+)"))
        parts.append(re.escape(text[at:]))
        return cls(re.compile("".join(parts)), pids)

    def match(self, line: str, known: dict[str, str]) -> dict[str, str] | None:
        """What the page's pids are really, if the line is this one and none of `known` is another."""
        found = self.regex.fullmatch(line)
        if found is None:
            return None
        bound = dict(known)
        for shown, real in zip(self.pids, found.groups(), strict=True):
            if bound.setdefault(shown, real) != real:
                return None
        return bound


def match(shown: list[str], lines: list[str], known: dict[str, str]) -> dict[str, str] | None:
    """Find the lines of the page among `lines`, in this order. The first way that fits gives what the pids are."""
    if not shown:
        return known
    pattern = Pattern.of(shown[0])
    for at, line in enumerate(lines):
        bound = pattern.match(line, known)
        if bound is not None:
            rest = match(shown[1:], lines[at + 1 :], bound)
            if rest is not None:
                return rest
    return None
