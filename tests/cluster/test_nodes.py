# SPDX-License-Identifier: Apache-2.0
"""Three nodes with pids of their own: who is told of which process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kmonitor.clients import RegistrationState, connect
from kmonitor.clients.lab.processes import pid_inside
from kmonitor.wire.record import SLOT_SIZE
from tests.lab import check
from tests.lab.cluster import SOURCES, ZONES, Cluster, NodeStage
from tests.lab.services import Lab
from tests.lab.workload import Programs

SAME_PID = 5000


def test_three_nodes_are_up(cluster: Cluster, lab: Lab) -> None:
    """With their labels, and with pids as the namespace has them."""
    nodes = cluster.nodes(lab)
    assert {name: (node["state"], node["scope"], node["source"], node["labels"]) for name, node in nodes.items()} == {
        name: ("UP", "pidns", SOURCES.get(name, "core"), {"zone": zone}) for name, zone in ZONES.items()
    }
    for name, machine in cluster.machines.items():
        idler = machine.idler(lab)
        agent = pid_inside(cluster.agents[name].host_pid)
        listed = lab.json_lines("ps", "--node", name, "--json", "--broker", cluster.address)
        assert {line["pid"]: line["ppid"] for line in listed} == {1: 0, agent: 0, idler.pid: 0}
        (idling,) = (line for line in listed if line["pid"] == idler.pid)
        assert idling["args"] == Path(f"/proc/{idler.host_pid}/cmdline").read_text(encoding="utf-8").split("\0")[:-1]
        assert 0 <= idling["age_ns"] < 600e9


def test_the_same_pid_on_three_nodes(cluster: Cluster, lab: Lab) -> None:
    """Registered on one: its exit is told, and the other nodes' kernels send nothing."""
    idlers = {name: machine.idler(lab, SAME_PID) for name, machine in cluster.machines.items()}
    fence = cluster.machines["b"].idler(lab)
    before = cluster.received(lab)
    pids = ("--pid", str(SAME_PID), "--pid", str(fence.pid))
    watch = lab.watch(cluster.address, "--node", "b", *pids, "--events", "exit")
    watch.wait_registered(2, "RUNNING")
    for name, code in (("a", 1), ("c", 3), ("b", 2)):
        idlers[name].end(code)
        lab.stop(idlers[name])
    watch.wait_end_of(SAME_PID)
    fence.end(0)
    watch.wait_end_of(fence.pid)
    assert watch.wait() == 0
    ends = [(line["node"], line["pid"], line["exit_code"]) for line in watch.events()]
    assert ends == [("b", SAME_PID, 2), ("b", fence.pid, 0)]
    assert watch.of_kind("gap") == []
    sizes = {"a": 0, "b": 2 * SLOT_SIZE, "c": 0}
    # What a and c had said of the deaths would have come before what they say of another process.
    assert {name: count - before[name] for name, count in cluster.received(lab).items()} == sizes
    for name in ("a", "c"):
        other = cluster.machines[name].idler(lab)
        later = lab.watch(cluster.address, "--node", name, "--pid", str(other.pid), "--events", "exit")
        later.wait_registered(1, "RUNNING")
        other.end(0)
        later.wait_end_of(other.pid)
        assert later.wait() == 0
        sizes[name] = SLOT_SIZE
    assert {name: count - before[name] for name, count in cluster.received(lab).items()} == sizes


def test_what_is_outside_is_not_seen(cluster: Cluster, lab: Lab) -> None:
    """Neither the host's processes nor another node's; and both are by their pids in the node."""
    outside, elsewhere, fence = lab.command("cat"), cluster.machines["a"].idler(lab), cluster.machines["b"].idler(lab)
    watch = lab.watch(cluster.address, "--node", "b", "--events", "process")
    watch.wait_registered(1, "ARMED")
    outside.close_input()
    outside.wait()
    assert lab.run("true").code == 0
    elsewhere.end(0)
    fence.end(0)
    watch.wait_end_of(fence.pid)
    lab.stop(watch)
    assert [(line["node"], line["type"], line["pid"]) for line in watch.events()] == [("b", "PROCESS_EXIT", fence.pid)]
    assert watch.of_kind("gap") == []


async def test_a_pid_of_the_host_is_none_of_the_node(cluster: Cluster) -> None:
    async with connect(cluster.address) as monitor:
        inside = {process.pid for process in await monitor.list_processes("b")}
        assert os.getpid() not in inside
        assert (await monitor.register(node="b", pid=os.getpid(), events="exit")).states == {"b": RegistrationState.NOT_FOUND}


@pytest.mark.parametrize("node", ["b", "c"], ids=["core", "bcc"])
@pytest.mark.parametrize("scene", [("mixed",), ("namespace", "0"), ("namespace", "1")], ids=" ".join)
def test_what_is_inside_is_seen(cluster: Cluster, lab: Lab, programs: Programs, tmp_path: Path, scene: tuple[str, ...], node: str) -> None:
    """In the node's own namespace, and in one below it: each event once, by the node's pids."""
    check.exact(NodeStage(lab, cluster, node, programs, tmp_path).play(*scene), node)
