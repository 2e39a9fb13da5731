# SPDX-License-Identifier: Apache-2.0
"""What the tests of guards have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kmonitor.clients import Process, ProcessGuard, Progress, Verdict, connect

PROCESS = Process(0, 0, 0, 0, "nobody", 0, 0, 0)


async def heartbeats(address: str, node: str, count: int = 2) -> None:
    """Until the broker has sent so many, to another monitor."""
    async with asyncio.timeout(20), connect(address) as other:
        await other.register(node=node, events="exit")
        async for item in other:
            count -= isinstance(item, Progress)
            if not count:
                return


async def until(guard: ProcessGuard, wanted: Callable[[Verdict], bool]) -> list[Verdict]:
    """The verdicts up to the first that is `wanted`."""
    found = []
    async with asyncio.timeout(30):
        async for verdict in guard:
            found.append(verdict)
            if wanted(verdict):
                break
    return found
