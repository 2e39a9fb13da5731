# SPDX-License-Identifier: Apache-2.0
"""A pid with a start time of one boot, on a node that is in another: nothing is armed, and no event comes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from kmonitor.v1 import agent_pb2, events_pb2, monitor_pb2
from kmonitor.wire.record import F_MATCH_NODE, F_MATCH_PROCESS
from tests.broker.records import EXIT, FORK, rec
from tests.broker.test_pidfile import PATH, Watch, agent_of, asked, next_call, tell
from tests.broker.test_server import EXITED, RUNNING, UNREACHABLE, Agent, World, registration, world

NO_NODE = monitor_pb2.REGISTRATION_STATE_NO_NODE
OWN = F_MATCH_PROCESS


@pytest.fixture
async def here() -> AsyncIterator[World]:
    async with world() as made:
        yield made


def pinned(boot_id: str, node: str = "", *, mask: int = 0x40) -> monitor_pb2.Registration:
    """Of pid 100 that started at 1000."""
    made = registration(mask, pid=100, node=node)
    made.target.process.start_time = 1000
    made.target.process.boot_id = boot_id
    return made


async def register(watch: Watch, request_id: int, wanted: monitor_pb2.Registration, boot_id: str) -> None:
    """As a client that was told of pid 100 on node a."""
    found = monitor_pb2.RegisterRequest.FoundProcess(node="a", pid=100, start_time=1000, boot_id=boot_id)
    request = monitor_pb2.RegisterRequest(registration=wanted, found=[found])
    await watch.call.write(monitor_pb2.WatchRequest(request_id=request_id, register=request))


async def reboot(agent: Agent) -> None:
    agent.call.cancel()
    agent.boot_id, agent.epoch, agent.position = "boot-2", agent.epoch + 1, 0
    await agent.connect(reads_pidfiles=True)


async def nothing_armed(watch: Watch, agent: Agent) -> None:
    """Neither by now, nor by the next message to the agent."""
    await watch.register(90, registration(0x08))
    interest = await agent.next_interest()
    assert (asked(interest), interest.node_mask) == ([], 0x08)


async def test_events_and_answers_carry_it(here: World) -> None:
    watch, agent = Watch(here), await agent_of(here)
    await watch.register(1, registration(0x48, pid=100))
    await agent.apply(await agent.next_interest())
    assert (await watch.registered()).boot_id == "boot-1"
    await agent.send([rec(FORK, 100, flags=OWN)])
    assert (await watch.next("events")).boot_id == "boot-1"
    agent.call.cancel()
    await watch.next("node")
    await watch.register(2, registration(0x40, pid=101))
    answer = await watch.registered()
    assert (answer.state, answer.boot_id) == (UNREACHABLE, "boot-1")
    await watch.register(3, registration(0x40, node="b"))
    assert (await watch.registered()).boot_id == ""


async def test_each_batch_has_its_own(here: World) -> None:
    watch, agent = Watch(here), await agent_of(here)
    await watch.register(1, registration(0x40))
    await agent.apply(await agent.next_interest())
    await watch.registered()
    await agent.send([rec(EXIT, 100, flags=F_MATCH_NODE)])
    await agent.ack_of(agent.position)
    await reboot(agent)
    await agent.apply(await agent.next_interest())
    await agent.send([rec(EXIT, 100, flags=F_MATCH_NODE)])
    assert [(await watch.next("events")).boot_id for _ in range(2)] == ["boot-1", "boot-2"]


async def test_processes_have_it(here: World) -> None:
    agent = await agent_of(here)
    call = here.monitor.ListProcesses(monitor_pb2.ListProcessesRequest(node="a"))
    while (message := await agent.read()).WhichOneof("kind") != "list_processes":
        pass
    listed = agent_pb2.ProcessList(call_id=message.list_processes.call_id, processes=[events_pb2.Process(pid=5)])
    await agent.call.write(agent_pb2.AgentMessage(processes=listed))
    answer = await call
    assert (answer.node, answer.boot_id, [process.pid for process in answer.processes]) == ("a", "boot-1", [5])


async def test_the_right_boot_is_armed(here: World) -> None:
    watch, agent = Watch(here), await agent_of(here)
    await watch.register(1, pinned("boot-1"))
    interest = await agent.next_interest()
    assert asked(interest) == [(100, 1000, 0x40, True)]
    await agent.apply(interest)
    assert (await watch.registered()).state == RUNNING
    await agent.send([rec(EXIT, 100, flags=OWN)])
    assert len((await watch.next("events")).events) == 1


@pytest.mark.parametrize("node", ["", "a"], ids=["every node", "named"])
async def test_another_boot(here: World, node: str) -> None:
    watch, agent = Watch(here), await agent_of(here)
    await watch.register(1, pinned("boot-0", node))
    answer = await watch.registered()
    assert (answer.state, answer.boot_id, answer.pending, answer.HasField("process")) == (EXITED, "boot-1", 0, False)
    gone = await watch.deregister(2, pinned("boot-0", node))
    assert gone.error.code == (5 if node else 0)  # "every node" may have another, later
    await nothing_armed(watch, agent)


async def test_another_boot_id_is_another_key(here: World) -> None:
    watch, agent = Watch(here), await agent_of(here)
    await watch.register(1, pinned("boot-1", "a"))
    await agent.apply(await agent.next_interest())
    await watch.registered()
    await watch.register(2, pinned("boot-0", "a"))
    answer = await watch.registered()
    assert (answer.registration_id, answer.state) == (2, EXITED)
    assert (await watch.deregister(3, pinned("", "a"))).error.code == 5
    assert (await watch.deregister(4, pinned("boot-1", "a"))).registration_id == 1


@pytest.mark.parametrize("names", ["", "a"], ids=["every node", "named"])
@pytest.mark.parametrize("by", ["target", "found"])
async def test_a_node_that_comes_later(here: World, by: str, names: str) -> None:
    watch = Watch(here)
    if by == "target":
        await watch.register(1, pinned("boot-0", names))
    else:
        await register(watch, 1, registration(0x40, pid=100, node=names), "boot-0")
    assert (await watch.registered()).state == (UNREACHABLE if names else NO_NODE)
    agent = Agent(here.channel)
    await agent.connect()
    assert asked(await agent.next_interest()) == []
    answer = await watch.registered()
    assert (answer.state, answer.node, answer.boot_id) == (EXITED, "a", "boot-1")
    await nothing_armed(watch, agent)


@pytest.mark.parametrize("known", ["boot-1", "boot-2"], ids=["by the broker too", "by the client first"])
async def test_a_node_that_is_away(here: World, known: str) -> None:
    """In which boot it is can be said when it is back."""
    watch, agent = Watch(here), await agent_of(here)
    await watch.register(1, registration(0x08, pid=7, node="a"))
    await agent.apply(await agent.next_interest())
    await watch.registered()
    agent.call.cancel()
    await watch.next("node")
    await watch.register(2, pinned(known, "a"))
    assert (await watch.registered()).state == UNREACHABLE
    await reboot(agent)
    interest = await agent.next_interest()
    assert asked(interest) == ([] if known == "boot-1" else [(100, 1000, 0x40, True)])
    await agent.apply(interest)
    states = {answer.registration_id: answer.state for answer in [await watch.registered() for _ in range(2)]}
    assert states == {1: EXITED, 2: EXITED if known == "boot-1" else RUNNING}


async def test_a_client_that_comes_back_to_a_pid_of_several_nodes(here: World) -> None:
    """On one of them the pid is another process by now, on one the node has booted, and one is new."""
    same, other, booted, fresh = [await agent_of(here, node) for node in ("a", "b", "c", "d")]
    watch = Watch(here)
    request = monitor_pb2.RegisterRequest(registration=registration(0x40, pid=100))
    for node, boot_id in (("a", "boot-1"), ("b", "boot-1"), ("c", "boot-0")):
        request.found.add(node=node, pid=100, start_time=1000, boot_id=boot_id)
    await watch.call.write(monitor_pb2.WatchRequest(request_id=1, register=request))
    assert (await watch.registered()).node == "c"
    for agent in (same, other):
        interest = await agent.next_interest()
        assert asked(interest) == [(100, 1000, 0x40, True)]
        await agent.apply(interest, gone=(100,) if agent is other else ())
    interest = await fresh.next_interest()
    assert asked(interest) == [(100, 0, 0x40, True)]
    await fresh.apply(interest)
    assert {answer.node: answer.state for answer in [await watch.registered() for _ in range(3)]} == {
        "a": RUNNING,
        "b": EXITED,
        "d": RUNNING,
    }
    await booted.send([rec(EXIT, 100, flags=OWN)])
    await other.send([rec(EXIT, 100, flags=OWN, start_boottime_ns=2000)])
    for agent in (booted, other):
        await agent.ack_of(agent.position)
    await same.send([rec(EXIT, 100, flags=OWN)])
    assert (await watch.next("events")).node == "a"
    # It is one registration, as the client asked for it. Asked for anew, the pid is whoever has it now.
    await watch.register(2, registration(0x40, pid=100))
    interest = await same.next_interest()
    assert asked(interest) == [(100, 0, 0x40, True)]
    await same.apply(interest)
    assert (await watch.registered()).registration_id == 1
    assert (await watch.deregister(3, registration(0x40, pid=100))).event_mask == 0


async def test_what_a_client_that_comes_back_has_missed(here: World) -> None:
    """The end of the process was among it, and nothing else is asked of the node: it is told of the gap all the same."""
    watch, agent = Watch(here), await agent_of(here)
    await watch.register(1, registration(0x40))
    await agent.apply(await agent.next_interest())
    await watch.registered()
    await agent.send([rec(EXIT, 7, flags=F_MATCH_NODE)])
    await watch.next("events")
    back = here.monitor.Watch()
    found = monitor_pb2.RegisterRequest.FoundProcess(node="a", pid=100, start_time=1000, boot_id="boot-0")
    request = monitor_pb2.RegisterRequest(registration=registration(0x40, pid=100), found=[found])
    cursor = monitor_pb2.Cursor(positions=[monitor_pb2.Cursor.Position(node="a", epoch=6, position=5000)])
    await back.write(monitor_pb2.WatchRequest(request_id=1, register=request, cursor=cursor))
    missing = (await back.read()).gap
    assert (missing.reason, missing.epoch, missing.from_position) == (monitor_pb2.GAP_REASON_LOG, 7, 0)
    assert (await back.read()).registered.state == EXITED


async def test_a_start_time_alone_gets_its_boot_from_what_was_found(here: World) -> None:
    watch, agent = Watch(here), await agent_of(here)
    await register(watch, 1, pinned("", "a"), "boot-0")
    assert (await watch.registered()).state == EXITED
    await nothing_armed(watch, agent)


async def test_by_pidfile(here: World) -> None:
    watch, agent = Watch(here), await agent_of(here)
    wanted = monitor_pb2.Registration(event_mask=0x40, target=monitor_pb2.Target(pidfile=PATH))
    await register(watch, 1, wanted, "boot-0")
    assert (await watch.registered()).state == EXITED
    # Asked for again it is what the file names now.
    await watch.register(2, wanted)
    await tell(agent, await next_call(agent), pid=100)
    await agent.apply(await agent.next_interest())
    assert (await watch.registered()).state == RUNNING
    await reboot(agent)
    ended = await watch.next("events")
    assert (ended.boot_id, [(event.pid, event.inferred) for event in ended.events]) == ("boot-1", [(100, True)])


async def test_what_was_asked_for_anew_was_not_there_in_the_boot_before(here: World) -> None:
    """A pid that has been somebody's, was asked for again, and nobody had answered yet."""
    watch, agent = Watch(here), await agent_of(here)
    await watch.register(1, registration(0x40, pid=100))
    await agent.apply(await agent.next_interest())
    await watch.registered()
    await agent.send([rec(EXIT, 100, flags=OWN)])
    await watch.next("events")
    await watch.register(2, registration(0x40, pid=100))
    await agent.next_interest()
    await reboot(agent)
    interest = await agent.next_interest()
    assert asked(interest) == [(100, 0, 0x40, True)]
    assert (await watch.registered()).state == UNREACHABLE
    await agent.apply(interest)
    assert (await watch.registered()).state == RUNNING


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ({"pid": 100, "boot_id": "boot-1"}, {}),
        ({"pid": 100, "start_time": 1000, "boot_id": "boot 1"}, {}),
        ({"pid": 100, "start_time": 1000, "boot_id": "x" * 129}, {}),
        ({"pid": 100}, {"pid": 100, "boot_id": "boot-1"}),
        ({"pid": 100}, {"pid": 101, "start_time": 1000}),
        ({"pid": 100, "start_time": 1000}, {"pid": 100, "start_time": 1001}),
        ({"pid": 100, "start_time": 1000, "boot_id": "a"}, {"pid": 100, "start_time": 1000, "boot_id": "b"}),
    ],
)
async def test_bad_requests(here: World, target: dict[str, Any], found: dict[str, Any]) -> None:
    watch, agent = Watch(here), await agent_of(here)
    wanted = monitor_pb2.Registration(event_mask=0x40, target=monitor_pb2.Target(process=monitor_pb2.ProcessTarget(**target)))
    request = monitor_pb2.RegisterRequest(registration=wanted)
    if found:
        request.found.add(node="a", **found)
    await watch.call.write(monitor_pb2.WatchRequest(request_id=1, register=request))
    assert (await watch.registered()).error.code == 3
    await nothing_armed(watch, agent)
