# SPDX-License-Identifier: Apache-2.0
"""Children whose fork was not told, over real gRPC: what agents are asked for, and when a registration is over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from kmonitor.v1 import agent_pb2
from kmonitor.wire.record import F_MATCH_PROCESS
from tests.broker.records import EXEC, EXIT, FORK, Rec, rec
from tests.broker.test_server import RUNNING, Agent, World, next_of, registration, subscribe, world

NUMBER = 5
"""Of the agent's change that armed the root."""


@pytest.fixture
async def here() -> AsyncIterator[World]:
    async with world() as made:
        yield made


def own(kind: int, pid: int, root: int = 0, **more: Any) -> Rec:
    return rec(kind, pid, flags=F_MATCH_PROCESS, root_tgid=root, root_start_boottime_ns=root * 10, root_armed=NUMBER if root else 0, **more)


async def apply(agent: Agent, interest: agent_pb2.Interest, number: int = NUMBER, *, gone: tuple[int, ...] = ()) -> None:
    """As Agent.apply, of processes only, with the number of the change."""
    answer = agent_pb2.InterestApplied(version=interest.version, position=agent.position, end_position=agent.position, number=number)
    for item in interest.processes:
        if item.look_up:
            state = "REGISTRATION_STATE_EXITED" if item.pid in gone else "REGISTRATION_STATE_RUNNING"
            result = answer.processes.add(pid=item.pid, start_time=item.start_time, state=state)
            result.process.pid, result.process.start_time = item.pid, item.pid * 10
    await agent.call.write(agent_pb2.AgentMessage(applied=answer))


async def following(here: World) -> tuple[Agent, Any]:
    """A node on which a process is followed, and the monitor."""
    agent = Agent(here.channel)
    await agent.connect()
    await agent.next_interest()
    call = subscribe(here, registration(EXIT, pid=100, follow=True))
    interest = await agent.next_interest()
    assert [(item.pid, item.root) for item in interest.processes] == [(100, True)]
    await apply(agent, interest)
    assert (await next_of(call, "registered")).state == RUNNING
    return agent, call


def watched(here: World) -> int:
    node = here.broker.nodes.get("a")
    assert node is not None
    return node.interest.watched_processes


async def test_to_its_end(here: World) -> None:
    agent, call = await following(here)
    await agent.send([own(EXEC, 102, 100)])
    # Its end may have been lost as its fork was: the agent is asked whether it lives. It is no root of its own.
    interest = await agent.next_interest()
    assert {(item.pid, item.start_time, item.event_mask, item.follow, item.look_up, item.root) for item in interest.processes} == {
        (100, 1000, EXIT | FORK, True, True, True),
        (102, 1020, EXIT | FORK, True, True, False),
    }
    await apply(agent, interest, NUMBER + 1)
    assert watched(here) == 2
    await agent.send([own(EXIT, 100), own(EXIT, 102, 100)])
    events = (await next_of(call, "events")).events
    assert [event.pid for event in events] == [100, 102]
    assert watched(here) == 0


async def test_its_end_was_lost_too(here: World) -> None:
    agent, call = await following(here)
    await agent.send([own(EXEC, 102, 100)])
    await apply(agent, await agent.next_interest(), NUMBER + 1, gone=(102,))
    await agent.send([own(EXIT, 100)])
    assert [event.pid for event in (await next_of(call, "events")).events] == [100]
    assert watched(here) == 0


async def test_all_that_was_known_has_ended_a_moment_ago(here: World) -> None:
    agent, call = await following(here)
    await agent.send([own(EXIT, 100)])
    await next_of(call, "events")
    await agent.send([own(EXEC, 102, 100)])
    await apply(agent, await agent.next_interest(), NUMBER + 1)
    await agent.send([own(EXIT, 102, 100)])
    assert [event.pid for event in (await next_of(call, "events")).events] == [102]
    assert watched(here) == 0


async def test_the_streams_end_removes_it_from_the_interest(here: World) -> None:
    agent, call = await following(here)
    await agent.send([own(EXIT, 100), own(EXEC, 102, 100)])
    await next_of(call, "events")
    await agent.next_interest()
    call.cancel()
    interest = await agent.next_interest()
    assert [(item.pid, item.event_mask) for item in interest.processes] == [(102, 0)]
    assert watched(here) == 0
    await agent.send([own(EXEC, 103, 100)])
    await agent.ack_of(agent.position)
    assert watched(here) == 0


async def test_of_the_bits_that_are_left(here: World) -> None:
    agent = Agent(here.channel)
    await agent.connect()
    await agent.next_interest()
    call = subscribe(here, registration(EXIT | EXEC, pid=100, follow=True))
    await apply(agent, await agent.next_interest())
    await next_of(call, "registered")
    (session,) = here.broker.sessions
    await agent.send([own(FORK, 100, child_tgid=101, child_start_boottime_ns=1010), own(EXIT, 100)])
    await next_of(call, "events")
    here.broker.deregister(session, 9, registration(EXEC, pid=100, follow=True))
    await agent.send([own(EXEC, 102, 100), own(EXIT, 102, 100), own(EXEC, 101, 100), own(EXIT, 101, 100)])
    assert [(event.pid, event.type) for event in (await next_of(call, "events")).events] == [(102, EXIT), (101, EXIT)]


async def test_forked_while_the_agent_was_away(here: World) -> None:
    agent, call = await following(here)
    agent.call.cancel()
    await next_of(call, "node")
    await agent.connect()
    interest = await agent.next_interest()
    assert [(item.pid, item.start_time, item.root) for item in interest.processes] == [(100, 1000, True)]
    await apply(agent, interest, NUMBER + 1)
    # Armed before, and armed again: children of either time are this registration's.
    later = rec(EXIT, 103, flags=F_MATCH_PROCESS, root_tgid=100, root_start_boottime_ns=1000, root_armed=NUMBER + 1)
    await agent.send([own(EXIT, 102, 100), later, own(EXIT, 104)])
    assert [event.pid for event in (await next_of(call, "events")).events] == [102, 103]
