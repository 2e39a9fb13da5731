# SPDX-License-Identifier: Apache-2.0
"""Stretches of a real ring, decoded as they were when they were captured: tests/wire/golden/README.md."""

from __future__ import annotations

from typing import Any

import pytest

from kmonitor.broker.encode_few import encode_few
from kmonitor.broker.encode_usual import encode
from kmonitor.wire.masks import TYPE_NAMES
from kmonitor.wire.record import RING_DISCARD, SLOT_SIZE, check_records, record_starts, slots_of
from tests.wire.golden.stretches import HERE, decode, decode_with, load, names

SIZE_LIMIT = 60_000


@pytest.mark.parametrize("name", names())
def test_decoded_as_before(name: str) -> None:
    stretch, expected = load(name)
    assert decode(stretch) == expected
    assert decode_with(stretch, lambda block: encode(block, None)) == expected
    assert decode_with(stretch, lambda block: encode_few(block, range(len(block)))) == expected


@pytest.mark.parametrize("name", names())
def test_all_but_the_first_carry_it_as_their_root(name: str) -> None:
    slots = slots_of(load(name)[0].data)
    rows = slots[check_records(slots)]
    first = rows["tgid"] == rows["tgid"][0]
    carried = rows[["root_tgid", "root_start_boottime_ns"]]
    assert {row.item() for row in carried[first]} == {(0, 0)}
    assert {row.item() for row in carried[~first]} <= {rows[0][["tgid", "start_boottime_ns"]].item()}
    assert bool((rows["root_armed"] != 0).any()) == bool((~first).any())


def test_there_is_one_of_each() -> None:
    """So that renewing them cannot leave anything out."""
    assert sum(path.stat().st_size for path in HERE.iterdir() if path.is_file()) < SIZE_LIMIT
    lines: list[dict[str, Any]] = []
    lengths: set[int] = set()
    discarded = 0
    for name in names():
        stretch, events = load(name)
        lines += events
        slots = slots_of(stretch.data)
        starts = record_starts(slots)
        kept = check_records(slots)
        discarded += len(starts) - len(kept)
        assert int((slots["ring_length"][starts] & RING_DISCARD != 0).sum()) == len(starts) - len(kept)
        execs = kept[slots["type"][kept] == 0x20]
        lengths |= {(int(length) + 8) // SLOT_SIZE - 1 for length in slots["ring_length"][execs]}
    assert {line["type"] for line in lines} == set(TYPE_NAMES.values())
    assert lengths == {1, 5, 31}, "slots of tail"
    assert discarded == 1
    ends = [line for line in lines if line["type"] in ("PROCESS_EXIT", "PROCESS_ABORT")]
    assert {bool(line["oom_killed"]) for line in ends} == {False, True}
    killers = [line["killed_by"]["pid"] for line in ends if line["killed_by"]]
    assert 0 in killers
    assert any(killers)
    assert {line["exit_code"] for line in ends} >= {0, 255, None}
    execs = [line for line in lines if line["type"] == "PROCESS_EXEC"]
    assert {line["args_truncated"] for line in execs} == {False, True}
    assert any("\ufffd" in argument for line in execs for argument in line["args"]), "bytes that are not UTF-8"
