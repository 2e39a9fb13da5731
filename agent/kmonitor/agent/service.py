# SPDX-License-Identifier: Apache-2.0
"""The agent once it captures: on an event loop, with its broker, until a signal ends it. It brings asyncio and gRPC, most of what an agent
imports; `kmonitor.agent.cli` has it imported beside the work of the kernel."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from typing import Literal

from kmonitor.agent.connection import Connection
from kmonitor.agent.identity import Identity
from kmonitor.agent.pins import PinFolder
from kmonitor.agent.predecessor import Draining, Predecessor, discard
from kmonitor.agent.source import Source
from kmonitor.agent.uplink import Uplink
from kmonitor.wire.errors import KmonitorError

log = logging.getLogger("kmonitor-agent")

Signalled = Literal["term", "int"]


def run(address: str, identity: Identity, source: Source, gather_s: float, on_refused: Callable[[], None] = lambda: None) -> Signalled:
    """Keep this node connected to its broker until a signal ends it: which one. `gather_s`: see Forwarder. Raises KmonitorError.

    `on_refused` is called before that if no broker has ever taken it.
    """
    return asyncio.run(_connect(address, identity, source, gather_s, on_refused)) or "term"


async def _connect(address: str, identity: Identity, source: Source, gather_s: float, on_refused: Callable[[], None]) -> Signalled | None:
    connection = Connection(address, identity, source, gather_s)
    try:
        return await _until_signal(connection)
    except KmonitorError:
        if not connection.was_connected:
            on_refused()
        raise


def succeed(found: list[Predecessor], folders: list[PinFolder], address: str, identity: Identity) -> Signalled | None:
    """Bring to the broker what they have recorded, and remove them; the signal that ended it, if one did."""
    try:
        for old in found:
            draining = Draining(address, identity, old)
            signalled = asyncio.run(_until_signal(draining))
            if not draining.drained:
                return signalled or "term"
            old.close()
            discard(old.pins, folders[0])
            log.info("the probe that was pinned is replaced: all that it had recorded was delivered")
            if signalled is not None:
                return signalled
    finally:
        for old in found:
            old.close()
    return None


async def _until_signal(uplink: Uplink) -> Signalled | None:
    """Run it; which signal ended it, if one did."""
    received: list[Signalled] = []

    def on_signal(which: Signalled) -> None:
        if received:  # a second one: do not wait for the broker
            os._exit(1)
        received.append(which)
        uplink.stop()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, on_signal, "term")
    loop.add_signal_handler(signal.SIGINT, on_signal, "int")
    await uplink.run()
    return received[0] if received else None
