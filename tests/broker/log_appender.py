# SPDX-License-Identifier: Apache-2.0
"""Run as a process of its own, to be killed: appends to a log as fast as it goes, and prints how far it is committed.

python -m tests.broker.log_appender FILE
"""

from __future__ import annotations

import asyncio
import sys

from kmonitor.broker.log.sqlite import SqliteLog
from tests.broker.logs import block


async def main() -> None:
    """Until it is killed."""
    log = SqliteLog(sys.argv[1])
    log.on_commit = lambda committed: print(committed, flush=True)
    positions = [log.ends(node)[1].position if log.ends(node) else 0 for node in ("a", "b")]
    while True:
        for at, node in enumerate(("a", "b")):
            made = block(node, positions[at], 1 + log.end % 7)
            log.append(made)
            positions[at] = made.end
            log.put("positions", node, str(made.end).encode())
        if log.end - log.committed > 500:
            await log.flush()
        await asyncio.sleep(0)


if __name__ == "__main__":
    asyncio.run(main())
