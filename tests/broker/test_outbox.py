# SPDX-License-Identifier: Apache-2.0
"""A session that does not keep up: bounded, in order, nothing twice, and every loss counted."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmonitor.broker import outbox as outbox_module
from kmonitor.broker.block import Block
from kmonitor.broker.encode import Encoder
from kmonitor.broker.log.memory import MemoryLog
from kmonitor.broker.matching import Span
from kmonitor.broker.notices import gap, node_change
from kmonitor.broker.outbox import Outbox
from kmonitor.broker.router import Router
from kmonitor.broker.sessions import Session
from kmonitor.v1 import monitor_pb2
from kmonitor.wire.record import F_MATCH_PROCESS
from tests.broker.records import EXEC, EXIT, FORK, Rec, build, rec

OWN = F_MATCH_PROCESS


class Bench:
    """Log, router and one session, without a broker."""

    def __init__(self, log_bytes: int) -> None:
        self.lagging: set[Outbox] = set()
        self.log = MemoryLog(log_bytes)
        self.log.on_evict = self.evicting
        self.router = Router(lambda _: None, lambda _: None)
        self.session = Session(self.log, Encoder(), self.router, self.lagging)
        self.at = 0
        self.got: list[monitor_pb2.Notification] = []

    def evicting(self, until: int) -> None:
        for entry in self.log.read(self.log.oldest, 1 << 62):
            if entry.offset < until:
                for outbox in list(self.lagging):
                    outbox.evicting(entry)

    def span(self, process: tuple[int, int] | None, *, follow: bool = False, mask: int = 0x7F) -> Span:
        made = Span(self.session, "claim", "a", 1, mask, self.at, process, follow=follow)
        self.router.add(made)
        return made

    def feed(self, records: list[Rec]) -> None:
        block = Block("a", 1, self.at, build(records), 0)
        self.at = block.end
        self.log.append(block)
        self.router.route(block)
        block.trim()

    def drain(self, turns: int = 1 << 30) -> None:
        while len(self.session.outbox) and turns:
            self.got += [monitor_pb2.Notification.FromString(message) for message in self.session.outbox.take()]
            turns -= 1

    def events(self) -> list[int]:
        return [event.position for item in self.got for event in item.events.events]

    def missed(self) -> Counter[int]:
        found: Counter[int] = Counter()
        for item in self.got:
            for lost in item.gap.lost:
                found[lost.type] += lost.count
        return found


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "ROWS_LIMIT", 8_000)
    monkeypatch.setattr(outbox_module, "READ_SIZE", 6_000)


@pytest.mark.usefixtures("_small")
async def test_behind_and_live_again_without_a_seam() -> None:
    bench = Bench(1 << 20)
    bench.span(None)
    for number in range(40):
        bench.feed([rec(EXIT), rec(EXEC, filename=b"/bin/x")])
        if number == 20:
            bench.session.tell(node_change("a", monitor_pb2.NODE_STATE_UP, "b", "in the middle", [1]))
    assert bench.session.outbox.behind
    bench.drain(3)
    bench.feed([rec(FORK)])
    bench.drain()
    assert not bench.session.outbox.behind
    bench.feed([rec(FORK)])
    bench.drain()
    events = bench.events()
    assert events == sorted(set(events))
    assert len(events) == 82
    kinds = [item.WhichOneof("kind") for item in bench.got]
    before = sum(len(item.events.events) for item in bench.got[: kinds.index("node")])
    assert before == 42
    assert not bench.missed()


async def test_what_is_told_of_an_absence_while_it_is_gathered_keeps_its_place() -> None:
    """What came before that, and not only what is read first, would else be within what the gap leads past."""
    bench = Bench(1 << 20)
    bench.span(None)
    bench.session.begun = True
    outbox = bench.session.outbox
    outbox.gather(0, {}, 0)
    bench.feed([rec(EXIT)])
    positions, times = (0, bench.at), (0, 0)
    bench.session.tell(gap("a", monitor_pb2.GAP_REASON_LOG, 1, positions=positions, times=times, counts={}), absent="a")
    bench.session.progress([("a", 1, bench.at, 0)])
    bench.feed([rec(FORK)])
    bench.feed([rec(EXEC)])
    outbox.gathered(0)
    bench.drain()
    kinds = [item.WhichOneof("kind") for item in bench.got]
    assert kinds == ["events", "progress", "gap", "events"]
    assert [len(item.events.events) for item in bench.got] == [1, 0, 0, 2]
    assert not bench.got[1].progress.nodes, "of this one a gap is still to be told"


@pytest.mark.usefixtures("_small")
async def test_a_session_that_never_reads_is_bounded_and_told_exactly() -> None:
    bench = Bench(30_000)
    bench.span((100, 1000))
    sent: Counter[int] = Counter()
    for number in range(400):
        kind = (FORK, EXEC)[number % 2]
        bench.feed([rec(kind, 100, flags=OWN), rec(EXIT, 101, flags=OWN)])
        sent[kind] += 1
    assert len(bench.session.outbox) < 20
    bench.drain()
    told = Counter(event.type for item in bench.got for event in item.events.events)
    missed = bench.missed()
    assert sum(missed.values()) > 300
    assert told + missed == sent
    gaps = [item.gap for item in bench.got if item.WhichOneof("kind") == "gap"]
    assert [gap.reason for gap in gaps] == [monitor_pb2.GAP_REASON_SUBSCRIBER]
    events = bench.events()
    assert not [position for position in events if gaps[0].from_position <= position < gaps[0].to_position]
    order = [item.WhichOneof("kind") for item in bench.got]
    after = [event.position for item in bench.got[order.index("gap") :] for event in item.events.events]
    assert min(after) >= gaps[0].to_position


@pytest.mark.usefixtures("_small")
async def test_spans_that_ended_are_kept_until_passed_and_then_dropped() -> None:
    bench = Bench(1 << 20)
    bench.span((100, 1000), follow=True)
    for number in range(200, 300):
        bench.feed([rec(FORK, 100, flags=OWN, child_tgid=number, child_start_boottime_ns=number * 10)])
        bench.feed([rec(EXIT, number, flags=OWN)])
        bench.router.retire("a", 1 << 62, bench.at, bench.log.end)
    bench.router.retire("a", 1 << 62, bench.at, bench.log.end)
    assert bench.session.outbox.behind
    bench.drain()
    assert len(bench.events()) == 200
    bench.router.retire("a", 1 << 62, bench.at, bench.log.end)
    bench.session.outbox.prune(bench.log.end)
    assert len(bench.session.matcher.spans("a")) == 1


@given(st.lists(st.tuples(st.sampled_from(["feed", "feed", "feed", "take", "tell"]), st.integers(1, 12)), max_size=80), st.integers(5, 60))
@settings(max_examples=60)
def test_told_plus_missed_is_all(steps: list[tuple[str, int]], log_blocks: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outbox_module, "ROWS_LIMIT", 5_000)
        patch.setattr(outbox_module, "READ_SIZE", 5_000)
        bench = Bench(log_blocks * 2_000)
        bench.span(None, mask=EXIT | EXEC)
        sent: Counter[int] = Counter()
        told_at: list[int] = []
        total = 0
        for step, count in steps:
            if step == "feed":
                bench.feed([rec((EXIT, EXEC, FORK)[at % 3]) for at in range(count)])
                for at in range(count):
                    if at % 3 != 2:
                        sent[(EXIT, EXEC)[at % 3]] += 1
                        total += 1
            elif step == "take":
                bench.drain(1)
            else:
                told_at.append(total)
                bench.session.tell(node_change("a", monitor_pb2.NODE_STATE_UP, "", str(total), []))
        bench.drain()
        told = Counter(event.type for item in bench.got for event in item.events.events)
        assert told + bench.missed() == sent
        events = bench.events()
        assert events == sorted(set(events))
        passed = 0
        for item in bench.got:
            passed += len(item.events.events) + sum(lost.count for lost in item.gap.lost)
            if item.WhichOneof("kind") == "node":
                assert passed == int(item.node.reason)
        assert not bench.lagging
