# SPDX-License-Identifier: Apache-2.0
"""Long jobs beside the event loop, or on it in slices: heartbeats and blocks go out meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TypeVar

from kmonitor.agent.errors import CaptureError

_SLICE_S = 0.005

T = TypeVar("T")


async def in_thread(work: Callable[[], T]) -> T:
    """Return what `work` returns, which only reads. Raises what it raises, and CaptureError if no thread can be had."""
    try:
        return await asyncio.to_thread(work)
    except RuntimeError as error:
        raise CaptureError(f"no thread can be started: {error}") from None


async def in_slices(items: Iterable[T]) -> AsyncIterator[T]:
    """Yield each of `items`, and let the event loop's other tasks run whenever a slice is used up."""
    until = time.perf_counter() + _SLICE_S
    for item in items:
        if time.perf_counter() > until:
            await asyncio.sleep(0)
            until = time.perf_counter() + _SLICE_S
        yield item
