# SPDX-License-Identifier: Apache-2.0
"""The books themselves: what a gap without numbers excuses, and what it does not."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from tests.robustness.account import Account, Truth

FORKS = Truth(Counter({"PROCESS_FORK": 4}), Counter())


def events(*positions: int) -> dict[str, Any]:
    rows = [[position, "PROCESS_FORK", 7, None, False, 0, 8] for position in positions]
    return {"kind": "events", "node": "n", "epoch": 1, "at": 0, "rows": rows}


def gap(first: int, end: int, **lost: int) -> dict[str, Any]:
    counts = [{"type": kind, "count": count} for kind, count in lost.items()]
    return {"kind": "gap", "node": "n", "epoch": 1, "from_position": first, "to_position": end, "lost": counts}


def account(folder: Path, name: str, *lines: dict[str, Any]) -> Account:
    journal = folder / name
    journal.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return Account(journal).read()


def test_a_gap_without_numbers_excuses_what_lies_in_it(tmp_path: Path) -> None:
    """And nothing else."""
    whole = account(tmp_path, "whole", events(0, 64, 128, 192))
    assert whole.differences({"n": FORKS}, whole=True) == []
    within = account(tmp_path, "within", events(0), gap(64, 192), events(192))
    assert within.differences({"n": FORKS}, whole=False) == []
    assert within.uncovered(whole) == []
    beside = account(tmp_path, "beside", events(0), gap(64, 128), events(192))
    assert beside.differences({"n": FORKS}, whole=False) == []
    assert len(beside.uncovered(whole)) == 1


def test_without_one_the_numbers_add_up(tmp_path: Path) -> None:
    """Neither fewer nor more."""
    assert account(tmp_path, "even", events(0), gap(64, 192, PROCESS_FORK=2), events(192)).differences({"n": FORKS}, whole=False) == []
    for name, lost in (("few", 1), ("many", 3)):
        books = account(tmp_path, name, events(0), gap(64, 192, PROCESS_FORK=lost), events(192))
        assert len(books.differences({"n": FORKS}, whole=False)) == 1
    too_many = account(tmp_path, "both", events(0, 64, 128, 192), gap(192, 256), gap(256, 320, PROCESS_FORK=1))
    assert len(too_many.differences({"n": FORKS}, whole=False)) == 1
