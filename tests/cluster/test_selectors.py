# SPDX-License-Identifier: Apache-2.0
"""Several monitors at once, each with another selection of nodes and events: each gets exactly that."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Unpack

from kmonitor.clients import Batch, Monitor, RegistrationState, Selection, connect
from kmonitor.clients.cli.jsonlines import event_line
from tests.lab.cluster import Cluster, NodeStage
from tests.lab.compare import Line, differences
from tests.lab.services import Lab
from tests.lab.watch import Watch
from tests.lab.workload import Programs

SCENES = {"a": ("mixed",), "b": ("codes", "1", "40"), "c": ("mixed",)}
PROCESS = {"PROCESS_FORK", "PROCESS_EXEC", "PROCESS_ABORT", "PROCESS_EXIT"}
EXIT = {"PROCESS_EXIT"}
LIMIT = 20.0


class Heard:
    """What a monitor of the library is told, as lines of JSON."""

    def __init__(self, monitor: Monitor) -> None:
        self.lines: list[Line] = []
        self.others: list[object] = []
        self._monitor = monitor

    async def until_ends(self, ends: set[tuple[str, int]]) -> None:
        """Until the ends of all of these (node, pid) have come."""
        left = set(ends)
        async with asyncio.timeout(LIMIT):
            async for item in self._monitor.batches():
                if not isinstance(item, Batch):
                    self.others.append(item)
                    continue
                new: list[Line] = [json.loads(event_line(item, event)) for event in item.events]
                self.lines += new
                left -= {(line["node"], line["pid"]) for line in new if line["type"] == "PROCESS_EXIT"}
                if not left:
                    return


def wait_ends(watch: Watch, ends: set[tuple[str, int]]) -> None:
    """Until the ends of all of these (node, pid) have come."""
    for end in ends:

        def wanted(line: Line, end: tuple[str, int] = end) -> bool:
            return line.get("type") == "PROCESS_EXIT" and (line["node"], line["pid"]) == end

        watch.wait_for(wanted, f"the end of process {end[1]} on {end[0]}")


@asynccontextmanager
async def listening(address: str, states: dict[str, RegistrationState], **what: Unpack[Selection]) -> AsyncIterator[Heard]:
    """A monitor with one registration, answered with `states`."""
    async with connect(address) as monitor:
        assert (await monitor.register(**what)).states == states
        yield Heard(monitor)


def wrong(lines: list[Line], truths: dict[str, list[Line]], types: set[str]) -> list[str]:
    """Where `lines` differ from the truth of those nodes, and no others."""
    nodes = sorted(truths.keys() | {line["node"] for line in lines})
    found: list[str] = []
    for node in nodes:
        told = [line for line in truths.get(node, []) if line["type"] in types]
        found += [f"{node}: {text}" for text in differences(told, [line for line in lines if line["node"] == node])]
    return found


async def test_each_monitor_gets_what_it_registered_for(cluster: Cluster, lab: Lab, programs: Programs, tmp_path: Path) -> None:
    stages = {name: NodeStage(lab, cluster, name, programs, tmp_path) for name in cluster.machines}
    roots = {name: stages[name].start(*scene) for name, scene in SCENES.items()}
    fences = {name: machine.idler(lab) for name, machine in cluster.machines.items()}

    def watch(count: int, *options: str) -> Watch:
        started = lab.watch(cluster.address, *options)
        started.wait_registered(count, "ARMED")
        return started

    watches = [
        (watch(1, "--node", "a"), "a", PROCESS),
        (watch(2, "--node", "[ab]", "--events", "exit"), "ab", EXIT),
        (watch(2, "--node", "[!b]", "--events", "fork,exit"), "ac", {"PROCESS_FORK", "PROCESS_EXIT"}),
        (watch(3), "abc", PROCESS),
    ]
    armed, running = RegistrationState.ARMED, RegistrationState.RUNNING
    one = roots["c"].root_pid
    async with (
        listening(cluster.address, {"a": armed, "b": armed}, labels={"zone": "east"}) as east,
        listening(cluster.address, {"c": armed}, labels={"zone": "west"}, nodes=["*"], events="exec,exit") as west,
        listening(cluster.address, {"c": running}, node="c", pid=one, events="fork,exit") as only,
        listening(cluster.address, dict.fromkeys("abc", armed)) as everything,
    ):
        for root in roots.values():
            root.say("go")
        truths = {name: await asyncio.to_thread(root.truth) for name, root in roots.items()}
        for name, fence in fences.items():
            fence.end(0)
            truths[name].append({"type": "PROCESS_EXIT", "pid": fence.pid, "tid": fence.pid, "exit_code": 0})
        heard = [
            (east, "ab", PROCESS),
            (west, "c", {"PROCESS_EXEC", "PROCESS_EXIT"}),
            (everything, "abc", PROCESS),
        ]
        for monitor, nodes, _ in heard:
            await monitor.until_ends({(name, fences[name].pid) for name in nodes})
        await only.until_ends({("c", one)})
    for started, nodes, types in watches:
        wait_ends(started, {(name, fences[name].pid) for name in nodes})
        lab.stop(started)
        assert wrong(started.events(), {name: truths[name] for name in nodes}, types) == []
        assert {line["kind"] for line in started.records} == {"registered", "event"}
    for monitor, nodes, types in heard:
        assert wrong(monitor.lines, {name: truths[name] for name in nodes}, types) == []
    of_one = [line for line in truths["c"] if line["pid"] == one]
    assert wrong(only.lines, {"c": of_one}, {"PROCESS_FORK", "PROCESS_EXIT"}) == []
    for root in roots.values():
        assert root.process.returncode == 0
