# SPDX-License-Identifier: Apache-2.0
"""Matcher and filters against a model that goes record by record and registration by registration."""

from __future__ import annotations

import fnmatch
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kmonitor.broker.block import Block
from kmonitor.broker.filters import Filter
from kmonitor.broker.matching import CgroupTree, Matcher, Span
from kmonitor.wire.record import F_INFERRED, F_MATCH_CGROUP, F_MATCH_NODE, F_MATCH_PROCESS
from tests.broker.records import Rec, build, positions, rec

ENDS = 0x02 | 0x04 | 0x10 | 0x40
TREE = {30: [20, 10], 20: [10], 10: []}

records = st.lists(
    st.builds(
        lambda bit, tgid, start, flags, comm, uid, status, cgroup: rec(
            1 << bit, tgid, start_boottime_ns=start, flags=flags, comm=comm, uid=uid, status=status, match_cgroup_id=cgroup
        ),
        st.integers(0, 6),
        st.integers(1, 4),
        st.integers(1, 2),
        st.sampled_from([0, F_MATCH_NODE, F_MATCH_PROCESS, F_MATCH_CGROUP, F_MATCH_NODE | F_MATCH_PROCESS, F_MATCH_PROCESS | F_INFERRED]),
        st.sampled_from([b"sh", b"bash", b"\xff\xfe", b""]),
        st.integers(0, 2),
        st.sampled_from([0, 9, 256]),
        st.sampled_from([0, 10, 20, 30]),
    ),
    max_size=30,
)
filters = st.builds(
    Filter,
    st.sampled_from([(), ("*sh",), ("sh", "x"), ("\ufffd*",)]),
    st.sampled_from([(), (0,), (1, 2)]),
    st.booleans(),
)
spans = st.lists(
    st.fixed_dictionaries(
        {
            "target": st.one_of(st.none(), st.tuples(st.integers(1, 4), st.integers(1, 2)), st.sampled_from([10, 20, 30])),
            "mask": st.integers(1, 0x7F),
            "first": st.integers(0, 30).map(lambda slot: slot * 128),
            "length": st.one_of(st.none(), st.integers(0, 20).map(lambda slot: slot * 128)),
            "epoch": st.sampled_from([1, 1, 1, 2]),
            "filter": filters,
        }
    ),
    max_size=6,
)


def wanted(item: Rec, position: int, span: dict[str, Any]) -> bool:
    fields = item.fields
    target = span["target"]
    if span["epoch"] != 1 or position < span["first"] or not fields["type"] & span["mask"]:
        return False
    if span["length"] is not None and position >= span["first"] + span["length"]:
        return False
    if target is None and not fields["flags"] & F_MATCH_NODE:
        return False
    if isinstance(target, tuple) and (not fields["flags"] & F_MATCH_PROCESS or (fields["tgid"], fields["start_boottime_ns"]) != target):
        return False
    if isinstance(target, int):
        nearest = fields["match_cgroup_id"]
        if not fields["flags"] & F_MATCH_CGROUP or target not in [nearest, *TREE.get(nearest, [])]:
            return False
    chosen: Filter = span["filter"]
    text = fields["comm"].decode("utf-8", "replace")
    if chosen.comms and not any(fnmatch.fnmatchcase(text, glob) for glob in chosen.comms):
        return False
    if chosen.uids and fields["uid"] not in chosen.uids:
        return False
    ended_well = fields["type"] & ENDS and fields["status"] == 0 and not fields["flags"] & F_INFERRED
    return not (chosen.failures_only and ended_well)


@given(records, spans)
def test_same_as_the_model(items: list[Rec], held: list[dict[str, Any]]) -> None:
    tree = CgroupTree()
    for group, above in TREE.items():
        tree.above.update({(epoch, group): tuple(above) for epoch in (1, 2)})
    matcher = Matcher()
    for index, span in enumerate(held):
        target = span["target"]
        made = Span(
            None, index, "a", span["epoch"], span["mask"], span["first"],
            process=target if isinstance(target, tuple) else None,
            cgroup_id=target if isinstance(target, int) else None,
            filter=span["filter"],
        )  # fmt: skip
        matcher.add(made)
        if span["length"] is not None:
            made.end = span["first"] + span["length"]
            matcher.ended(made, 5)
    block = Block("a", 1, 0, build(items), 0)
    where = positions(items)
    expected = [row for row, item in enumerate(items) if any(wanted(item, where[row], span) for span in held)]
    assert matcher.select(block, tree).tolist() == expected
    matcher.prune(4)
    block.trim()
    assert matcher.select(block, tree).tolist() == expected
    matcher.prune(5)
    open_ones = [span for span in held if span["length"] is None]
    expected = [row for row, item in enumerate(items) if any(wanted(item, where[row], span) for span in open_ones)]
    assert matcher.select(block, tree).tolist() == expected


@given(records, filters)
def test_those_who_want_the_same_of_a_node_share_it(items: list[Rec], wanted_of_it: Filter) -> None:
    """Rows wait with each monitor that does not read: hundreds of them must not have arrays of their own."""
    block = Block("a", 1, 4096, build(items), 0)
    found = []
    for first in (0, 128):
        matcher = Matcher()
        matcher.add(Span(None, 0, "a", 1, 0x7F, first, filter=wanted_of_it))
        found.append(matcher.select(block, CgroupTree()))
    assert found[0] is found[1] or not len(found[0])
