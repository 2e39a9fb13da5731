# SPDX-License-Identifier: Apache-2.0
"""What an agent does with an Interest, for tests that have no event loop to do it in, or whose loop is busy."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from kmonitor.agent.interest import InterestTable
from kmonitor.v1 import agent_pb2


def apply(table: InterestTable, interest: agent_pb2.Interest) -> agent_pb2.InterestApplied:
    """Apply it, and return the answer."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, table.apply(interest)).result()
