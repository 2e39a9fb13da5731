# SPDX-License-Identifier: Apache-2.0
"""Agents that are killed, links that are cut, names that are taken, and nodes that come late."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kmonitor.clients import Event, Gap, Monitor, NodeChange, NodeState, Notification, Registered, RegistrationState, connect
from tests.lab.cluster import ZONES, Cluster
from tests.lab.namespaces import InsideAgent
from tests.lab.services import Lab
from tests.lab.watch import Line, Watch

LEASE_NOTICED_NS = 5_000_000_000
"""A lease of 0.5 s ran out and was told of, on a busy machine too: well before TCP or HTTP/2 could have noticed anything."""


@dataclass
class Second:
    """An agent with the name of node a in another machine, which is no node: nobody hears of its end."""

    agent: InsideAgent
    since: int
    """Since when a had been up when it started."""


@pytest.fixture(scope="module", autouse=True)
def second(cluster: Cluster, pins: Path) -> Iterator[Second]:
    """Tries all along while the other tests run, until it gives up: that takes ten seconds and more."""
    lab = Lab(pins)
    since = cluster.nodes(lab)["a"]["since_unix_nano"]
    agent = cluster.net.machine(cluster.lab, "spare").agent(lab, cluster.broker, node="a", wait=False)
    yield Second(agent, since)
    lab.stop(agent)
    lab.close()


def is_change(line: Line, node: str, state: str) -> bool:
    """Whether it says that a node is in a state now."""
    return (line["kind"], line.get("node"), line.get("state")) == ("node", node, state)


def wait_change(watch: Watch, node: str, state: str, start: int = 0) -> int:
    """Until a node has come into a state; the index of the line."""
    return watch.wait_for(lambda line: is_change(line, node, state), f"{node} is {state}", start=start)


def wait_answer(watch: Watch, node: str, state: str, target: str, start: int = 0) -> int:
    """Until a node has answered a registration in this way."""

    def wanted(line: Line) -> bool:
        return line["kind"] == "registered" and (line["node"], line["state"], line["target"]) == (node, state, target)

    return watch.wait_for(wanted, f"{target} on {node} is {state}", start=start)


def ends(watch: Watch) -> list[tuple[str, int, int | None]]:
    """The exits that it was told of."""
    return [(line["node"], line["pid"], line["exit_code"]) for line in watch.events() if line["type"] == "PROCESS_EXIT"]


@pytest.mark.parametrize("pin", [False, True], ids=["without pins", "with pins"])
def test_an_agent_is_killed_and_started_again(cluster: Cluster, lab: Lab, pin: bool) -> None:
    """Processes that still run are registered again. What ended meanwhile is told: with its status if the ring was pinned."""
    name = "pinned" if pin else "b"
    agent = cluster.agents.get(name) or cluster.node(name, pin=pin)
    machine = cluster.machines[name]
    stays, goes = machine.idler(lab), machine.idler(lab)
    pids = ("--pid", str(stays.pid), "--pid", str(goes.pid))
    watch = lab.watch(cluster.address, "--node", name, *pids, "--events", "exit")
    watch.wait_registered(2, "RUNNING")
    unconcerned = lab.watch(cluster.address, "--node", "a", "--events", "exit")
    unconcerned.wait_registered(1, "ARMED")

    cluster.lab.kill(agent)
    at = wait_change(watch, name, "UNREACHABLE")
    assert watch.records[at]["reason"] in ("its agent's stream broke", "its agent ended the stream")
    late = lab.watch(cluster.address, "--node", name, "--pid", str(stays.pid), "--events", "exit")
    late.wait_registered(1, "NODE_UNREACHABLE")
    assert cluster.nodes(lab)[name]["state"] == "UNREACHABLE"
    goes.end(7)
    lab.stop(goes)

    again = len(watch.records)
    cluster.node(name, "--label", "zone=east", pin=pin)
    up = wait_change(watch, name, "UP", again)
    wait_answer(late, name, "RUNNING", f"pid {stays.pid}")
    assert is_change(late.records[1], name, "UP")
    if pin:
        watch.wait_end_of(goes.pid)
    else:
        wait_answer(watch, name, "RUNNING", f"pid {stays.pid}", up)
        watch.wait_end_of(goes.pid)
    stays.end(9)
    lab.stop(stays)
    watch.wait_end_of(stays.pid)
    late.wait_end_of(stays.pid)
    # Where the ring was gone its end was found, not seen: nobody knows its status.
    assert ends(watch) == [(name, goes.pid, 7 if pin else None), (name, stays.pid, 9)]
    assert [line["inferred"] for line in watch.events() if line["type"] == "PROCESS_EXIT"] == [not pin, False]
    assert ends(late) == [(name, stays.pid, 9)]
    assert [gap["reason"] for gap in watch.of_kind("gap")] == ([] if pin else ["AGENT"])
    assert watch.wait() == late.wait() == 0
    lab.stop(unconcerned)
    assert {line["kind"] for line in unconcerned.records} == {"registered"}


def test_a_link_is_cut_and_mended(brief_cluster: Cluster, lab: Lab) -> None:
    """The node is unreachable when its lease is over. What happened meanwhile was kept in its kernel, and comes."""
    cluster, machine = brief_cluster, brief_cluster.machines["b"]
    idler, after = machine.idler(lab), machine.idler(lab)
    pids = ("--pid", str(idler.pid), "--pid", str(after.pid))
    watch = lab.watch(cluster.address, "--node", "b", *pids, "--events", "exit")
    watch.wait_registered(2, "RUNNING")
    # On a very busy machine so short a lease may have run out before.
    start = max((at for at, line in enumerate(watch.records) if is_change(line, "b", "UP")), default=0)
    cut_ns = time.time_ns()
    machine.link("down")
    down = wait_change(watch, "b", "UNREACHABLE", start)
    line = watch.records[down]
    if line["reason"] == "nothing came from its agent for 0.5 s":
        assert line["time_unix_nano"] - cut_ns < LEASE_NOTICED_NS
    else:  # the broker itself was held up for so long that it did not trust its clock
        assert line["reason"] == "its agent's stream broke"
    idler.end(5)
    lab.stop(idler)
    assert cluster.nodes(lab)["b"]["state"] == "UNREACHABLE"
    assert ends(watch) == []

    machine.link("up")
    wait_change(watch, "b", "UP", down)
    watch.wait_end_of(idler.pid)
    # What is asked now is answered behind all that the agent was asked again when it came back.
    late = lab.watch(cluster.address, "--node", "b", "--pid", str(after.pid), "--events", "exit")
    late.wait_registered(1, "RUNNING")
    after.end(6)
    lab.stop(after)
    watch.wait_end_of(after.pid)
    late.wait_end_of(after.pid)
    assert ends(watch) == [("b", idler.pid, 5), ("b", after.pid, 6)]
    assert ends(late) == [("b", after.pid, 6)]
    assert watch.of_kind("gap") == []
    assert watch.wait() == late.wait() == 0


async def test_a_node_that_joins_later(cluster: Cluster, lab: Lab) -> None:
    """Who watches every node is told of it, and hears it; who watches another one is not."""
    watch = lab.watch(cluster.address, "--events", "exit")
    known = len(cluster.nodes(lab))
    watch.wait_registered(known)
    other = lab.watch(cluster.address, "--node", "[abc]", "--events", "exit")
    other.wait_registered(len(ZONES), "ARMED")
    async with connect(cluster.address) as monitor:
        assert "late" not in (await monitor.register(events="exit")).states
        cluster.node("late")
        joined = await until_armed(monitor, "late")
        changes = [(item.state, item.node) for item in joined if isinstance(item, NodeChange)]
        assert changes == [(NodeState.UP, "late")]
        assert not any(isinstance(item, Event | Gap) for item in joined)
        wait_answer(watch, "late", "ARMED", "everything")
        idler = cluster.machines["late"].idler(lab)
        idler.end(3)
        lab.stop(idler)
        async for item in monitor:
            if isinstance(item, Event):
                assert (item.node, item.pid, item.exit_code) == ("late", idler.pid, 3)
                break
    watch.wait_end_of(idler.pid)
    lab.stop(watch, other)
    assert ends(watch) == [("late", idler.pid, 3)]
    assert {line["kind"] for line in other.records} == {"registered"}


def test_a_name_that_is_taken_is_refused(cluster: Cluster, second: Second, lab: Lab) -> None:
    """The second agent of a name ends, some seconds later, with one line of error. The first one stays what it was."""
    code = second.agent.wait(30)
    assert code == 2
    # That it is still trying may be told before.
    *_, last = lines = second.agent.stderr_text().splitlines()
    assert last.startswith(f"kmonitor-agent: error: node a is connected to {cluster.broker} already: ")
    assert len(lines) <= 2
    assert second.agent.lines == []
    node = cluster.nodes(lab)["a"]
    assert (node["state"], node["since_unix_nano"]) == ("UP", second.since)
    idler = cluster.machines["a"].idler(lab)
    watch = lab.watch(cluster.address, "--node", "a", "--pid", str(idler.pid), "--events", "exit")
    watch.wait_registered(1, "RUNNING")
    idler.end(4)
    lab.stop(idler)
    watch.wait_end_of(idler.pid)
    assert watch.wait() == 0
    assert {line["kind"] for line in watch.records} == {"registered", "event"}
    assert ends(watch) == [("a", idler.pid, 4)]


async def until_armed(monitor: Monitor, node: str) -> list[Notification]:
    """What comes until a node is armed for everything."""
    items: list[Notification] = []
    async for item in monitor:
        items.append(item)
        if isinstance(item, Registered) and (item.node, item.state) == (node, RegistrationState.ARMED):
            break
    return items
