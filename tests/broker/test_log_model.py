# SPDX-License-Identifier: Apache-2.0
"""Both forms of the log against a model that keeps everything and looks through all of it."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from kmonitor.broker.block import Block
from kmonitor.broker.log import Entry, sqlite
from kmonitor.broker.mark import MarkKind
from tests.broker.logs import LIMIT_S, block, content, execs, make, mark

T = TypeVar("T")
NODES = st.sampled_from(["a", "b", "cäsar"])
STARTS = st.sampled_from([0, 0, 4096, (1 << 63) - 640, (1 << 64) - (1 << 20)])
"""Of an epoch's positions."""
BYTES = {"memory": 60_000, "sqlite": 160_000}


class LogMachine(RuleBasedStateMachine):
    """`form` is that of the subclass."""

    form: str

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folders: list[Path] = []
        self.entries: list[Entry] = []
        """All that was ever put in."""
        self.oldest = 0
        self.at: dict[tuple[str, int], int] = {}
        """(node, epoch) -> where its next block begins."""
        self.epoch: dict[str, int] = {}
        self.known: dict[str, list[int]] = {}
        self.values: dict[tuple[str, str], bytes] = {}
        self.open(Path(tempfile.mkdtemp()))
        self.log_id = self.log.log_id

    def open(self, folder: Path) -> None:
        self.folders.append(folder)

        async def inside() -> None:
            self.log = make(self.form, folder, BYTES[self.form])
            self.log.on_evict = self.evict
            self.log.on_trouble = self.trouble

        self.run(inside())

    def run(self, what: Awaitable[T]) -> T:
        async def limited() -> T:
            async with asyncio.timeout(LIMIT_S):
                return await what

        return self.loop.run_until_complete(limited())

    def trouble(self, line: str) -> None:
        raise AssertionError(line)

    def evict(self, until: int) -> None:
        assert self.oldest < until <= self.entries[-1].offset
        found = [content(entry) for entry in self.log.read(0, 1 << 40) if entry.offset < until]
        assert found == [content(entry) for entry in self.here() if entry.offset < until]
        self.oldest = until

    def here(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.offset >= self.oldest]

    def add(self, entry: Entry) -> None:
        end = self.log.end
        entry.offset = end
        self.entries.append(entry)
        known = self.known.setdefault(entry.node, [])
        if entry.epoch not in known:
            known.append(entry.epoch)
        assert self.log.append(entry) == end == entry.offset
        assert self.log.end == end + 1
        self.at[entry.node, entry.epoch] = max(entry.end, self.at.get((entry.node, entry.epoch), 0))

    def place(self, node: str) -> tuple[int, int]:
        """(epoch, position) of a node's next block."""
        epoch = self.epoch.setdefault(node, 1)
        return epoch, self.at.setdefault((node, epoch), 0)

    @initialize()
    def start(self) -> None:
        assert (self.log.oldest, self.log.end, self.log.committed) == (0, 0, 0)
        assert self.log.read(0, 1000) == []

    @rule(node=NODES, records=st.sampled_from([1, 3, 40, 150, 300]), skipped=st.sampled_from([0, 0, 0, 1280]))
    def append_block(self, node: str, records: int, skipped: int) -> None:
        epoch, position = self.place(node)
        if position + skipped + 128 * records < 1 << 64:
            self.add(block(node, position + skipped, records, epoch=epoch))

    @rule(node=NODES, count=st.integers(1, 20))
    def append_execs(self, node: str, count: int) -> None:
        epoch, position = self.place(node)
        if position + 1000 * count < 1 << 64:
            self.add(execs(node, position, count, epoch=epoch))

    @rule(node=NODES, kind=st.sampled_from([MarkKind.LOST, MarkKind.HOLE, MarkKind.UNLOGGED]), over=st.sampled_from([0, 128, 5120]))
    def append_mark(self, node: str, kind: MarkKind, over: int) -> None:
        epoch, position = self.place(node)
        if position + over < 1 << 64:
            self.add(mark(kind, node, max(position - 256, 0), position + over, epoch=epoch))

    @rule(node=NODES, start=STARTS)
    def new_epoch(self, node: str, start: int) -> None:
        # Large ones too: they are random numbers of 64 bits.
        self.epoch[node] = epoch = (max(self.known.get(node, [0])) * 5 + 1) % (1 << 64) if len(self.known.get(node, [])) < 25 else 1 << 63
        if (node, epoch) not in self.at:
            self.at[node, epoch] = start
            self.add(mark(MarkKind.EPOCH, node, 0, start, epoch=epoch))

    @precondition(lambda self: any(len(known) > 1 for known in self.known.values()))
    @rule(data=st.data())
    def old_epoch(self, data: st.DataObject) -> None:
        """A node comes back to an epoch that is not forgotten."""
        node = data.draw(st.sampled_from([node for node, known in self.known.items() if len(known) > 1]))
        self.epoch[node] = data.draw(st.sampled_from(self.known[node][-16:]))

    @rule(data=st.data(), max_bytes=st.sampled_from([0, 700, 3000, 20_000, 1 << 40]))
    def read(self, data: st.DataObject, max_bytes: int) -> None:
        offset = data.draw(st.integers(0, self.log.end + 2) if self.log.end < 1 << 20 else st.integers(self.oldest - 1, self.log.end))
        expected: list[Entry] = []
        for entry in self.here():
            if entry.offset >= offset:
                if expected and sum(each.size for each in (*expected, entry)) > max_bytes:
                    break
                expected.append(entry)
        assert [content(entry) for entry in self.log.read(offset, max_bytes)] == [content(entry) for entry in expected]

    @precondition(lambda self: self.entries)
    @rule(data=st.data(), aside=st.sampled_from([-1, 0, 1, -128]))
    def offset_behind(self, data: st.DataObject, aside: int) -> None:
        chosen = data.draw(st.sampled_from(self.entries))
        position = min(max(data.draw(st.sampled_from([chosen.position, chosen.end])) + aside, 0), (1 << 64) - 1)
        found = self.log.offset_behind(chosen.node, chosen.epoch, position)
        if chosen.epoch not in self.known[chosen.node][-16:]:
            assert found is None
            return
        mine = [entry for entry in self.entries if (entry.node, entry.epoch) == (chosen.node, chosen.epoch)]
        assert found is not None
        missed = [entry for entry in mine if entry.offset < self.oldest and (last := last_of(entry)) is not None and last > position]
        if missed:
            assert found < self.oldest
            return
        passed = [entry.offset for at, entry in enumerate(mine) if max(each.end for each in mine[: at + 1]) <= position]
        begin = passed[-1] + 1 if passed else mine[0].offset
        others = [entry.offset for entry in self.here() if entry.node == chosen.node]
        assert [offset for offset in others if offset >= found] == [offset for offset in others if offset >= begin]

    @rule()
    def unknown_epoch(self) -> None:
        assert self.log.offset_behind("a", 12345, 0) is None
        assert self.log.offset_behind("nobody", 1, 0) is None

    @rule(space=st.sampled_from(["x", "y"]), key=st.sampled_from(["k", "l", ""]), value=st.none() | st.binary(max_size=5))
    def put(self, space: str, key: str, value: bytes | None) -> None:
        self.log.put(space, key, value)
        if value is None:
            self.values.pop((space, key), None)
        else:
            self.values[space, key] = value

    @rule()
    def flush(self) -> None:
        self.run(self.log.flush())
        assert self.log.committed == self.log.end

    @rule()
    def turn(self) -> None:
        """Let the event loop run a little: the writer is in the middle of something."""
        self.run(asyncio.sleep(0))

    @precondition(lambda self: self.form == "sqlite")
    @rule()
    def reopen(self) -> None:
        end = self.log.end
        self.run(self.log.close())
        self.open(self.folders[-1])
        assert (self.log.log_id, self.log.end, self.log.committed) == (self.log_id, end, end)

    @precondition(lambda self: self.form == "sqlite")
    @rule()
    def crash(self) -> None:
        """The files as a crash would leave them."""
        self.run(self.log.flush())
        copy = Path(tempfile.mkdtemp())
        for path in self.folders[-1].iterdir():
            shutil.copy(path, copy)  # the writer may be at work, but for deletions only
        end, entries = self.log.end, [content(entry) for entry in self.here()]
        self.run(self.log.close())
        self.open(copy)
        assert (self.log.log_id, self.log.committed) == (self.log_id, self.log.end)
        assert self.log.end > end
        # What retention was about to delete may be here still.
        self.oldest = self.log.oldest
        assert [content(entry) for entry in self.log.read(0, 1 << 40)][-len(entries) or 1 << 40 :] == entries

    @invariant()
    def same(self) -> None:
        log = self.log
        assert log.oldest == self.oldest if self.entries else log.oldest == log.end
        assert log.committed <= log.end
        for node, known in self.known.items():
            ends = log.ends(node)
            assert list(ends) == known[-16:]
            for epoch, end in ends.items():
                mine = [entry for entry in self.entries if (entry.node, entry.epoch) == (node, epoch)]
                assert (end.position, end.offset) == (max(entry.end for entry in mine), mine[-1].offset)
                gone = [(last, entry) for entry in mine if entry.offset < self.oldest and (last := last_of(entry)) is not None]
                if end.dropped is None:
                    assert not gone
                else:
                    last, entry = gone[-1]
                    assert (end.dropped.last, end.dropped.end) == (last, entry.end)
                    assert end.dropped.time_ns == (entry.unix_ns(len(entry) - 1) if isinstance(entry, Block) else entry.end_time_ns)
        assert log.ends("nobody") == {}
        for space in ("x", "y"):
            assert log.values(space) == {key: value for (at, key), value in self.values.items() if at == space}

    def teardown(self) -> None:
        self.run(self.log.close())
        self.loop.close()
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)


class MemoryMachine(LogMachine):
    """The log in memory."""

    form = "memory"


class SqliteMachine(LogMachine):
    """The log in a file."""

    form = "sqlite"


def last_of(entry: Entry) -> int | None:
    if isinstance(entry, Block):
        return int(entry.positions[-1]) if len(entry) else None
    return None if entry.kind == MarkKind.EPOCH else entry.end


@pytest.mark.parametrize("machine", [MemoryMachine, SqliteMachine])
def test_same_as_the_model(machine: type[LogMachine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "TAIL_BYTES", 30_000)  # the rest is read from the file
    chosen = settings(max_examples=30, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(machine, settings=chosen)
