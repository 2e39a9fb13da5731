# SPDX-License-Identifier: Apache-2.0
"""Says once that no more files can be open, and once that they can again: until then whoever connects gets no answer."""

from __future__ import annotations

import asyncio
import logging

from kmonitor.wire.descriptors import can_open

LOOK_S = 1.0
FREE = 8
"""So many must be free for it to be over: not a line for each that comes and goes."""

logger = logging.getLogger(__name__)


async def watch_file_limit(limit: int) -> None:
    """For as long as it is not cancelled. `limit`: how many there can be."""
    reached = False
    while True:
        await asyncio.sleep(LOOK_S)
        if not reached and not can_open(1):
            reached = True
            logger.warning(
                "all %d files that this broker may have open are: nobody else can connect until some go; raise the limit (LimitNOFILE= "
                "of its unit, or prlimit --nofile)",
                limit,
            )
        elif reached and can_open(FREE):
            reached = False
            logger.warning("files can be opened again: agents and monitors can connect")
