# SPDX-License-Identifier: Apache-2.0
"""A pid is given out again: nobody who asked for the first process hears of the second, however late the agent is."""

from __future__ import annotations

import asyncio

import pytest

from kmonitor.clients import Event, Gap, Monitor, NodeChange, RegistrationState, connect
from tests.lab.process import Running
from tests.lab.same_pid import stranger
from tests.lab.services import Agent, Lab
from tests.lab.stopped import stopped
from tests.lab.worker import Worker, worker

RUNNING = RegistrationState.RUNNING
EXITED = RegistrationState.EXITED
EXEC, EXIT, FORK = 0x20, 0x40, 0x08
LIMIT = 20.0


@pytest.fixture
def agent(service: tuple[str, str], module_lab: Lab) -> Running:
    """The one of the service."""
    return next(process for process in module_lab.running if isinstance(process, Agent))


async def start_of(monitor: Monitor, node: str, process: Worker, events: str = "all", *, follow: bool = False) -> int:
    """Register a process that runs; its start time."""
    async with asyncio.timeout(LIMIT):
        answer = await monitor.register(node=node, pid=process.pid, events=events, follow=follow)
    found = answer.process(node)
    assert answer.states == {node: RUNNING}
    assert found is not None
    return found.start_time


async def rest(monitor: Monitor, fence: int) -> list[Event]:
    """All events before the end of a fence that has ended."""
    events: list[Event] = []
    async with asyncio.timeout(LIMIT):
        async for item in monitor:
            assert not isinstance(item, Gap | NodeChange), item
            if isinstance(item, Event):
                if item.pid == fence:
                    return events
                events.append(item)
    raise AssertionError("the stream has ended")


async def heard(monitor: Monitor, fence: Worker) -> list[Event]:
    """All events before the end of the fence, which is registered, and ends now."""
    fence.end(0)
    return await rest(monitor, fence.pid)


async def test_a_registration_of_the_past_is_not_for_the_stranger(service: tuple[str, str], lab: Lab) -> None:
    address, node = service
    async with connect(address) as monitor:
        first, fence = worker(lab), worker(lab)
        await start_of(monitor, node, fence, "exit")
        async with connect(address) as other:
            start = await start_of(other, node, first)
        first.end(1)
        second = stranger(lab, first)
        async with asyncio.timeout(LIMIT):
            late = await monitor.register(node=node, pid=first.pid, start_time=start, events="all", follow=True)
        assert late.states == {node: EXITED}
        second.work()
        second.end(2)
        assert await heard(monitor, fence) == []


@pytest.mark.parametrize("follow", [False, True], ids=["alone", "followed"])
async def test_the_first_ends_while_the_agent_sleeps(service: tuple[str, str], lab: Lab, agent: Running, follow: bool) -> None:
    """By then its pid is another's, which has forked, executed and ended, too."""
    address, node = service
    async with connect(address) as monitor:
        first, fence = worker(lab), worker(lab)
        await start_of(monitor, node, fence, "exit")
        start = await start_of(monitor, node, first, follow=follow)
        with stopped(agent):
            first.work()
            first.end(7)
            second = stranger(lab, first)
            second.work()
            second.end(8)
        events = await heard(monitor, fence)
    of_first = [event for event in events if event.pid == first.pid]
    assert [(event.type, event.start_time) for event in of_first] == [(FORK, start), (EXIT, start)]
    assert of_first[-1].exit_code == 7
    children = [event for event in events if event.pid != first.pid]
    assert [event.type for event in children] == ([EXEC, EXIT] if follow else [])
    assert {event.ppid for event in children} <= {first.pid}
    # Each child of the first, and none of the stranger's: the fork names it by its start.
    assert all(event.start_time == of_first[0].child_start_time for event in children)


async def test_who_asks_for_a_pid_gets_the_process_that_has_it_when_the_agent_looks(
    service: tuple[str, str], lab: Lab, agent: Running
) -> None:
    """Two ask: the one before, for the first process, and the other while the agent sleeps, for whatever has the pid."""
    address, node = service
    async with connect(address) as before, connect(address) as meanwhile, connect(address) as past:
        first, fence = worker(lab), worker(lab)
        start = await start_of(before, node, first)
        for monitor in (before, meanwhile, past):
            await start_of(monitor, node, fence, "exit")
        with stopped(agent):
            asked = asyncio.create_task(meanwhile.register(node=node, pid=first.pid, events="all"))
            pinned = asyncio.create_task(past.register(node=node, pid=first.pid, start_time=start, events="all"))
            await asyncio.sleep(0)
            first.work()
            first.end(7)
            second = stranger(lab, first)
        async with asyncio.timeout(LIMIT):
            answer, late = await asked, await pinned
        found = answer.process(node)
        assert answer.states == {node: RUNNING}
        assert found is not None
        assert found.start_time > start
        assert late.states == {node: EXITED}
        second.work()
        second.end(8)
        # The fence ends once, for all three.
        of_first = await heard(before, fence)
        of_second = await rest(meanwhile, fence.pid)
        assert await rest(past, fence.pid) == []
    assert [(event.type, event.start_time) for event in of_first] == [(FORK, start), (EXIT, start)]
    assert [(event.type, event.start_time) for event in of_second] == [(FORK, found.start_time), (EXIT, found.start_time)]
    assert (of_first[-1].exit_code, of_second[-1].exit_code) == (7, 8)
