# SPDX-License-Identifier: Apache-2.0
"""The same without asyncio. The fake broker runs in the test's loop, the user's code in a thread."""

from __future__ import annotations

import asyncio
import threading

import pytest

from kmonitor.clients import BrokerUnreachableError, ClosedError, Event, Registered, RegistrationState
from kmonitor.clients.sync import connect
from tests.clients.fake_broker import EXIT, FakeBroker, batch, event


async def test_the_synchronous_face(broker: FakeBroker) -> None:
    broker.processes = {("web1", 4711): 99}

    def user() -> list[int]:
        with connect(broker.address) as monitor:
            registration = monitor.register(node="web1", pid=4711, events="exit")
            assert registration.states == {"web1": RegistrationState.RUNNING}
            assert [node.name for node in monitor.list_nodes()] == ["web1"]
            assert [process.pid for process in monitor.list_processes("web1")] == [4711]
            assert isinstance(monitor.next(timeout=10), Registered)
            with pytest.raises(TimeoutError):
                monitor.next(timeout=0.05)
            ready.set()
            pids = []
            for notification in monitor:
                assert isinstance(notification, Event)
                pids.append(notification.pid)
                if len(pids) == 2:
                    break
            assert monitor.cursor.positions() == {"web1": (7, 256)}
            monitor.deregister(registration)
        with pytest.raises(ClosedError):
            monitor.list_nodes()
        return pids

    ready = threading.Event()
    working = asyncio.create_task(asyncio.to_thread(user))
    await asyncio.to_thread(ready.wait)
    (await broker.session()).send(batch("web1", event(128, EXIT, 1), event(256, EXIT, 2), event(384, EXIT, 3)))
    assert await working == [1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name == "kmonitor monitor"]


async def test_no_broker(broker: FakeBroker) -> None:
    await broker.stop()
    with pytest.raises(BrokerUnreachableError):
        await asyncio.to_thread(connect, broker.address)
    assert not [thread for thread in threading.enumerate() if thread.name == "kmonitor monitor"]
