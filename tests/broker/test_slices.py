# SPDX-License-Identifier: Apache-2.0
"""What monitors ask for leaves the event loop to others: agents come in while thousands of registrations are taken."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from functools import partial
from typing import Any

import grpc.aio
import pytest

from kmonitor.broker.broker import Broker
from kmonitor.broker.slices import SLICE_S, Slices
from kmonitor.v1 import monitor_pb2, monitor_pb2_grpc
from tests.broker.test_server import Agent, world

WORK_S = SLICE_S / 5
MONITORS = 20
EACH = 80


async def test_all_together_have_one_slice_of_a_turn() -> None:
    slices = Slices()
    turn = 0
    done: list[tuple[int, int]] = []

    def count() -> None:
        nonlocal turn
        turn += 1
        if len(done) < 20 * 5:
            asyncio.get_running_loop().call_soon(count)

    def work(number: int) -> None:
        time.sleep(WORK_S)
        done.append((turn, number))

    async def ask(number: int) -> None:
        for _ in range(5):
            await slices.do(partial(work, number))

    count()
    await asyncio.gather(*(ask(number) for number in range(20)))
    assert max(len(list(group)) for _, group in itertools.groupby(done, key=lambda each: each[0])) <= 6
    # In turn: nobody is passed over.
    for start in range(20, 100, 20):
        assert len({number for _, number in done[start : start + 20]}) >= 14


async def test_what_it_raises_and_who_has_gone() -> None:
    slices = Slices()
    done: list[int] = []

    def work(number: int) -> int:
        time.sleep(SLICE_S * 1.1)
        done.append(number)
        if number == 2:
            raise KeyError(number)
        return number

    asks = [asyncio.ensure_future(slices.do(partial(work, number))) for number in range(5)]
    await asyncio.sleep(0)
    asks[3].cancel()
    found = await asyncio.gather(*asks, return_exceptions=True)
    assert [found[at] for at in (0, 1, 4)] == [0, 1, 4]
    assert isinstance(found[2], KeyError)
    assert isinstance(found[3], asyncio.CancelledError)
    assert done == [0, 1, 2, 4]


async def test_an_agent_comes_in_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0
    register = Broker.register

    def slowly(*arguments: Any, **more: Any) -> None:
        nonlocal taken
        taken += 1
        time.sleep(WORK_S)
        register(*arguments, **more)

    monkeypatch.setattr(Broker, "register", slowly)

    async def watch(channel: grpc.aio.Channel) -> None:
        request = monitor_pb2.SubscribeRequest()
        for pid in range(1, EACH + 1):
            request.registrations.add(event_mask=0x40).target.process.pid = pid
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for _ in monitor_pb2_grpc.MonitorServiceStub(channel).Subscribe(request):
                pass

    async with world() as here:
        watching = [asyncio.ensure_future(watch(here.channel)) for _ in range(MONITORS)]
        while len(here.broker.sessions) < MONITORS:  # noqa: ASYNC110 -- nobody tells
            await asyncio.sleep(0)
        before = taken
        await Agent(here.channel).connect()
        meanwhile = taken - before
        assert taken < MONITORS * EACH, "else this shows nothing"
        assert meanwhile <= 60, f"{meanwhile} registrations were taken before an agent was"
        for task in watching:
            task.cancel()
