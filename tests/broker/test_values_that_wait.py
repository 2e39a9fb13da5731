# SPDX-License-Identifier: Apache-2.0
"""What is put under keys while the disk is full, for long: what waits is bounded by what is alive, and is right when there is room."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from kmonitor.broker.log.waiting import Waiting
from kmonitor.broker.log.writer import Add, Flush, Order, Put
from kmonitor.broker.mark import Mark, MarkKind
from tests.broker.logs import block, opened
from tests.broker.test_log_disk import full, small_disk, trouble

__all__ = ["small_disk"]

GONE = 20_000
LIVING = 100


async def test_processes_that_come_and_go(small_disk: Path) -> None:
    path = small_disk / "log.db"
    async with opened(path) as (log, told):
        log.put("spans", "stored", b"before")
        await log.flush()
        with full(small_disk):
            while not told.troubles:
                log.append(block("a", log.end * 128))
                await asyncio.sleep(0)
            await trouble(told)
            for number in range(GONE):
                for value in (b"x" * 90, b"x" * 92, b"x" * 95, None):
                    log.put("spans", str(number), value)
            log.put("spans", "stored", None)
            for number in range(LIVING):
                log.put("spans", f"living {number}", b"y" * 90)
            assert log.values_waiting < 10_000
        await told.until(lambda: told.troubles[-1] == "")
        await log.flush()
    async with opened(path) as (log, _):
        assert log.values("spans") == {f"living {number}": b"y" * 90 for number in range(LIVING)}


ORDERS = st.lists(
    st.tuples(st.just("put"), st.sampled_from("abc"), st.sampled_from([b"1", b"2", None]))
    | st.tuples(st.just("add"), st.sampled_from("mn"), st.integers(1, 2))
    | st.tuples(st.sampled_from(["take", "fail", "give up"]), st.just(""), st.just(0)),
    max_size=60,
)


@given(ORDERS)
def test_what_is_written_is_what_was_put(steps: list[tuple[str, str, object]]) -> None:
    """After each batch, whatever was given up, failed, and found to be needless before."""
    waiting = Waiting(())
    waiting.compacts_from = 1
    now: dict[str, bytes] = {}
    offset = 0
    stored: dict[str, bytes] = {}

    def write(batch: Iterable[Order]) -> None:
        for order in batch:
            if isinstance(order, Put) and order.value is None:
                stored.pop(order.key, None)
            elif isinstance(order, Put):
                stored[order.key] = order.value or b""

    for what, name, value in steps:
        if what == "put" and (value is None or isinstance(value, bytes)):
            waiting.append(Put("s", name, value))
            now = {key: each for key, each in {**now, name: value}.items() if each is not None}
        elif what == "add":
            entry = Mark(MarkKind.UNLOGGED, name, "", 1, offset, offset + 1, 0, 0)
            entry.offset = offset
            waiting.append(Add(entry, offset + 1))
            offset += 1
        elif what == "take":
            write(waiting.take())
            waiting.done()
            assert stored == now
        elif what == "fail":
            waiting.take()
            waiting.failed()
        else:
            waiting.give_up("m", 1, offset)
    write(waiting.take())
    waiting.done()
    assert stored == now
    assert waiting.first_unwritten() is None
    assert not len(waiting)


def test_an_entry_is_never_there_without_what_was_put_before_it() -> None:
    waiting = Waiting(())
    waiting.compacts_from = 1
    first, second = (Mark(MarkKind.LOST, "a", "", 1, at, at + 1, 0, 0) for at in (0, 1))
    first.offset, second.offset = 0, 1
    waiting.append(Put("s", "k", b"old"))
    waiting.append(Put("s", "k", b"older"))
    waiting.append(Add(first, 1))
    waiting.append(Put("s", "k", b"new"))
    waiting.append(Add(second, 2))
    waiting.append(Put("s", "k", None))
    kinds = [order.value if isinstance(order, Put) else "entry" for order in waiting.take() if not isinstance(order, Flush)]
    assert kinds == [b"older", "entry", b"new", "entry", None]
