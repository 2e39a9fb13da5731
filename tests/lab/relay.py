# SPDX-License-Identifier: Apache-2.0
"""The relay of `kmon lab`, in a thread: how the tests' own monitors reach a broker in a network namespace."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

from kmonitor.clients.lab.relay import Relay, enter, listen


@contextlib.contextmanager
def relay(namespace: str, target: str) -> Iterator[str]:
    """The relay's address, HOST:PORT. `namespace` as ip-netns(8) has it; `target` is HOST:PORT in there."""
    loop = asyncio.new_event_loop()
    with listen(0) as listener:
        made = Relay(listener, target)

        def run() -> None:
            enter(namespace)
            loop.run_until_complete(made.serve())

        thread = threading.Thread(target=run, name=f"relay into {namespace}")
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            loop.call_soon_threadsafe(made.stop)
            thread.join()
            loop.close()
