# SPDX-License-Identifier: Apache-2.0
"""Pidfiles over real gRPC: the test plays the agent that reads them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from kmonitor.v1 import agent_pb2, events_pb2, monitor_pb2
from kmonitor.wire.record import F_MATCH_PROCESS
from tests.broker.records import EXIT, FORK, rec
from tests.broker.test_server import EXITED, RUNNING, UNREACHABLE, Agent, World, next_of, world

NOT_FOUND = monitor_pb2.REGISTRATION_STATE_NOT_FOUND
PATH = "/run/x.pid"
OWN = F_MATCH_PROCESS


@pytest.fixture
async def here() -> AsyncIterator[World]:
    async with world() as made:
        yield made


async def agent_of(here: World, node: str = "a", **more: Any) -> Agent:
    agent = Agent(here.channel, node=node)
    await agent.connect(**{"reads_pidfiles": True, **more})
    await agent.next_interest()
    return agent


async def next_call(agent: Agent) -> agent_pb2.ReadPidfileCall:
    while (message := await agent.read()).WhichOneof("kind") != "read_pidfile":
        pass
    return message.read_pidfile


async def tell(agent: Agent, call: agent_pb2.ReadPidfileCall, state: Any = RUNNING, *, pid: int = 0, error: str = "") -> None:
    answer = agent_pb2.PidfileRead(call_id=call.call_id, state=state, error=error)
    if pid:
        answer.process.CopyFrom(events_pb2.Process(pid=pid, start_time=pid * 10))
    await agent.call.write(agent_pb2.AgentMessage(pidfile_read=answer))


def wanted(mask: int = 0x40, node: str = "", *, follow: bool = False) -> monitor_pb2.Registration:
    made = monitor_pb2.Registration(event_mask=mask, follow=follow, target=monitor_pb2.Target(pidfile=PATH))
    if node:
        made.nodes.names.append(node)
    return made


class Watch:
    """A Watch stream."""

    def __init__(self, here: World) -> None:
        self.call = here.monitor.Watch()

    async def register(self, request_id: int, registration: monitor_pb2.Registration, **found: tuple[int, int]) -> None:
        request = monitor_pb2.RegisterRequest(registration=registration)
        for node, (pid, start_time) in found.items():
            request.found.add(node=node, pid=pid, start_time=start_time)
        await self.call.write(monitor_pb2.WatchRequest(request_id=request_id, register=request))

    async def deregister(self, request_id: int, registration: monitor_pb2.Registration) -> monitor_pb2.Deregistered:
        request = monitor_pb2.DeregisterRequest(registration=registration)
        await self.call.write(monitor_pb2.WatchRequest(request_id=request_id, deregister=request))
        answer: monitor_pb2.Deregistered = await self.next("deregistered")
        return answer

    async def registered(self) -> monitor_pb2.Registered:
        answer: monitor_pb2.Registered = await self.next("registered")
        return answer

    async def next(self, kind: str) -> Any:
        return await next_of(self.call, kind)


def asked(interest: agent_pb2.Interest) -> list[tuple[int, int, int, bool]]:
    return [(item.pid, item.start_time, item.event_mask, item.look_up) for item in interest.processes]


async def running(here: World, watch: Watch, pid: int = 100) -> Agent:
    """An agent on which the watch has a registration of what the file names."""
    agent = await agent_of(here)
    await watch.register(1, wanted())
    await tell(agent, await next_call(agent), pid=pid)
    await agent.apply(await agent.next_interest())
    assert (await watch.registered()).state == RUNNING
    return agent


async def test_read_and_then_armed_by_start_time(here: World) -> None:
    watch, agent = Watch(here), await agent_of(here)
    await watch.register(3, wanted(0x40))
    call = await next_call(agent)
    assert call.path == PATH
    await tell(agent, call, pid=100)
    interest = await agent.next_interest()
    assert asked(interest) == [(100, 1000, 0x40, True)]
    await agent.apply(interest)
    answer = await watch.registered()
    assert (answer.state, answer.request_id, answer.process.pid, answer.pending, answer.target.pidfile) == (RUNNING, 3, 100, 0, PATH)
    # The same key again: the file is not read again, and the bits are added.
    await watch.register(4, wanted(0x20))
    interest = await agent.next_interest()
    assert asked(interest) == [(100, 1000, 0x60, True)]
    await agent.apply(interest)
    answer = await watch.registered()
    assert (answer.registration_id, answer.event_mask) == (3, 0x60)
    assert (await watch.deregister(5, wanted(0x60))).event_mask == 0
    assert asked(await agent.next_interest()) == [(100, 1000, 0, False)]


async def test_two_requests_wait_for_one_reading(here: World) -> None:
    watch, agent = Watch(here), await agent_of(here)
    await watch.register(1, wanted(0x40))
    await watch.register(2, wanted(0x20))
    call = await next_call(agent)
    await watch.register(3, monitor_pb2.Registration(event_mask=0x40))
    assert (await agent.next_interest()).node_mask == 0x40  # all three have come
    await tell(agent, call, pid=100)
    interest = await agent.next_interest()
    assert asked(interest) == [(100, 1000, 0x60, True)]
    await agent.apply(interest)
    states = {answer.request_id: answer.state for answer in [await watch.registered() for _ in range(3)]}
    assert (states[1], states[2]) == (RUNNING, RUNNING)


async def test_what_is_armed_is_armed_again_and_the_file_is_not_read(here: World) -> None:
    watch = Watch(here)
    agent = await running(here, watch)
    agent.call.cancel()
    await watch.next("node")
    await agent.connect(reads_pidfiles=True)
    interest = await agent.next_interest()
    assert asked(interest) == [(100, 1000, 0x40, True)]
    await agent.apply(interest, gone=(100,))
    assert (await watch.registered()).state == EXITED
    # Now that it is over, to register again is to read the file.
    await watch.register(2, wanted())
    await tell(agent, await next_call(agent), pid=200)
    interest = await agent.next_interest()
    assert asked(interest) == [(200, 2000, 0x40, True)]


@pytest.mark.parametrize("answered", [False, True])
async def test_what_was_never_armed_is_read_when_the_node_returns(here: World, answered: bool) -> None:
    """Also if the file was read, and the node went away before the kernel was armed."""
    watch, agent = Watch(here), await agent_of(here)
    await watch.register(1, wanted())
    call = await next_call(agent)
    if answered:
        await tell(agent, call, pid=100)
        assert asked(await agent.next_interest()) == [(100, 1000, 0x40, True)]
    agent.call.cancel()
    assert (await watch.registered()).state == UNREACHABLE
    await agent.connect(reads_pidfiles=True)
    assert asked(await agent.next_interest()) == []
    await tell(agent, await next_call(agent), pid=200)
    await agent.apply(await agent.next_interest())
    answer = await watch.registered()
    assert (answer.state, answer.process.pid) == (RUNNING, 200)
    await agent.send([rec(EXIT, 100, flags=OWN), rec(EXIT, 200, flags=OWN, start_boottime_ns=2000)])
    assert [event.pid for event in (await watch.next("events")).events] == [200]


async def test_the_next_agent_is_asked_what_the_last_one_left_open(here: World) -> None:
    watch, agent = Watch(here), await agent_of(here)
    await watch.register(7, wanted())
    await next_call(agent)
    successor = await agent_of(here)
    await tell(successor, await next_call(successor), pid=100)
    await successor.apply(await successor.next_interest())
    answer = await watch.registered()
    assert (answer.request_id, answer.state) == (7, RUNNING)


async def test_a_node_that_joins_later(here: World) -> None:
    watch = Watch(here)
    await watch.register(1, wanted())
    assert (await watch.registered()).state == monitor_pb2.REGISTRATION_STATE_NO_NODE
    for node, pid in (("a", 100), ("b", 200)):
        agent = await agent_of(here, node)
        await tell(agent, await next_call(agent), pid=pid)
        await agent.apply(await agent.next_interest())
        answer = await watch.registered()
        assert (answer.node, answer.state, answer.process.pid) == (node, RUNNING, pid)


async def test_what_the_file_may_say(here: World) -> None:
    watch, agent = Watch(here), await agent_of(here)
    for number, state in enumerate((EXITED, NOT_FOUND), 1):
        await watch.register(number, wanted(node="a"))
        await tell(agent, await next_call(agent), state)
        answer = await watch.registered()
        assert (answer.state, answer.request_id, answer.HasField("error")) == (state, number, False)
        assert (await watch.deregister(50, wanted(node="a"))).error.code == 5
    await watch.register(9, wanted())
    await tell(agent, await next_call(agent), 0, error="is empty")
    answer = await watch.registered()
    assert (answer.node, answer.error.code, answer.error.message) == ("a", 9, "node a: pidfile '/run/x.pid' is empty")
    # Nothing is registered, though "every node" could have others.
    assert (await watch.deregister(50, wanted())).error.code == 5


async def test_one_node_of_two_refuses(here: World) -> None:
    watch, first, second = Watch(here), await agent_of(here, "a"), await agent_of(here, "b")
    await watch.register(1, wanted())
    await tell(first, await next_call(first), 0, error="is empty")
    answer = await watch.registered()
    assert (answer.node, answer.error.code, answer.pending) == ("a", 9, 1)
    await tell(second, await next_call(second), pid=100)
    await second.apply(await second.next_interest())
    answer = await watch.registered()
    assert (answer.node, answer.state, answer.pending) == ("b", RUNNING, 0)
    assert (await watch.deregister(2, wanted())).error.code == 0


async def test_an_agent_that_knows_no_pidfiles(here: World) -> None:
    watch, agent = Watch(here), await agent_of(here, reads_pidfiles=False, agent_version="0.0.9")
    await watch.register(1, wanted())
    answer = await watch.registered()
    assert answer.error.message == "node a: pidfile '/run/x.pid' cannot be read by this node's agent (version 0.0.9): upgrade it"
    assert agent.call is not None


async def test_deregistered_while_the_file_is_read(here: World) -> None:
    watch, agent = Watch(here), await agent_of(here)
    await watch.register(1, wanted())
    call = await next_call(agent)
    assert (await watch.deregister(2, wanted())).event_mask == 0
    await tell(agent, call, pid=100)
    await watch.register(3, monitor_pb2.Registration(event_mask=0x08))
    interest = await agent.next_interest()
    assert (asked(interest), interest.node_mask) == ([], 0x08)
    assert all(session.pending == 1 for session in here.broker.sessions)


async def test_a_client_that_comes_back_has_its_process(here: World) -> None:
    watch, agent = Watch(here), await agent_of(here)
    await watch.register(1, wanted(), a=(100, 1000), nosuch=(5, 50))
    interest = await agent.next_interest()
    assert asked(interest) == [(100, 1000, 0x40, True)]
    await agent.apply(interest)
    answer = await watch.registered()
    assert (answer.state, answer.target.pidfile) == (RUNNING, PATH)
    await watch.deregister(2, wanted())
    await watch.register(3, wanted(), a=(101, 1010))
    while (101, 1010, 0x40, True) not in asked(interest := await agent.next_interest()):
        pass
    await agent.apply(interest, gone=(101,))
    assert (await watch.registered()).state == EXITED
    await watch.register(4, wanted())
    assert (await next_call(agent)).path == PATH
    await watch.register(5, wanted(0x20), a=(-1, 1))
    assert (await watch.registered()).error.code == 3


async def test_a_client_that_comes_back_before_the_node(here: World) -> None:
    watch = Watch(here)
    await watch.register(1, wanted(node="a"), a=(100, 1000))
    assert (await watch.registered()).state == UNREACHABLE
    agent = Agent(here.channel)
    await agent.connect(reads_pidfiles=True)
    interest = await agent.next_interest()
    assert asked(interest) == [(100, 1000, 0x40, True)]
    await agent.apply(interest)
    assert (await watch.registered()).state == RUNNING


async def test_the_file_is_read_anew_when_only_children_are_left(here: World) -> None:
    watch, agent = Watch(here), await agent_of(here)
    await watch.register(1, wanted(follow=True))
    await tell(agent, await next_call(agent), pid=100)
    await agent.apply(await agent.next_interest())
    await watch.registered()
    await agent.send([rec(FORK, 100, flags=OWN, child_tgid=101, child_tid=101, child_start_boottime_ns=1010), rec(EXIT, 100, flags=OWN)])
    assert [event.pid for event in (await watch.next("events")).events] == [100]
    await watch.register(2, wanted(follow=True))
    await tell(agent, await next_call(agent), pid=200)
    interest = await agent.next_interest()
    assert (200, 2000, 0x48, True) in asked(interest)
    await agent.apply(interest)
    assert (await watch.registered()).process.pid == 200
    await agent.send([rec(EXIT, 101, flags=OWN), rec(EXIT, 200, flags=OWN)])
    assert [event.pid for event in (await watch.next("events")).events] == [101, 200]


@pytest.mark.parametrize("path", ["", "run/x.pid", "/x\0", "/" + "x" * 4096, "/" + "é" * 2048])
async def test_bad_paths(here: World, path: str) -> None:
    made = monitor_pb2.Registration(event_mask=0x40, target=monitor_pb2.Target(pidfile=path))
    with pytest.raises(grpc.aio.AioRpcError, match=r"INVALID_ARGUMENT(.|\n)*give an absolute path of at most 4096 bytes"):
        await next_of(here.monitor.Subscribe(monitor_pb2.SubscribeRequest(registrations=[made])), "registered")
