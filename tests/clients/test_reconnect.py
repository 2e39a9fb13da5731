# SPDX-License-Identifier: Apache-2.0
"""A broker that goes and comes back: nothing twice, nothing forgotten, and the monitor is told."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from kmonitor.clients import (
    BrokerUnreachableError,
    Cursor,
    Disconnected,
    Event,
    Notification,
    ProcessExitedError,
    Reconnected,
    Registered,
    RegistrationState,
    connect,
)
from tests.clients.fake_broker import EXIT, FakeBroker, batch, event, progress


def kinds(items: list[Notification]) -> list[type]:
    return [type(item) for item in items]


async def test_registrations_and_cursor_are_brought_again(broker: FakeBroker) -> None:
    broker.processes = {("web1", 4711): 99}
    async with connect(broker.address) as monitor:
        await monitor.register(node="web1", pid=4711, events="exit")
        await monitor.register(node="web1", pid=4711, events="abort")  # OR
        await monitor.register(node="web1", events="fork")
        first = await broker.session()
        first.send(batch("web1", event(128, EXIT, 1), event(256, EXIT, 2)))
        first.end(grpc.StatusCode.UNAVAILABLE)

        second = await broker.session(1)
        requests = await second.asked(2)
        assert [request.register.registration.event_mask for request in requests] == [0x50, 0x08]
        assert [request.request_id for request in requests] == [1, 3]
        # Not another process that got the pid.
        assert [(at.node, at.pid, at.start_time, at.boot_id) for at in requests[0].register.found] == [("web1", 4711, 99, "boot-1")]
        assert second.cursor == {"web1": (7, 256)}
        assert not requests[1].HasField("cursor")
        second.send(batch("web1", event(128, EXIT, 1), event(256, EXIT, 2), event(384, EXIT, 3)), batch("web1", event(512, EXIT, 4)))

        got = [await anext(monitor) for _ in range(11)]
    assert kinds(got) == [Registered] * 3 + [Event] * 2 + [Disconnected, Reconnected, Registered, Registered, Event, Event]
    assert [item.position for item in got if isinstance(item, Event)] == [128, 256, 384, 512]


async def test_the_same_target_followed_is_another_registration(broker: FakeBroker) -> None:
    """As in the broker. How the same is written makes no other."""
    broker.processes = {("web1", 4711): 99}
    async with connect(broker.address) as monitor:
        await monitor.register(node="web1", pid=4711, events="exit")
        await monitor.register(node="web1", pid=4711, events="fork", follow=True)
        await monitor.register(nodes=["web1", "web2"], comms=["a", "b"], events="exit")
        await monitor.register(nodes=["web2", "web1"], comms=["b", "a", "b"], events="abort", follow=True)
        (await broker.session()).end()
        again = [(request.request_id, request.register.registration) for request in await (await broker.session(1)).asked(3)]
        assert [(number, wanted.event_mask, wanted.follow) for number, wanted in again] == [
            (1, 0x40, False),
            (2, 0x08, True),
            (3, 0x50, False),
        ]
        # Over is the one that is not followed.
        await monitor.deregister(node="web1", pid=4711)
        broker.sessions[1].end()
        assert [request.request_id for request in await (await broker.session(2)).asked(2)] == [2, 3]


async def test_what_was_taken_is_not_given_again(broker: FakeBroker) -> None:
    """An exit that was inferred has a position as any other event."""
    async with connect(broker.address, cursor=Cursor({"web1": (7, 1000)})) as monitor:
        await monitor.register(events="exit")
        session = await broker.session()
        assert session.cursor == {"web1": (7, 1000)}
        again = event(1000, EXIT, 5, inferred=True)
        session.send(batch("web1", event(900, EXIT, 6), again), batch("web1", event(1128, EXIT, 7, inferred=True)))
        got = [await anext(monitor) for _ in range(2)]
        assert [item.pid for item in got if isinstance(item, Event)] == [7]
        assert monitor.cursor.positions() == {"web1": (7, 1128)}


async def test_another_epoch_is_another_count(broker: FakeBroker) -> None:
    async with connect(broker.address, cursor=Cursor({"web1": (7, 1000)})) as monitor:
        await monitor.register(events="exit")
        (await broker.session()).send(batch("web1", event(128, EXIT, 5), epoch=8))
        await anext(monitor)
        item = await anext(monitor)
        assert isinstance(item, Event)
        assert item.position == 128


async def test_a_register_survives_the_loss_of_the_connection(broker: FakeBroker) -> None:
    broker.answers = False
    async with connect(broker.address) as monitor:
        asking = asyncio.create_task(monitor.register(node="web1", events="exit"))
        await (await broker.session()).asked(1)
        await broker.stop()
        broker.answers = True
        await broker.start()
        registration = await asking
        assert registration.states == {"web1": RegistrationState.ARMED}


async def test_a_pid_that_was_given_to_another_process_is_told_as_exited(broker: FakeBroker) -> None:
    broker.nodes = ["web1", "web2"]
    broker.processes = {("web1", 4711): 99, ("web2", 4711): 98}
    async with connect(broker.address) as monitor:
        await monitor.register(pid=4711, events="exit")
        broker.processes["web2", 4711] = 12345
        (await broker.session()).end()
        got = [await anext(monitor) for _ in range(6)]
        states = {item.node: item.state for item in got[4:] if isinstance(item, Registered)}
        assert states == {"web1": RegistrationState.RUNNING, "web2": RegistrationState.EXITED}


async def test_a_process_that_ended_is_not_brought_again(broker: FakeBroker) -> None:
    broker.processes = {("web1", 1): 1000, ("web1", 2): 2000}
    async with connect(broker.address) as monitor:
        await monitor.register(node="web1", pid=1, events="exit")
        await monitor.register(node="web1", pid=2, events="exit")
        first = await broker.session()
        first.send(batch("web1", event(128, EXIT, 1)))
        first.end()
        requests = await (await broker.session(1)).asked(1)
        assert [request.register.registration.target.process.pid for request in requests] == [2]


async def test_without_reconnect_the_loss_is_an_error(broker: FakeBroker) -> None:
    async with connect(broker.address, reconnect=False) as monitor:
        await monitor.register(events="exit")
        (await broker.session()).end(grpc.StatusCode.UNAVAILABLE)
        assert isinstance(await anext(monitor), Registered)
        with pytest.raises(BrokerUnreachableError):
            await anext(monitor)


async def test_wait_takes_the_exit_from_the_log_after_a_reconnect(broker: FakeBroker) -> None:
    broker.processes = {("web1", 4711): 99, ("web1", 4712): 98}
    async with connect(broker.address) as monitor:
        for pid, number in ((4711, 0), (4712, 2)):
            waiting = asyncio.create_task(monitor.wait(node="web1", pid=pid))
            session = await broker.session(number)
            await session.asked(1)
            session.send(progress(200))
            broker.processes["web1", pid] = None
            session.end(grpc.StatusCode.UNAVAILABLE)
            again = await broker.session(number + 1)
            await again.asked(1)
            if pid == 4711:
                again.send(batch("web1", event(384, EXIT, pid, exit_code=5)), progress(512))
                assert (await waiting).exit_code == 5
            else:
                again.send(progress(512))
                with pytest.raises(ProcessExitedError, match="unseen"):
                    await waiting
