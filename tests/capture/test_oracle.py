# SPDX-License-Identifier: Apache-2.0
"""The kernel's process connector as a second witness: the same forks, execs and exits under load, node-wide."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.lab import connector, storm
from tests.lab.compare import Line
from tests.lab.connector import PROC_EVENT_EXEC, PROC_EVENT_EXIT, PROC_EVENT_FORK, Connector, Witnessed
from tests.lab.requires import need
from tests.lab.workload import Stage

Fact = tuple[str, int, int]
"""Type, pid, and the child's pid (fork), the status (exit) or 0."""


def witnessed(told: list[Witnessed], tree: set[int]) -> Counter[Fact]:
    """What the connector told of the processes that come from `tree`, which grows."""
    facts: Counter[Fact] = Counter()
    for event in told:
        if event.what == PROC_EVENT_FORK and event.pid == event.tid and event.parent in tree:
            tree.add(event.pid)
            facts["PROCESS_FORK", event.parent, event.pid] += 1
        elif event.pid in tree and event.what == PROC_EVENT_EXEC:
            facts["PROCESS_EXEC", event.pid, 0] += 1
        elif event.pid in tree and event.what == PROC_EVENT_EXIT and event.pid == event.tid:
            facts["PROCESS_EXIT", event.pid, event.status] += 1
            tree.discard(event.pid)
    return facts


def seen(events: list[Line], tree: set[int]) -> Counter[Fact]:
    """The same of kmonitor's events."""
    facts: Counter[Fact] = Counter()
    for line in events:
        pid, kind = line["pid"], line["type"]
        if pid not in tree:
            continue
        if kind == "PROCESS_FORK":
            tree.add(line["child_pid"])
            facts[kind, pid, line["child_pid"]] += 1
        elif kind == "PROCESS_EXEC":
            facts[kind, pid, 0] += 1
        elif kind == "PROCESS_EXIT":
            facts[kind, pid, line["exit_signal"] if line.get("exit_signal") else line["exit_code"] << 8] += 1
            tree.discard(pid)
    return facts


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("kind", "count"), [("fork", 8_000), ("exec", 4_000)])
def test_the_connector_saw_the_same(stage: Stage, kind: str, count: int) -> None:
    need(connector.connector_lack)
    folder = Path(stage.folder, kind)
    folder.mkdir()
    root = stage.prepare(stage.programs.storm, kind, str(count), "2", str(folder))
    fence = stage.fence()
    watch = stage.lab.watch(stage.broker, "--node", stage.node, "--events", "fork,exec,exit")
    watch.wait_registered(1, "ARMED")
    with Connector() as witness:
        root.say("go")
        storm.read(root, folder)
        fence.close_input()
        fence.wait()
        told = witness.until_end_of(fence.pid)
        assert witness.lost == 0
    watch.wait_end_of(fence.pid, limit=90)
    stage.lab.stop(watch)
    assert watch.of_kind("gap") == []
    by_connector, by_kmonitor = witnessed(told, {root.root_pid}), seen(watch.events(), {root.root_pid})
    assert by_connector.total() >= count * (3 if kind == "exec" else 2)
    assert by_kmonitor - by_connector == Counter()
    assert by_connector - by_kmonitor == Counter()
