# SPDX-License-Identifier: Apache-2.0
"""The vectorised encoder against a decoder that goes record by record."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmonitor.broker.block import Block
from kmonitor.broker.elements import Encoded
from kmonitor.broker.encode import MAX_MESSAGE, Encoder
from kmonitor.broker.encode_columns import encode_columns
from kmonitor.broker.encode_few import encode_few
from kmonitor.broker.encode_usual import encode
from kmonitor.v1 import events_pb2, monitor_pb2
from tests.broker.records import EXEC, EXIT, Rec, build, naive_event, positions, rec

BOOT = "c0ffee00-0000-4000-8000-000000000000"
SHIFT = 1_700_000_000_000_000_000

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**62)
comm = st.one_of(st.binary(max_size=16), st.sampled_from([b"sh", b"", b"postgres", "dämon".encode(), b"\xff\xfe", b"a\0b"]))

ascii_comm = st.text(st.characters(min_codepoint=1, max_codepoint=127), max_size=16).map(str.encode)


@st.composite
def record(draw: st.DrawFn, *, usual: bool = False) -> Rec:
    """`usual`: one that encode_usual encodes by itself."""
    more: dict[str, Any]
    kind = draw(st.sampled_from([1, 4, 8, 32, 64])) if usual else 1 << draw(st.integers(0, 6))
    fields = {name: draw(u32) for name in ("tgid", "tid", "ppid", "uid", "gid")}
    if draw(st.booleans()):
        fields["uid"] = fields["gid"] = 0
    wide = {name: draw(u64) for name in ("boottime_ns", "start_boottime_ns", "cgroup_id")}
    if kind in {1, 8}:
        more = {"child_start_boottime_ns": draw(u64), "child_tgid": draw(u32), "child_tid": draw(u32)}
    else:
        more = {"killer_tgid": draw(u32), "killer_uid": draw(u32), "killer_comm": draw(comm)}
    exec_ = kind == EXEC
    return rec(
        kind,
        flags=draw(st.sampled_from([0x10, 0x20, 0x70])) if usual else draw(st.integers(0, 0xFF)),
        status=draw(st.integers(0, 0xFF)) << 8 if usual else draw(st.integers(0, 0xFFFF)),
        comm=draw(ascii_comm) if usual else draw(comm),
        filename=draw(st.binary(max_size=300)).replace(b"\0", b"/") if exec_ else b"",
        args=tuple(arg.replace(b"\0", b"") for arg in draw(st.lists(st.binary(max_size=200), max_size=6))) if exec_ else (),
        **fields,
        **wide,
        **more,
    )


def decode(messages: list[bytes]) -> list[events_pb2.Event]:
    out = []
    for message in messages:
        parsed = monitor_pb2.Notification.FromString(message)
        assert (parsed.events.node, parsed.events.epoch, parsed.events.boot_id) == ("node-a", 0xFEED, BOOT)
        out += list(parsed.events.events)
    return out


def block_of(records: list[Rec], position: int = 0) -> Block:
    return Block("node-a", 0xFEED, position, build(records), SHIFT, BOOT)


def mostly_usual() -> st.SearchStrategy[list[Rec]]:
    """One in 16 at most is not."""
    usual = st.lists(record(usual=True), min_size=16, max_size=40)
    return st.tuples(usual, st.lists(st.tuples(st.integers(0, 40), record()), max_size=1)).map(
        lambda drawn: [*drawn[0][: drawn[1][0][0]], drawn[1][0][1], *drawn[0][drawn[1][0][0] :]] if drawn[1] else drawn[0]
    )


@given(st.one_of(st.lists(record(), min_size=1, max_size=40), mostly_usual()), st.data())
def test_same_as_naive(records: list[Rec], data: st.DataObject) -> None:
    base = 128 * data.draw(st.integers(0, 2**40))
    block = block_of(records, base)
    expected = [naive_event(build([item]), at, SHIFT) for item, at in zip(records, positions(records, base), strict=True)]
    everything = np.arange(len(records))
    encoder = Encoder()
    assert decode(encoder.notifications([(block, everything)])) == expected
    encoder.drop(block)
    for encoded in (encode_few(block, everything.tolist()), encode_columns(block, None), encode(block, None)):
        pieces = zip(encoded.offsets[:-1].tolist(), encoded.offsets[1:].tolist(), strict=True)
        elements = [events_pb2.EventBatch.FromString(encoded.data[begin:end]).events[0] for begin, end in pieces]
        assert elements == expected
    picked = sorted(data.draw(st.sets(st.sampled_from(range(len(records))), min_size=1)))
    for _ in range(2):
        assert decode(encoder.notifications([(block, np.array(picked))])) == [expected[at] for at in picked]


@pytest.mark.parametrize("boot_id", ["", "b", "é" * 70], ids=["none", "short", "long"])
def test_the_bytes_are_those_of_protobuf(boot_id: str) -> None:
    """The boot id is once in each message, whichever rows are in it."""
    records = [rec(EXIT, 100 + number, status=number) for number in range(20)]
    data = build(records)
    batch = events_pb2.EventBatch(node="node-a", epoch=0xFEED, boot_id=boot_id)
    for picked in (np.arange(20), np.array([3]), np.array([0, 19])):
        del batch.events[:]
        batch.events.extend(naive_event(build([records[row]]), positions(records, 128)[row], SHIFT) for row in picked.tolist())
        expected = monitor_pb2.Notification(events=batch).SerializeToString(deterministic=True)
        assert Encoder().notifications([(Block("node-a", 0xFEED, 128, data, SHIFT, boot_id), picked)]) == [expected]


def test_splits_at_the_limit_and_joins_blocks() -> None:
    long = rec(EXEC, filename=b"/bin/x", args=tuple(b"a" * 20_000 for _ in range(3)))
    blocks = [block_of([long] * 20, 0), block_of([long] * 20, 1 << 30)]
    messages = Encoder().notifications([(block, np.arange(20)) for block in blocks])
    assert len(decode(messages)) == 40
    assert len(messages) == 4
    assert max(map(len, messages)) <= MAX_MESSAGE + 100


def test_the_cache_is_bounded_and_counts() -> None:
    encoder = Encoder(cache_bytes=50_000)
    blocks = [block_of([rec(EXIT, status=9)] * 100, at << 20) for at in range(20)]
    for block in blocks:
        encoder.notifications([(block, np.arange(100))])
    kept = [block.encoded for block in blocks if isinstance(block.encoded, Encoded)]
    assert 1 <= len(kept) < 20
    assert sum(item.size for item in kept) == encoder.cached_bytes <= 50_000


def test_encodes_once_for_many_monitors() -> None:
    encoder = Encoder()
    block = block_of([rec(EXIT)] * 100)
    encoder.notifications([(block, np.arange(100))])
    first = block.encoded
    encoder.notifications([(block, np.arange(50))])
    encoder.notifications([(block, np.arange(1))])
    assert block.encoded is first
    assert block.partly_encoded_us == 0
