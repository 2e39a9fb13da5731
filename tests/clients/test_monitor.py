# SPDX-License-Identifier: Apache-2.0
"""The library's meaning: register, deregister, order, backpressure, errors."""

from __future__ import annotations

import asyncio
import socket

import grpc
import pytest

from kmonitor.clients import (
    BadMaskError,
    BadSelectorError,
    BrokerUnreachableError,
    ClosedError,
    Event,
    EventType,
    Gap,
    KilledBy,
    NoSuchRegistrationError,
    NotAuthorisedError,
    ProcessExitedError,
    ProcessNotFoundError,
    Registered,
    RegistrationError,
    RegistrationState,
    UsageError,
    WaitTimeoutError,
    connect,
)
from kmonitor.v1 import monitor_pb2
from tests.clients.fake_broker import ABORT, ARMED, EXIT, FORK, FakeBroker, batch, event, gap, refused, registered


async def test_register_waits_for_all_nodes(broker: FakeBroker) -> None:
    broker.nodes = ["web1", "web2", "web3"]
    broker.processes = {("web1", 4711): 99, ("web2", 4711): None}
    async with connect(broker.address) as monitor:
        registration = await monitor.register(pid=4711, events="exit,abort")
        assert registration.states == {
            "web1": RegistrationState.RUNNING,
            "web2": RegistrationState.EXITED,
            "web3": RegistrationState.NOT_FOUND,
        }
        process = registration.process()
        assert process is not None
        assert (process.pid, process.start_time) == (4711, 99)
        assert not registration.over
        (request,) = (await broker.session()).requests
        assert request.register.registration.event_mask == 0x50


async def test_what_is_asked_for_goes_out_as_it_was_meant(broker: FakeBroker) -> None:
    async with connect(broker.address) as monitor:
        await monitor.register(
            nodes=["web*"], labels={"role": "web"}, unit="nginx", events=EventType.PROCESS_EXIT, follow=True, comms=["ng*"], uids=[33],
            failures_only=True,
        )  # fmt: skip
        wanted = (await broker.session()).requests[0].register.registration
    assert list(wanted.nodes.names) == ["web*"]
    assert dict(wanted.nodes.labels) == {"role": "web"}
    assert wanted.target.unit == "nginx.service"
    assert (wanted.event_mask, wanted.follow) == (0x40, True)
    assert (list(wanted.filter.comms), list(wanted.filter.uids), wanted.filter.failures_only) == (["ng*"], [33], True)


async def test_what_cannot_be_meant_is_an_error_at_once(broker: FakeBroker) -> None:
    async with connect(broker.address) as monitor:
        with pytest.raises(BadMaskError):
            await monitor.register(events=0)
        with pytest.raises(BadMaskError):
            await monitor.register(events="exit,nonsense")
        for wrong in ({"pid": 0}, {"node": "web["}, {"unit": "a/b"}, {"cgroup": "x"}, {"pid": 1, "unit": "a"}, {"start_time": 1}):
            with pytest.raises(BadSelectorError):
                await monitor.register(**wrong)
    assert broker.sessions == []


async def test_a_refusal_is_raised_with_the_brokers_words(broker: FakeBroker) -> None:
    broker.answers = False
    async with connect(broker.address) as monitor:
        for number, (code, kind) in enumerate([(9, RegistrationError), (7, NotAuthorisedError), (5, NoSuchRegistrationError)], start=1):
            asking = asyncio.create_task(monitor.register(node="web1"))
            session = await broker.session()
            await session.asked(number)
            session.send(refused(number, code, "not like this"))
            with pytest.raises(kind, match="not like this"):
                await asking


async def test_events_before_the_answer_are_kept_in_order(broker: FakeBroker) -> None:
    broker.answers = False
    async with connect(broker.address, queue_events=2) as monitor:  # far fewer than come: an answer gets through a full queue
        asking = asyncio.create_task(monitor.register(node="web1", events="exit"))
        session = await broker.session()
        await session.asked(1)
        session.send(*(batch("web1", event(100 + at, EXIT, at + 1)) for at in range(50)), registered(1, "web1", ARMED))
        registration = await asking
        assert registration.states == {"web1": RegistrationState.ARMED}
        got = [await anext(monitor) for _ in range(51)]
    assert [item.pid for item in got if isinstance(item, Event)] == list(range(1, 51))
    assert isinstance(got[-1], Registered)


async def test_a_full_queue_stops_the_reader(broker: FakeBroker) -> None:
    async with connect(broker.address, queue_events=10) as monitor:
        await monitor.register(node="web1", events="exit")
        session = await broker.session()
        payload = "x" * 4000
        session.send(*(batch("web1", event(100 + at, EXIT, 1, filename=payload)) for at in range(2000)))  # 8 MB: no window holds it
        assert isinstance(await anext(monitor), Registered)
        await anext(monitor)
        await asyncio.wait_for(monitor.list_nodes(), 10)  # the channel works, the stream stands
        assert monitor._stream.waiting <= 10
        assert session.outgoing.qsize() > 0
        for at in range(1, 2000):
            item = await anext(monitor)
            assert isinstance(item, Event)
            assert item.position == 100 + at


async def test_the_fields_of_an_event(broker: FakeBroker) -> None:
    async with connect(broker.address) as monitor:
        await monitor.register(events="all")
        session = await broker.session()
        session.send(
            batch(
                "web1",
                event(128, FORK, 5, child_pid=6, child_tid=6, child_start_time=9),
                event(256, ABORT, 6, exit_signal=9, killed_by={"pid": 1, "comm": "sh", "uid": 0}),
                event(384, EXIT, 5),
            ),
            gap(),
        )
        await anext(monitor)
        fork, abort, end, hole = [await anext(monitor) for _ in range(4)]
        assert isinstance(fork, Event)
        assert isinstance(abort, Event)
        assert isinstance(end, Event)
        assert (fork.type, fork.child_pid, fork.child_start_time, fork.exit_code, fork.ok) == (EventType.PROCESS_FORK, 6, 9, None, True)
        assert (abort.exit_signal, abort.killed_by, abort.ok, abort.child_pid) == (9, KilledBy(1, "sh", 0), False, None)
        assert (end.exit_code, end.ok, end.is_exit, end.node, end.epoch) == (0, True, True, "web1", 7)
        assert isinstance(hole, Gap)
        assert (hole.reason.name, hole.lost[0].count) == ("RING", 3)
        assert monitor.cursor.positions() == {"web1": (7, 511)}


async def test_deregister_by_object_and_by_selection(broker: FakeBroker) -> None:
    broker.processes = {("web1", 4711): 99}
    async with connect(broker.address) as monitor:
        registration = await monitor.register(node="web1", pid=4711, events="exit,abort")
        await monitor.deregister(registration, events="abort")
        await monitor.deregister(node="web1", pid=4711)
        session = await broker.session()
        masks = [request.deregister.registration.event_mask for request in session.requests[1:]]
        assert masks == [0x10, 0x7F]
        assert all(request.deregister.registration.target.process.pid == 4711 for request in session.requests[1:])
        broker.answers = False
        asking = asyncio.create_task(monitor.deregister(node="web1", pid=4711))
        await session.asked(4)
        error = monitor_pb2.RequestError(code=5, message="no such registration")
        session.send(monitor_pb2.Notification(deregistered=monitor_pb2.Deregistered(request_id=4, error=error)))
        with pytest.raises(NoSuchRegistrationError):
            await asking


async def test_no_broker_is_said_in_one_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can take it meanwhile
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(BrokerUnreachableError, match=f"no broker answers at {address}: start kmonitor-broker, or set --broker"):
            async with connect(address):
                pass


async def test_a_stream_that_is_refused_is_not_tried_again(broker: FakeBroker) -> None:
    broker.refuse = grpc.StatusCode.UNAUTHENTICATED
    async with connect(broker.address) as monitor:
        with pytest.raises(NotAuthorisedError):
            await monitor.register(node="web1")
        with pytest.raises(NotAuthorisedError):
            await anext(monitor)
        with pytest.raises(NotAuthorisedError):
            await monitor.list_nodes()


async def test_close_ends_those_who_wait(broker: FakeBroker) -> None:
    broker.answers = False
    async with connect(broker.address) as monitor:
        asking = asyncio.create_task(monitor.register(node="web1"))
        reading = asyncio.create_task(anext(aiter(monitor)))
        await (await broker.session()).asked(1)
        await monitor.close()
        for task in (asking, reading):
            with pytest.raises(ClosedError):
                await task


async def test_lists(broker: FakeBroker) -> None:
    broker.nodes = ["web1", "web2"]
    broker.processes = {("web1", 9): 90, ("web1", 3): 30, ("web1", 4): None}
    async with connect(broker.address) as monitor:
        assert [node.name for node in await monitor.list_nodes()] == ["web1", "web2"]
        assert [process.pid for process in await monitor.list_processes("web1")] == [3, 9]
        with pytest.raises(UsageError, match="there is no node db1"):
            await monitor.list_processes("db1")


async def test_wait(broker: FakeBroker) -> None:
    broker.processes = {("web1", 4711): 99, ("web1", 4712): None}
    async with connect(broker.address) as monitor:
        waiting = asyncio.create_task(monitor.wait(node="web1", pid=4711))
        session = await broker.session()
        await session.asked(1)
        session.send(batch("web1", event(128, EXIT, 4711, exit_code=3)))
        assert (await waiting).exit_code == 3
        with pytest.raises(ProcessExitedError):
            await monitor.wait(node="web1", pid=4712)
        with pytest.raises(ProcessNotFoundError):
            await monitor.wait(node="web1", pid=4713)
        with pytest.raises(WaitTimeoutError):
            await monitor.wait(node="web1", pid=4711, timeout=0.05)
        assert await monitor.list_nodes()  # the channel outlives the waits' own streams
