# SPDX-License-Identifier: Apache-2.0
"""A fake broker, and `kmon` as a user starts it."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
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
    """Start `kmon ARGS...` against the fake broker; killed at the end of the test if it still runs. `streams` is as in a shell
    ("2>/dev/full", ">&-"), `env` what else stands in the environment."""
    started: list[Process] = []

    async def start(*args: str, stdout: int = PIPE, streams: str = "", env: Mapping[str, str] | None = None) -> Process:
        environment = {**os.environ, "KMONITOR_BROKER": broker.address, **(env or {})}
        program = Path(sys.executable).parent / "kmon"
        words: list[str | Path] = [program, *args] if not streams else ["sh", "-c", f'exec "$0" "$@" {streams}', program, *args]
        process = await asyncio.create_subprocess_exec(
            *words, env=environment, stdin=asyncio.subprocess.DEVNULL, stdout=stdout, stderr=PIPE
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.communicate()
