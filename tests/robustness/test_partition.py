# SPDX-License-Identifier: Apache-2.0
"""Nodes that are cut off: who watches is told in time, nothing is missing behind it, and a node is never there twice."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest

from tests.lab.services import Lab
from tests.robustness.conftest import Maker
from tests.robustness.listener import Listener
from tests.robustness.rig import Rig

LEASE_S = 0.25
"""The shortest."""
NOTICED_S = 5.0
"""The lease ran out and was told of, on a busy machine too: well before TCP or HTTP/2 could have noticed anything."""
MIDST = 200


@pytest.fixture(scope="module")
def brief(make_rig: Maker) -> Iterator[Rig]:
    """Nodes a and b, of a broker that gives the shortest leases."""
    with make_rig("--lease", f"{LEASE_S * 1000:.0f}ms", nodes={"a": (), "b": ()}) as made:
        yield made


def wait_up(listener: Listener, node: str) -> int:
    """Until the last word of a node is that it is up (on a busy machine so short a lease may run out by itself); where to go on from."""
    changes = [
        (index, line["state"])
        for index in range(listener.said)
        if (line := listener.line(index))["kind"] == "node" and line["node"] == node
    ]
    if changes and changes[-1][1] != "UP":
        listener.wait_change(node, "UP", start=changes[-1][0])
    return listener.said


def told_after(listener: Listener, index: int, since_ns: int) -> float:
    """Seconds from a time until the monitor had written that line down."""
    change = listener.line(index)
    at: int = next(line["at"] for line in listener.account.read().notices if line["kind"] == "node" and _same(line, change))
    return (at - since_ns) / 1e9


def _same(one: dict[str, object], other: dict[str, object]) -> bool:
    return all(one[name] == other[name] for name in ("node", "state", "time_unix_nano"))


def test_a_link_goes_down_and_up(brief: Rig, lab: Lab) -> None:
    """UNREACHABLE when the lease is over; UP again; and what happened meanwhile."""
    pace = brief.pace(lab, "a", rate=300)
    follow = brief.listener(lab, pace.tree)
    pace.go()
    delays: list[float] = []
    for _ in range(3):
        follow.wait_more(MIDST)
        start = wait_up(follow, "a")
        cut_ns = time.time_ns()
        with brief.cut("a"):
            down = follow.wait_change("a", "UNREACHABLE", start=start)
            delays.append(told_after(follow, down, cut_ns))
        follow.wait_change("a", "UP", start=down)
    follow.wait_more(MIDST)
    truth = pace.stop()
    follow.wait_counted(truth.total)
    print(f"\nUNREACHABLE after {', '.join(f'{delay * 1000:.0f} ms' for delay in delays)} with a lease of {LEASE_S * 1000:.0f} ms")
    print(follow.account.read().summary(truth.total))
    assert max(delays) < NOTICED_S
    assert follow.account.differences({"a": truth}, whole=True) == []


def test_an_agent_is_killed(brief: Rig, lab: Lab) -> None:
    """Its stream breaks: UNREACHABLE at once, whatever the lease."""
    watch = brief.listener(lab, {"node": "b", "events": "abort"})
    delays: list[float] = []
    for _ in range(3):
        start = wait_up(watch, "b")
        killed_ns = brief.kill_agent("b")
        down = watch.wait_change("b", "UNREACHABLE", start=start)
        delays.append(told_after(watch, down, killed_ns))
        brief.restart_agent("b")
        watch.wait_change("b", "UP", start=down)
    print(f"\nUNREACHABLE after {', '.join(f'{delay * 1000:.1f} ms' for delay in delays)}")
    assert max(delays) < NOTICED_S


def test_an_agent_does_not_run_for_longer_than_its_lease(brief: Rig, lab: Lab) -> None:
    """UNREACHABLE; and when it goes on nothing is missing."""
    pace = brief.pace(lab, "a", rate=300)
    follow = brief.listener(lab, pace.tree)
    pace.go()
    follow.wait_more(MIDST)
    start = wait_up(follow, "a")
    with brief.agent_stopped("a"):
        down = follow.wait_change("a", "UNREACHABLE", start=start)
    follow.wait_change("a", "UP", start=down)
    truth = pace.stop()
    follow.wait_counted(truth.total)
    assert follow.account.read().differences({"a": truth}, whole=True) == []


def test_a_link_that_flaps(brief: Rig, lab: Lab) -> None:
    """Down and up many times, for shorter and for longer than a lease: nothing is missing, nothing comes twice."""
    draw = random.Random(7)
    pace = brief.pace(lab, "a", rate=300)
    follow = brief.listener(lab, pace.tree)
    pace.go()
    for number in range(10):
        follow.wait_more(50)
        # The other node's doings are what times this: a count of deeds at a steady rate.
        span = brief.pace(lab, "b", rate=100, count=draw.randrange(1, 60), mix="t", seed=number)
        with brief.cut("a"):
            span.go()
            span.done()
    follow.wait_more(MIDST)
    truth = pace.stop()
    follow.wait_counted(truth.total)
    changes = [line["state"] for line in follow.account.read().of_kind("node", node="a")]
    print(f"\n{' '.join(changes)}; {follow.account.summary(truth.total)}")
    assert changes[-1:] in ([], ["UP"])
    assert follow.account.differences({"a": truth}, whole=True) == []


def test_the_brokers_link(brief: Rig, lab: Lab) -> None:
    """All nodes are cut off, and the monitors too, for longer than TCP's first retries."""
    paces = {name: brief.pace(lab, name, rate=200) for name in ("a", "b")}
    follow = brief.listener(lab, *(pace.tree for pace in paces.values()))
    span = brief.pace(lab, "b", rate=100, count=200, mix="t")
    for pace in paces.values():
        pace.go()
    follow.wait_more(MIDST)
    with brief.cut("broker"):
        span.go()
        span.done()
    follow.wait_more(MIDST)
    truths = {name: pace.stop() for name, pace in paces.items()}
    total = sum(truth.total for truth in truths.values())
    follow.wait_counted(total)
    print(f"\n{follow.account.read().summary(total)}")
    assert follow.account.differences(truths, whole=True) == []


@pytest.mark.timeout(90)
def test_a_split_that_heals_never_leaves_two(brief: Rig, lab: Lab) -> None:
    """Another agent takes the name of a node that is cut off. When that comes back it is refused, and ends with one line of error."""
    first = brief.node("twin")
    watch = brief.listener(lab, {"node": "twin", "events": "exit"})
    start = wait_up(watch, "twin")
    spare = brief.machines["spare"] = brief.net.machine(brief.lab, "spare")
    with brief.cut("twin"):
        watch.wait_change("twin", "UNREACHABLE", start=start)
        second = spare.agent(lab, brief.address, node="twin", pin=False)
        up = watch.wait_change("twin", "UP", start=start)
    first.wait(40)
    brief.lab.expect(first, 2)
    assert first.stderr_text().splitlines()[-1].startswith("kmonitor-agent: error: node twin is connected to")
    assert brief.states()["twin"] == "UP"
    # The one that is left is the second: what ends in its machine is told, and what ended in the first one's is not.
    gone, seen = brief.idler(lab, "twin"), spare.idler(lab)
    gone.end(3)
    seen.end(4)
    watch.wait_end_of(seen.pid, start=up)
    account = watch.account.read()
    assert (seen.pid, 4) in account.ends["twin"]
    assert (gone.pid, 3) not in account.ends["twin"]
    assert account.wrong == []
    lab.stop(gone, seen, second)
