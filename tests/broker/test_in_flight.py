# SPDX-License-Identifier: Apache-2.0
"""Two requests for the same registration, and the agent answers the first when it has the second already."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from kmonitor.v1 import agent_pb2, events_pb2, monitor_pb2
from kmonitor.wire.record import F_MATCH_CGROUP, F_MATCH_PROCESS
from tests.broker.records import EXEC, EXIT, rec
from tests.broker.test_pidfile import Watch, agent_of, asked, next_call, tell, wanted
from tests.broker.test_server import ARMED, EXITED, RUNNING, Agent, World, registration, world

FULL = "the table is full"


@pytest.fixture
async def here() -> AsyncIterator[World]:
    async with world() as made:
        yield made


async def two_asked(here: World, first: monitor_pb2.Registration, second: monitor_pb2.Registration) -> tuple[Watch, Agent, list[int]]:
    """Both have reached the agent, in messages of their own: their versions."""
    watch, agent = Watch(here), await agent_of(here)
    versions = []
    for number, made in enumerate((first, second), 1):
        await watch.register(number, made)
        versions.append((await agent.next_interest()).version)
    return watch, agent, versions


async def answer(agent: Agent, version: int, **result: Any) -> None:
    """Of pid 100: with an error, or a state."""
    told = agent_pb2.InterestApplied(version=version, position=agent.position)
    told.processes.add(pid=100, **result)
    await agent.call.write(agent_pb2.AgentMessage(applied=told))


async def armed(agent: Agent, version: int) -> None:
    await answer(agent, version, state=RUNNING, process=events_pb2.Process(pid=100, start_time=1000))


def watched(here: World) -> int:
    node = here.broker.nodes.get("a")
    assert node is not None
    return node.interest.watched_processes


@pytest.mark.parametrize("fault", ["error", "exited"])
@pytest.mark.parametrize("names", ["a", ""], ids=["named", "every node"])
async def test_the_second_is_armed(here: World, fault: str, names: str) -> None:
    both = registration(0x40, pid=100, node=names), registration(0x20, pid=100, node=names)
    watch, agent, versions = await two_asked(here, *both)
    if fault == "error":
        await answer(agent, versions[0], error=FULL)
        assert (await watch.registered()).error.message == f"node a: {FULL}"
    else:
        await answer(agent, versions[0], state=EXITED)
        assert (await watch.registered()).state == EXITED
    await armed(agent, versions[1])
    granted = await watch.registered()
    assert (granted.request_id, granted.registration_id, granted.state) == (2, 1, RUNNING)
    assert watched(here) == 1
    await agent.send([rec(EXEC, 100, flags=F_MATCH_PROCESS)])
    assert [event.type for event in (await watch.next("events")).events] == [EXEC]
    # It is there still, and can be given back.
    assert (await watch.deregister(3, registration(0x7F, pid=100, node=names))).event_mask == 0
    assert asked(await agent.next_interest()) == [(100, 1000, 0, False)]
    assert watched(here) == 0


async def test_none_is_armed(here: World) -> None:
    both = registration(0x40, pid=100, node="a"), registration(0x20, pid=100, node="a")
    watch, agent, versions = await two_asked(here, *both)
    for version in versions:
        await answer(agent, version, error=FULL)
        assert (await watch.registered()).error.code == 8
    assert watched(here) == 0
    assert (await watch.deregister(3, registration(0x60, pid=100, node="a"))).error.code == 5


async def test_the_process_ends_while_more_is_asked(here: World) -> None:
    """What the second request finds is another process that has the pid by then."""
    one = registration(0x40, pid=100, node="a")
    watch, agent, versions = await two_asked(here, one, one)
    await armed(agent, versions[0])
    assert (await watch.registered()).state == RUNNING
    await agent.send([rec(EXIT, 100, flags=F_MATCH_PROCESS)])
    await watch.next("events")
    await answer(agent, versions[1], state=RUNNING, process=events_pb2.Process(pid=100, start_time=2000))
    assert (await watch.registered()).process.start_time == 2000
    assert watched(here) == 1
    await agent.send([rec(EXIT, 100, flags=F_MATCH_PROCESS, start_boottime_ns=2000)])
    assert [event.start_time for event in (await watch.next("events")).events] == [2000]
    assert (await watch.deregister(3, one)).error.code == 5
    assert watched(here) == 0


async def test_a_group(here: World) -> None:
    """Not there for the first, and there for the second: the agent is not told to drop what it has just armed."""
    both = registration(0x40, cgroup="/g", node="a"), registration(0x20, cgroup="/g", node="a")
    watch, agent, versions = await two_asked(here, *both)
    told = agent_pb2.InterestApplied(version=versions[0])
    told.groups.add(cgroup="/g", state=monitor_pb2.REGISTRATION_STATE_NOT_FOUND)
    await agent.call.write(agent_pb2.AgentMessage(applied=told))
    assert (await watch.registered()).state == monitor_pb2.REGISTRATION_STATE_NOT_FOUND
    told = agent_pb2.InterestApplied(version=versions[1])
    told.groups.add(cgroup="/g", state=ARMED, cgroup_ids=[20, 1])
    await agent.call.write(agent_pb2.AgentMessage(applied=told))
    assert (await watch.registered()).state == ARMED
    await agent.send([rec(EXEC, 5, flags=F_MATCH_CGROUP, match_cgroup_id=20)])
    assert len((await watch.next("events")).events) == 1
    await watch.register(3, registration(0x08, node="a"))
    interest = await agent.next_interest()
    assert ([(group.cgroup, group.event_mask) for group in interest.groups], interest.node_mask) == ([], 0x08)


async def test_a_pidfile_that_two_wait_for(here: World) -> None:
    """If it names no process, nothing is registered: whichever of the two was told so first."""
    watch, agent = Watch(here), await agent_of(here)
    await watch.register(1, wanted(0x40))
    await watch.register(2, wanted(0x20))
    call = await next_call(agent)
    await watch.register(3, registration(0x08))
    await agent.next_interest()  # all three have come
    await tell(agent, call, 0, error="is empty")
    assert [(await watch.registered()).error.code for _ in range(2)] == [9, 9]
    assert (await watch.deregister(4, wanted(0x60))).error.code == 5


async def test_the_agent_goes_away_in_between(here: World) -> None:
    one = registration(0x40, pid=100, node="a")
    watch, agent, _ = await two_asked(here, one, one)
    agent.call.cancel()
    assert [(await watch.registered()).state for _ in range(2)] == [monitor_pb2.REGISTRATION_STATE_NODE_UNREACHABLE] * 2
    await agent.connect(reads_pidfiles=True)
    await answer(agent, (await agent.next_interest()).version, state=EXITED)
    assert (await watch.registered()).state == EXITED
    assert (await watch.deregister(3, one)).error.code == 5
    assert watched(here) == 0


async def test_deregistered_before_the_answer(here: World) -> None:
    """Nothing is delivered, and who has asked does not wait for ever."""
    watch, agent = Watch(here), await agent_of(here)
    one = registration(0x40, pid=100, node="a")
    await watch.register(1, one)
    version = (await agent.next_interest()).version
    assert (await watch.deregister(2, one)).event_mask == 0
    await armed(agent, version)
    told = await watch.registered()
    assert (told.request_id, told.pending, told.error.code) == (1, 0, 10)
    assert watched(here) == 0
