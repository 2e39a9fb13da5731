# SPDX-License-Identifier: Apache-2.0
"""As fast as two cores go: nothing is lost, nothing is said twice, with the agent's default ring."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest

from tests.lab import check, storm
from tests.lab.compare import Line
from tests.lab.storm import Storm
from tests.lab.watch import Watch
from tests.lab.workload import Stage

WORKERS = 2


def run(stage: Stage, kind: str, count: int, *rate: str) -> tuple[Storm, Watch]:
    """A storm under a watch of all that it does. The watch may lag: it gets the time it takes."""
    folder = Path(stage.folder, kind)
    folder.mkdir()
    root = stage.prepare(stage.programs.storm, kind, str(count), str(WORKERS), str(folder), *rate)
    fence = stage.fence()
    watch = stage.watch(root.root_pid, fence.pid, options=["--follow", "--events", "all"])
    root.say("go")
    told = storm.read(root, folder)
    stage.end_fence(fence, watch, limit=90)
    print(f"\n{kind}: {told.count} in {told.seconds:.2f} s, {told.rate:.0f} a second, {len(watch.lines)} lines")
    assert watch.of_kind("gap") == []
    assert len(watch.of_kind("registered")) == 2
    return told, watch


def ids(events: list[Line], kind: str, field: str) -> Counter[int]:
    """How often each id is in the events of a type."""
    return Counter(line[field] for line in check.of_type(events, kind))


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("kind", "count"), [("fork", 20_000), ("exec", 6_000)])
def test_processes(stage: Stage, kind: str, count: int) -> None:
    told, watch = run(stage, kind, int(count * stage.knowledge.share))
    of_children = [line for line in watch.events() if line["pid"] not in told.ends and line["pid"] != told.root]
    workers = [line for line in watch.events() if line["pid"] in told.ends]
    assert Counter((line["pid"], line["child_pid"]) for line in check.of_type(workers, "PROCESS_FORK")) == told.started()
    exits = Counter((line["pid"], line["exit_code"]) for line in check.of_type(of_children, "PROCESS_EXIT"))
    fence = exits - told.statuses()
    assert told.statuses() - exits == Counter()
    assert fence.total() == 1
    execs = Counter(line["pid"] for line in check.of_type(of_children, "PROCESS_EXEC"))
    assert execs == (Counter(pid for pid, _ in told.statuses().elements()) if kind == "exec" else Counter())
    # Two workers: each is forked, forks its share, and exits; the root and the fence exit.
    total = told.count * (3 if kind == "exec" else 2) + 2 * WORKERS + 2
    assert len(watch.events()) == total


@pytest.mark.timeout(180)
def test_threads(stage: Stage) -> None:
    """At 45,000 a second, for some seconds: most of what two cores do flat out with nobody to watch them. Or at what the source takes."""
    rate = stage.knowledge.thread_rate
    told, watch = run(stage, "threads", int(4 * rate * stage.knowledge.share), str(rate))
    made = Counter((line["pid"], line["child_tid"]) for line in check.of_type(watch.events(), "THREAD_CREATE"))
    assert made == told.started()
    ended = Counter((line["pid"], line["tid"]) for line in check.of_type(watch.events(), "THREAD_EXIT"))
    assert ended == told.started()
    assert len(watch.events()) == 2 * told.count + 2 * WORKERS + 2


def test_positions_and_times_never_go_back(stage: Stage) -> None:
    _, watch = run(stage, "fork", 4_000)
    events = watch.events()
    positions = [line["position"] for line in events]
    assert all(before < after for before, after in itertools.pairwise(positions))
    # Two CPUs write: a record's time is read a little after its place is reserved.
    times = [line["time"] for line in events]
    assert all(after > before - 20_000_000 for before, after in itertools.pairwise(times))
