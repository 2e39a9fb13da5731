# SPDX-License-Identifier: Apache-2.0
"""A process is node, boot id, pid and start time: through reconnects, reboots and reused pids."""

from __future__ import annotations

import asyncio

import pytest

from kmonitor.clients import BadSelectorError, Event, Monitor, ProcessExitedError, RegistrationState, Selection, connect, sync
from kmonitor.clients.selection import registration
from kmonitor.v1 import monitor_pb2
from tests.clients.conftest import Kmon
from tests.clients.fake_broker import BOOT, EXIT, FakeBroker, Session, batch, event, process_of, progress
from tests.clients.fake_broker import registered as answer_of
from tests.clients.test_pidfile import next_registered
from tests.clients.test_watch import ended

RUNNING, EXITED, NOT_FOUND = RegistrationState.RUNNING, RegistrationState.EXITED, RegistrationState.NOT_FOUND
Found = list[tuple[str, int, int, str]]


def found_in(request: monitor_pb2.WatchRequest) -> Found:
    return [(item.node, item.pid, item.start_time, item.boot_id) for item in request.register.found]


def target_of(request: monitor_pb2.WatchRequest) -> tuple[int, int, str]:
    """Of a register or deregister."""
    asked = request.register if request.WhichOneof("kind") == "register" else request.deregister
    target = asked.registration.target.process
    return target.pid, target.start_time, target.boot_id


async def states(monitor: Monitor, count: int) -> dict[str, RegistrationState]:
    return {answer.node: answer.state for answer in [await next_registered(monitor) for _ in range(count)]}


async def cut(broker: FakeBroker, number: int) -> Session:
    """Break the stream of that number; the next one, with its first request."""
    (await broker.session(number)).end()
    return await broker.session(number + 1)


def test_what_is_sent() -> None:
    target = registration({"pid": 5, "start_time": 50, "boot_id": "b"}).target.process
    assert (target.pid, target.start_time, target.boot_id) == (5, 50, "b")
    assert registration({"pid": 5, "boot_id": ""}).target.process.boot_id == ""
    for wrong in (
        {"boot_id": "b"},
        {"pid": 5, "boot_id": "b"},
        {"pid": 5, "start_time": 0, "boot_id": "b"},
        {"unit": "a.service", "boot_id": "b"},
        {"pid": 5, "start_time": 50, "boot_id": "b c"},
        {"pid": 5, "start_time": 50, "boot_id": "b" * 129},
    ):
        with pytest.raises(BadSelectorError):
            registration(wrong)  # type: ignore[arg-type]


async def test_what_comes_names_the_process_for_good(broker: FakeBroker) -> None:
    broker.processes = {("web1", 5): 5000}
    async with connect(broker.address) as monitor:
        answer = await monitor.register(node="web1", pid=5, events="exit")
        process = answer.process()
        assert process is not None
        assert (answer.answers[0].boot_id, process.boot_id) == (BOOT, BOOT)
        assert await monitor.list_processes("web1") == [process]
        again = await monitor.register(node="web1", pid=5, start_time=process.start_time, boot_id=process.boot_id, events="exit")
        other = await monitor.register(node="web1", pid=5, start_time=process.start_time, boot_id="another", events="exit")
        assert (again.states, other.states) == ({"web1": RUNNING}, {"web1": EXITED})
        assert len({answer.registration_id, again.registration_id, other.registration_id}) == 3
        session = await broker.session()
        session.send(batch("web1", event(128, EXIT, 5)), batch("web1", event(128, EXIT, 5), boot_id="another"))
        seen = [item for item in [await anext(monitor) for _ in range(5)] if isinstance(item, Event)]
        assert [item.boot_id for item in seen] == [BOOT, "another"]
        assert seen[0] != seen[1]


async def test_a_node_that_was_rebooted_meanwhile(broker: FakeBroker) -> None:
    """By the same pid with the same start time. It is told once, and not brought again."""
    broker.processes = {("web1", 5): 5000, ("web1", 6): 6000}
    async with connect(broker.address) as monitor:
        await monitor.register(node="web1", pid=5, events="exit")
        assert await states(monitor, 1) == {"web1": RUNNING}
        broker.boots = {"web1": "boot-2"}
        second = await cut(broker, 0)
        assert [found_in(request) for request in second.requests] == [[("web1", 5, 5000, BOOT)]]
        told = await next_registered(monitor)
        assert (told.state, told.boot_id, told.process) == (EXITED, "boot-2", None)
        second.send(progress(512))  # all that was to come of it has come
        await monitor.register(node="web1", pid=6, events="exit")
        assert await states(monitor, 1) == {"web1": RUNNING}
        third = await cut(broker, 1)
        assert [found_in(request) for request in third.requests] == [[("web1", 6, 6000, "boot-2")]]


@pytest.mark.parametrize("pinned", [False, True], ids=["pid", "pid and start time"])
async def test_a_pid_on_several_nodes(broker: FakeBroker, pinned: bool) -> None:
    """On each node it is the process of before: the broker is told, so that it does not arm another."""
    broker.nodes = ["web1", "web2", "web3", "web4"]
    broker.processes = dict.fromkeys(((node, 5) for node in broker.nodes[:3]), 5000)
    async with connect(broker.address) as monitor:
        what: Selection = {"pid": 5, "events": "exit"}
        if pinned:
            what["start_time"] = 5000
        await monitor.register(**what)
        assert await states(monitor, 4) == {"web1": RUNNING, "web2": RUNNING, "web3": RUNNING, "web4": NOT_FOUND}
        broker.processes["web2", 5] = 5001
        broker.boots = {"web3": "boot-2"}
        second = await cut(broker, 0)
        [request] = second.requests
        assert target_of(request) == (5, 5000 if pinned else 0, "")
        assert found_in(request) == [(node, 5, 5000, BOOT) for node in ("web1", "web2", "web3")]
        assert await states(monitor, 4) == {"web1": RUNNING, "web2": EXITED, "web3": EXITED, "web4": NOT_FOUND}


async def test_a_pid_that_is_asked_for_again_is_the_same_registration(broker: FakeBroker) -> None:
    """Also after a reconnect: what was learnt of the process does not make another of it."""
    broker.processes = {("web1", 5): 5000}
    async with connect(broker.address) as monitor:
        await monitor.register(node="web1", pid=5, events="exit")
        second = await cut(broker, 0)
        await monitor.register(node="web1", pid=5, events="abort")
        await monitor.deregister(node="web1", pid=5)
        assert [target_of(request) for request in second.requests] == [(5, 0, "")] * 3
        # Nothing is left of it.
        await monitor.register(node="web1", events="fork")
        third = await cut(broker, 1)
        assert [request.request_id for request in await third.asked(1)] == [4]


async def test_asked_for_before_a_reconnect_and_answered_behind_it(broker: FakeBroker) -> None:
    """What one of two nodes had answered was told to the caller: it holds for the answer that comes in its place."""
    broker.nodes = ["web1", "web2"]
    broker.answers = False
    async with connect(broker.address) as monitor:
        asking = asyncio.create_task(monitor.register(pid=5, events="exit"))
        first = await broker.session()
        first.send(answer_of(1, "web1", RUNNING, process=process_of(5, 5000), pending=1))
        assert (await next_registered(monitor)).state is RUNNING
        broker.answers = True
        broker.processes = {("web1", 5): 5001, ("web2", 5): 5000}
        second = await cut(broker, 0)
        assert [found_in(request) for request in second.requests] == [[("web1", 5, 5000, BOOT)]]
        assert (await asking).states == {"web1": EXITED, "web2": RUNNING}


async def test_the_end_of_a_process_of_another_boot(broker: FakeBroker) -> None:
    """It comes late, from the log, and is not that of the process that has its pid and start time now."""
    broker.processes = {("web1", 5): 5000, ("web1", 6): 6000}
    broker.boots = {"web1": "boot-2"}
    async with connect(broker.address) as monitor:
        for pid in (5, 6):
            await monitor.register(node="web1", pid=pid, events="exit")
        await monitor.register(node="web1", pid=6, events="exit", comms=["sleep"])
        (await broker.session()).send(batch("web1", event(128, EXIT, 5)), batch("web1", event(128, EXIT, 6), boot_id="boot-2"))
        second = await cut(broker, 0)
        assert [found_in(request) for request in second.requests] == [[("web1", 5, 5000, "boot-2")]]


async def test_an_older_broker(broker: FakeBroker) -> None:
    """It knows of no boot ids, and arms whoever has the pid: what it finds is not taken for the process of before."""
    broker.boots = {"web1": ""}
    broker.processes = {("web1", 5): 5000, ("web1", 6): 6000}
    async with connect(broker.address) as monitor:
        for pid in (5, 6):
            await monitor.register(node="web1", pid=pid, events="exit")
        assert await states(monitor, 1) == {"web1": RUNNING}
        assert await states(monitor, 1) == {"web1": RUNNING}
        broker.answers = False
        second = await cut(broker, 0)
        broker.processes["web1", 6] = 6001
        for request in await second.asked(2):
            del request.register.found[:]
            second.send(*broker.answer(request))
        assert [(await next_registered(monitor)).state for _ in range(2)] == [RUNNING, EXITED]


async def test_wait(broker: FakeBroker, kmon: Kmon) -> None:
    broker.processes = {("web1", 5): 5000}
    which = ("--node", "web1", "--pid", "5", "--start-time", "5000")
    waiting = await kmon("wait", *which, "--boot-id", BOOT)
    session = await broker.session()
    assert target_of(session.requests[0]) == (5, 5000, BOOT)
    session.send(batch("web1", event(128, EXIT, 5, exit_code=3)))
    assert (await ended(waiting))[0] == 3
    assert await ended(await kmon("wait", *which, "--boot-id", "boot-0")) == (2, "", "kmon: process 5 on web1 has already ended\n")
    for wrong in (
        ("--pid", "5", "--boot-id", BOOT),
        ("--pid", "5", "--start-time", "1", "--boot-id", "a b"),
        ("--pidfile", "/x", "--boot-id", "a"),
    ):
        status, _, err = await ended(await kmon("wait", "--node", "web1", *wrong))
        assert (status, "boot" in err) == (2, True)

    def synchronously() -> None:
        with sync.connect(broker.address) as monitor:
            monitor.wait(node="web1", pid=5, start_time=5000, boot_id="boot-0")

    with pytest.raises(ProcessExitedError):
        await asyncio.to_thread(synchronously)


async def test_wait_through_a_reboot(broker: FakeBroker) -> None:
    """The exit is an event of the boot before, and may come before the answer that says so, or behind it; or it was lost."""
    for number, exit_first in enumerate((True, False, None)):
        broker.processes = {("web1", 5): 5000}
        broker.boots = {}
        async with connect(broker.address) as monitor:
            waiting = asyncio.create_task(monitor.wait(node="web1", pid=5))
            await broker.session(2 * number)
            broker.boots = {"web1": "boot-2"}
            broker.answers = False
            second = await cut(broker, 2 * number)
            inferred = batch("web1", event(384, EXIT, 5, inferred=True))
            answers = broker.answer(second.requests[0])
            second.send(*([inferred, *answers] if exit_first else answers), *([inferred] if exit_first is False else []), progress(512))
            broker.answers = True
            if exit_first is None:
                with pytest.raises(ProcessExitedError, match="ended unseen"):
                    await waiting
            else:
                ended_so = await waiting
                assert (ended_so.inferred, ended_so.exit_code, ended_so.boot_id) == (True, None, BOOT)
