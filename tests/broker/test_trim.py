# SPDX-License-Identifier: Apache-2.0
"""Memory that was taken for monitors goes back to the system when they are gone."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
import asyncio
from pathlib import Path
from kmonitor.broker.trim import Trimmer

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 >> 10

async def main():
    trimmer = Trimmer()
    pieces = [bytes(2000) for _ in range(60_000)]
    most = resident()
    kept = pieces[::1000]  # all over the heap: without being asked the C library gives nothing back of it
    del pieces
    before = resident()
    trimmer.soon()
    try:
        async with asyncio.timeout(20):
            while resident() > most - 80:
                await asyncio.sleep(0.05)
    except TimeoutError:
        pass
    print(most - before, most - resident(), len(kept))

asyncio.run(main())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library has no malloc_trim")
def test_it_goes_back() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    at_first, at_last, _ = map(int, run.stdout.split())
    assert at_first < 40, "else this shows nothing"
    assert at_last >= 80
