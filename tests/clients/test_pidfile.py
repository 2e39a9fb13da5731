# SPDX-License-Identifier: Apache-2.0
"""Registrations by pidfile: through reconnects, and on nodes of which some cannot take them."""

from __future__ import annotations

import json

import pytest

from kmonitor.clients import (
    BadSelectorError,
    Monitor,
    ProcessExitedError,
    ProcessNotFoundError,
    Registered,
    RegistrationError,
    RegistrationState,
    WaitTimeoutError,
    connect,
)
from kmonitor.clients.selection import registration
from tests.clients.conftest import Kmon
from tests.clients.fake_broker import EXIT, NOT_FOUND, FakeBroker, batch, event, refused
from tests.clients.test_watch import ended

PATH = "/run/x.pid"


async def next_registered(monitor: Monitor) -> Registered:
    async for item in monitor:
        if isinstance(item, Registered):
            return item
    raise AssertionError("the stream has ended")


def test_what_is_sent() -> None:
    assert registration({"node": "web1", "pidfile": PATH}).target.pidfile == PATH
    for wrong in ({"pidfile": PATH, "pid": 1}, {"pidfile": PATH, "unit": "a"}, {"pidfile": PATH, "start_time": 1}, {"pidfile": "x"}):
        with pytest.raises(BadSelectorError):
            registration(wrong)  # type: ignore[arg-type]


async def test_after_a_reconnect_it_is_the_same_process(broker: FakeBroker) -> None:
    """Whatever the file says by then: on each node the broker is told which process it was."""
    broker.nodes = ["web1", "web2", "web3"]
    broker.processes = {("web1", 11): 110, ("web2", 12): 120}
    broker.pidfiles = {("web1", PATH): 11, ("web2", PATH): 12}
    async with connect(broker.address) as monitor:
        first = await monitor.register(pidfile=PATH, events="exit")
        assert first.states == {"web1": RegistrationState.RUNNING, "web2": RegistrationState.RUNNING, "web3": NOT_FOUND}
        broker.pidfiles |= {("web1", PATH): 13, ("web2", PATH): 13}
        broker.processes |= {("web1", 13): 130, ("web2", 12): None, ("web2", 13): 130}
        (await broker.session()).end()
        again = (await (await broker.session(1)).asked(1))[0].register
        assert again.registration.target.pidfile == PATH
        assert [(item.node, item.pid, item.start_time) for item in again.found] == [("web1", 11, 110), ("web2", 12, 120)]
        for _ in range(3):
            await next_registered(monitor)
        told = {item.node: item for item in [await next_registered(monitor) for _ in range(3)]}
        assert (told["web1"].state, told["web1"].target) == (RegistrationState.RUNNING, f"pidfile {PATH}")
        assert told["web1"].process is not None
        assert told["web1"].process.pid == 11
        assert told["web2"].state is RegistrationState.EXITED
        # The broker has it under the file's name still.
        await monitor.deregister(pidfile=PATH)
        requests = await broker.sessions[1].asked(2)
        assert requests[1].deregister.registration.target.pidfile == PATH


async def test_a_process_that_ended_is_not_brought_again(broker: FakeBroker) -> None:
    broker.processes = {("web1", 1): 1000, ("web1", 2): 2000}
    broker.pidfiles = {("web1", "/run/1"): 1, ("web1", "/run/2"): 2}
    async with connect(broker.address) as monitor:
        for path in ("/run/1", "/run/2"):
            await monitor.register(node="web1", pidfile=path, events="exit")
        first = await broker.session()
        first.send(batch("web1", event(128, EXIT, 1)))
        first.end()
        requests = await (await broker.session(1)).asked(1)
        assert [request.register.registration.target.pidfile for request in requests] == ["/run/2"]


async def test_an_older_broker_that_reads_the_file_again(broker: FakeBroker) -> None:
    """What it finds then is not taken for the process of before."""
    broker.processes = {("web1", 1): 1000}
    broker.pidfiles = {("web1", PATH): 1}
    async with connect(broker.address) as monitor:
        await monitor.register(node="web1", pidfile=PATH, events="exit")
        broker.answers = False
        (await broker.session()).end()
        again = await broker.session(1)
        [request] = await again.asked(1)
        broker.processes = {("web1", 2): 2000}
        broker.pidfiles = {("web1", PATH): 2}
        del request.register.found[:]
        again.send(*broker.answer(request))
        await next_registered(monitor)
        told = await next_registered(monitor)
        assert (told.state, told.process) == (RegistrationState.EXITED, None)


async def test_some_nodes_cannot_take_it(broker: FakeBroker) -> None:
    """That is an answer of theirs. If none can, it is a refusal."""
    broker.nodes = ["web1", "web2", "web3"]
    broker.processes = {("web2", 1): 1000}
    broker.pidfiles = {("web1", PATH): "is empty", ("web2", PATH): 1, ("web3", PATH): "is a folder"}
    async with connect(broker.address) as monitor:
        made = await monitor.register(pidfile=PATH, events="exit")
        assert [(answer.node, answer.error) for answer in made.answers] == [
            ("web1", "node web1: is empty"),
            ("web2", None),
            ("web3", "node web3: is a folder"),
        ]
        assert not made.over
        assert [(await next_registered(monitor)).node for _ in range(3)] == ["web1", "web2", "web3"]
        with pytest.raises(RegistrationError, match="node web3: is a folder") as caught:
            await monitor.register(nodes=["web1", "web3"], pidfile=PATH, events="exit")
        assert caught.value.code == 9
        session = await broker.session()
        # A node that joins later and cannot take it changes nothing for the others; what was refused is not brought again.
        session.send(refused(1, 9, "node web4: is empty", node="web4"))
        assert (await next_registered(monitor)).error == "node web4: is empty"
        session.end()
        requests = await (await broker.session(1)).asked(1)
        assert [request.request_id for request in requests] == [1]


async def test_wait(broker: FakeBroker) -> None:
    broker.processes = {("web1", 11): 11000, ("web1", 12): None}
    broker.pidfiles = {("web1", PATH): 11, ("web1", "/run/old"): 12, ("web1", "/run/bad"): "is empty"}
    async with connect(broker.address) as monitor:
        with pytest.raises(WaitTimeoutError, match=r"the process of ./run/x.pid. on web1 still runs after 0.05 s"):
            await monitor.wait(node="web1", pidfile=PATH, timeout=0.05)
        with pytest.raises(ProcessExitedError, match="the process of '/run/old' on web1 has already ended"):
            await monitor.wait(node="web1", pidfile="/run/old")
        with pytest.raises(ProcessNotFoundError, match="there is no pidfile '/run/none' on web1"):
            await monitor.wait(node="web1", pidfile="/run/none")
        with pytest.raises(RegistrationError, match="is empty"):
            await monitor.wait(node="web1", pidfile="/run/bad")
        for both in ({}, {"pid": 1, "pidfile": PATH}):
            with pytest.raises(BadSelectorError, match="give one of them"):
                await monitor.wait(node="web1", **both)  # type: ignore[arg-type]


async def test_commands(broker: FakeBroker, kmon: Kmon) -> None:
    broker.nodes = ["web1", "web2"]
    broker.processes = {("web1", 11): 11000}
    broker.pidfiles = {("web1", PATH): 11, ("web2", PATH): "pidfile '/run/x.pid' is empty"}
    waiting = await kmon("wait", "--node", "web1", "--pidfile", PATH)
    (await broker.session()).send(batch("web1", event(128, EXIT, 11, exit_code=3)))
    assert await ended(waiting) == (3, "web1: sleep (11) ended: code 3\n", "")
    # One of two nodes has what to watch: it ends with that one.
    watching = await kmon("watch", "--pidfile", PATH, "--pidfile", PATH, "--events", "exit", "--json")
    (await broker.session(1)).send(batch("web1", event(256, EXIT, 11)))
    status, out, _ = await ended(watching)
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [(line["kind"], line["node"], line.get("error")) for line in lines] == [
        ("registered", "web1", None),
        ("registered", "web2", "node web2: pidfile '/run/x.pid' is empty"),
        ("event", "web1", None),
    ]
    assert await ended(await kmon("watch", "--node", "web2", "--pidfile", PATH)) == (
        2,
        "",
        "kmon: node web2: pidfile '/run/x.pid' is empty\n",
    )
    # Said by a node that was away when it was asked.
    broker.unreachable = {"web1"}
    later = await kmon("watch", "--node", "web1", "--pidfile", PATH)
    (await broker.session(3)).send(refused(1, 9, "node web1: pidfile '/run/x.pid' is a folder", node="web1"))
    status, out, err = await ended(later)
    assert (status, err) == (2, "kmon: node web1: pidfile '/run/x.pid' is a folder\n")
    assert out.count("is a folder") == 1
