# SPDX-License-Identifier: Apache-2.0
"""The log in a file: what an append costs the event loop's thread, when it is committed, and how much goes through.

    .venv/bin/python -m bench.log [FOLDER]

The file is made in FOLDER, the current one if none is named: take the disk that the broker's log is to lie on. Nothing else runs on the
event loop, but for the line with "busy": there it computes all the time, 1 ms a turn. Costs are CPU time.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from kmonitor.broker.block import Block
from kmonitor.broker.log import Page
from kmonitor.broker.log.sqlite import SqliteLog
from kmonitor.wire.record import F_MATCH_NODE, RECORD_VERSION, RING_HEADER_SIZE, SLOT_DTYPE, SLOT_SIZE

_NODES = [f"node-{number:02}" for number in range(20)]


def _records(size: int) -> bytes:
    slots = np.zeros(size // SLOT_SIZE, dtype=SLOT_DTYPE)
    slots["version"], slots["type"], slots["flags"] = RECORD_VERSION, 0x40, F_MATCH_NODE
    slots["ring_length"] = SLOT_SIZE - RING_HEADER_SIZE
    return slots.tobytes()


def _blocks(size: int, count: int, start: int = 0) -> list[Block]:
    data = _records(size)
    at = range(start, start + count)
    return [Block(_NODES[n % len(_NODES)], 1, n * size, data, 0, "0f7a2f55-3d5e-4c0e-9d3a-0e1a9bb7a001") for n in at]


async def _caught_up(log: SqliteLog) -> None:
    news = asyncio.Event()
    log.on_commit = lambda _: news.set()
    while log.committed < log.end:
        news.clear()
        await news.wait()
    log.on_commit = None


async def _commit_latency(log: SqliteLog, count: int, *, busy: bool) -> str:
    """One block, then nothing until it is committed."""
    turning = True

    def turn() -> None:
        until = time.perf_counter() + 0.001
        while time.perf_counter() < until:
            pass
        if turning:
            asyncio.get_running_loop().call_soon(turn)

    if busy:
        turn()
    taken = []
    for block in _blocks(SLOT_SIZE, count):
        began = time.perf_counter()
        log.append(block)
        await _caught_up(log)
        taken.append(1000 * (time.perf_counter() - began))
    turning = False
    taken.sort()
    at = [taken[int(len(taken) * share)] for share in (0.05, 0.5, 0.95, 0.99)]
    return f"p5 {at[0]:.2f}  median {at[1]:.2f}  p95 {at[2]:.2f}  p99 {at[3]:.2f}  max {taken[-1]:.2f}"


async def _throughput(log: SqliteLog, size: int, total: int, held: int) -> str:
    """Append all the time, but for `held` bytes that wait: as agents do, which wait for acknowledgements."""
    count, window = total // size, max(held // size, 1)
    blocks = _blocks(size, count)
    step = max(window // 2, 1)
    costs = []
    began, cpu = time.perf_counter(), time.process_time()
    for first in range(0, count, step):
        run = blocks[first : first + step]
        before = time.thread_time()
        for block in run:
            log.append(block)
        costs.append(1e6 * (time.thread_time() - before) / len(run))
        while log.end - log.committed > window:
            news = asyncio.Event()
            log.on_commit = lambda _, news=news: news.set()
            await news.wait()
    await _caught_up(log)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return (
        f"{count / seconds:,.0f} a second, {count * size / seconds / 1e6:.0f} MB/s; a block: append {statistics.median(costs):.1f} us, "
        f"all threads {1e6 * cpu / count:.1f} us"
    )


async def _read(log: SqliteLog) -> str:
    """What is no longer in memory, 1 MiB at a time."""
    offset, size, costs = log.oldest, 0, []
    while size < 64 << 20:
        before = time.perf_counter()
        found = log.fetch(offset, 1 << 20)
        page = found if isinstance(found, Page) else await found
        if offset >= log.end:
            break
        costs.append(1000 * (time.perf_counter() - before))
        offset = page.following
        size += sum(entry.size for entry in page.entries)
    return f"a step of 1 MiB in memory {statistics.median(costs):.1f} ms, at most {max(costs):.1f} ms"


async def _measure(folder: Path) -> None:
    for size, total, held in ((SLOT_SIZE, 20 << 20, 1 << 20), (8192, 256 << 20, 16 << 20), (262_144, 512 << 20, 32 << 20)):
        for limit in (4 << 30, 64 << 20 if size > SLOT_SIZE else 8 << 20):
            path = folder / f"{size}-{limit}.db"
            log = SqliteLog(path, max_bytes=limit)
            kind = "" if limit == 4 << 30 else f", at its limit of {limit >> 20} MiB"
            print(f"blocks of {size} bytes{kind}: {await _throughput(log, size, total, held)}", flush=True)
            sizes = [path.with_name(path.name + tail).stat().st_size >> 20 for tail in ("", "-wal")]
            print(f"    the file: {sizes[0]} MiB, the log in front of it {sizes[1]} MiB")
            print(f"    read again: {await _read(log)}", flush=True)
            await log.close()
            began = time.perf_counter()
            await SqliteLog(path).close()
            print(f"    opened and closed: {1000 * (time.perf_counter() - began):.0f} ms", flush=True)
            path.unlink()
    log = SqliteLog(folder / "latency.db")
    for busy in (False, True):
        said = await _commit_latency(log, 300, busy=busy)
        print(f"append to on_commit, one at a time{', busy' if busy else ''}, milliseconds: {said}", flush=True)
    await log.close()


def main() -> None:
    """Print some lines."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else ".") as folder:
        asyncio.run(_measure(Path(folder)))


if __name__ == "__main__":
    main()
