# SPDX-License-Identifier: Apache-2.0
"""A fake broker, and `kmon` as a user starts it."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tests.clients.fake_broker import FakeBroker

Kmon = Callable[..., Awaitable[Process]]


@pytest.fixture
async def broker() -> AsyncIterator[FakeBroker]:
    """Listening at a port of its own."""
    fake = FakeBroker()
    await fake.start()
    yield fake
    await fake.stop()


@pytest.fixture
async def kmon(broker: FakeBroker) -> AsyncIterator[Kmon]:
    """Start `kmon ARGS...` against the fake broker; killed at the end of the test if it still runs."""
    started: list[Process] = []

    async def start(*args: str, stdout: int = PIPE) -> Process:
        environment = {**os.environ, "KMONITOR_BROKER": broker.address}
        process = await asyncio.create_subprocess_exec(
            Path(sys.executable).parent / "kmon", *args, env=environment, stdin=asyncio.subprocess.DEVNULL, stdout=stdout, stderr=PIPE
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.communicate()
