# SPDX-License-Identifier: Apache-2.0
"""What a monitor was told, over all its lives, held against what was done: delivered + in gaps = generated, and nothing twice.

A gap need not have numbers (reason LOG or AGENT, guarantees.md). Of a monitor that was told one the numbers cannot add up; `uncovered`
holds it against another one, which was told all, event by event.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Line = dict[str, Any]
Counts = Counter[str]
End = tuple[int, int | None]
"""pid, and exit code or negative signal number; None if it is not known."""


@dataclass
class Truth:
    """What was done on one node, by event type, and how its processes ended. Ids may come again: the kernel gives them out anew."""

    counts: Counts = field(default_factory=Counter)
    ends: Counter[End] = field(default_factory=Counter)

    def __add__(self, other: Truth) -> Truth:
        return Truth(self.counts + other.counts, self.ends + other.ends)

    @property
    def total(self) -> int:
        """Events."""
        return self.counts.total()

    def of_types(self, types: set[str]) -> Truth:
        """What a monitor of these types has to be told."""
        counts = Counter({kind: count for kind, count in self.counts.items() if kind in types})
        return Truth(counts, self.ends if "PROCESS_EXIT" in types else Counter())


PROCESS = {"PROCESS_FORK", "PROCESS_EXEC", "PROCESS_ABORT", "PROCESS_EXIT"}
"""The types of `--events process`."""


def ended(pid: int, code: int) -> Truth:
    """That one process ended, with an exit code or a negative signal number."""
    counts = Counter({"PROCESS_EXIT": 1}) + Counter({"PROCESS_ABORT": 1} if code < 0 else {})
    return Truth(counts, Counter({(pid, code): 1}))


class Account:
    """Reads a listener's journal (tests/robustness/listen.py), as far as it is written whenever it is asked."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._offset = 0
        self.notices: list[Line] = []
        """All of them, without progress."""
        self.gaps: list[Line] = []
        self.told: dict[str, Counts] = {}
        """Node -> events by type, without those that are inferred: they were lost before, and gaps may have counted them."""
        self.inferred: dict[str, Counter[int]] = {}
        """Node -> pids of the ends that were found, not seen."""
        self.ends: dict[str, Counter[End]] = {}
        self.delays_ns: list[int] = []
        """From each event to its line in the journal."""
        self.wrong: list[str] = []
        """What cannot be, whatever was done: told twice, or out of order."""
        self._seen: dict[tuple[str, int], set[object]] = {}
        self._last: dict[tuple[str, int], int] = {}
        self.duplicates = 0

    def read(self) -> Account:
        """Take in what has come since."""
        if self._journal.exists():
            with self._journal.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
            # The last line may be half written.
            whole = content[: content.rfind(b"\n") + 1]
            self._offset += len(whole)
            for text in whole.splitlines():
                self._take(json.loads(text))
        return self

    def _take(self, line: Line) -> None:
        if line["kind"] == "events":
            self._take_events(line)
        elif line["kind"] == "gap":
            self.gaps.append(line)
            self.notices.append(line)
        elif line["kind"] != "progress":
            self.notices.append(line)

    def _take_events(self, line: Line) -> None:
        node, place, at = line["node"], (line["node"], line["epoch"]), line["at"]
        told = self.told.setdefault(node, Counter())
        ends = self.ends.setdefault(node, Counter())
        seen = self._seen.setdefault(place, set())
        last = self._last.get(place, -1)
        for position, kind, pid, code, inferred, time_ns, _ in line["rows"]:
            # An end that was found has no place of its own in a ring that is no more.
            key = (position, pid) if inferred else position
            if key in seen:
                self.duplicates += 1
                self.wrong.append(f"twice: {kind} of {pid} on {node}, position {position}")
                continue
            if position < last:
                self.wrong.append(f"out of order: {kind} of {pid} on {node}, position {position} behind {last}")
            seen.add(key)
            last = max(last, position)
            if kind == "PROCESS_EXIT":
                ends[pid, code] += 1
            if inferred:
                self.inferred.setdefault(node, Counter())[pid] += 1
                continue
            told[kind] += 1
            self.delays_ns.append(at - time_ns)
        self._last[place] = last

    @property
    def delivered(self) -> int:
        """Events."""
        return sum(counts.total() for counts in self.told.values())

    @property
    def in_gaps(self) -> int:
        """Events that gaps count."""
        return sum(each["count"] for gap in self.gaps for each in gap["lost"])

    def lost(self, node: str) -> Counts:
        """What gaps of a node count, by type."""
        return sum((Counter({each["type"]: each["count"]}) for gap in self.gaps if gap["node"] == node for each in gap["lost"]), Counts())

    @property
    def unnumbered(self) -> list[Line]:
        """The gaps that do not say how much is missing."""
        return [gap for gap in self.gaps if not gap["lost"]]

    def uncovered(self, other: Account) -> list[str]:
        """What another monitor of the same was told, and this one was not, though no gap says that it is missing there."""
        wrong: list[str] = []
        for (node, epoch), theirs in other._seen.items():
            gaps = [(gap["from_position"], gap["to_position"]) for gap in self.gaps if (gap["node"], gap["epoch"]) == (node, epoch)]
            positions = sorted(key for key in theirs - self._seen.get((node, epoch), set()) if isinstance(key, int))
            missing = [at for at in positions if not any(first <= at < end for first, end in gaps)]
            if missing:
                wrong.append(f"{node}: {len(missing)} events are missing, and are in no gap: of epoch {epoch}, at {missing[:5]}")
        return wrong

    def of_kind(self, kind: str, **fields: object) -> list[Line]:
        """Notices, in order."""
        return [line for line in self.notices if line["kind"] == kind and all(line.get(name) == value for name, value in fields.items())]

    def differences(self, truths: dict[str, Truth], *, whole: bool) -> list[str]:
        """What is wrong, one line each. `truths` by node; `whole`: there may be no gap at all. Of a node with a gap that has no numbers
        no more may be told and counted than was; see `uncovered`."""
        wrong = list(self.wrong)
        if whole:
            wrong += [f"a gap: {gap}" for gap in self.gaps]
        uncounted = {gap["node"] for gap in self.unnumbered}
        for node in sorted(truths.keys() | self.told.keys()):
            truth, told, lost = truths.get(node, Truth()), self.told.get(node, Counts()), self.lost(node)
            for kind in sorted(truth.counts.keys() | told.keys() | lost.keys(), key=str):
                all_told = told[kind] + lost[kind]
                if all_told > truth.counts[kind] or (all_told < truth.counts[kind] and node not in uncounted):
                    wrong.append(f"{node}: {kind}: {told[kind]} told, {lost[kind]} in gaps, {truth.counts[kind]} were")
            wrong += self._wrong_ends(node, truth, lost)
        return wrong

    def _wrong_ends(self, node: str, truth: Truth, lost: Counts) -> list[str]:
        if not truth.counts["PROCESS_EXIT"]:
            return []
        ends = self.ends.get(node, Counter())
        known = Counter({end: count for end, count in ends.items() if end[1] is not None})
        wrong = [f"{node}: told of the end {end}, which never was" for end in known - truth.ends]
        missing = truth.ends - known
        if missing.total() != lost["PROCESS_EXIT"] and not any(gap["node"] == node for gap in self.unnumbered):
            wrong.append(f"{node}: {missing.total()} ends are missing, gaps count {lost['PROCESS_EXIT']}: {list(missing)[:5]}")
        # Of an inferred end the status is not known: any of that pid is meant.
        for pid, count in self.inferred.get(node, Counter()).items():
            if sum(number for (lost_pid, _), number in missing.items() if lost_pid == pid) < count:
                wrong.append(f"{node}: the end of {pid} was inferred, and there was none, or it was told")
        return wrong

    def summary(self, generated: int) -> str:
        """One line for people."""
        found = sum(counts.total() for counts in self.inferred.values())
        of_them = f", of which {found} ends were found" if found else ""
        return f"generated {generated}, delivered {self.delivered}, duplicated {self.duplicates}, in gaps {self.in_gaps}{of_them}"
