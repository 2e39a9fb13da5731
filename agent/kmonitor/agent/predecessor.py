# SPDX-License-Identifier: Apache-2.0
"""What an agent of another version, or of another source, has left pinned: its ring is brought to the broker, and then its probe makes
room for this one's.

Only what bpf/kmonitor.h calls fixed for ever is used here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from typing import Any

from kmonitor.agent.errors import ProtocolError
from kmonitor.agent.forwarder import Forwarder
from kmonitor.agent.identity import Identity
from kmonitor.agent.pins import PinFolder
from kmonitor.agent.probe import can_adopt, is_current, open_control, open_misses, open_ring, source_of
from kmonitor.agent.secret import pinned_secret
from kmonitor.agent.uplink import Uplink
from kmonitor.v1 import agent_pb2

log = logging.getLogger("kmonitor-agent")

_SETTLE_S = 0.05
"""A program that was running when its probe was stopped has come to its end by then."""


class Predecessor:
    """A pinned ring, and the probe that may still fill it. A Feed."""

    def __init__(self, pins: PinFolder, whose: str = "another version's") -> None:
        """`pins` is open, and stays the caller's. `whose`: for what is said of it. Raises PinError, BpfError."""
        self.pins = pins
        self.whose = whose
        self._closed = False
        self.name = source_of(pins.names())
        self.record_version = pins.version
        with contextlib.ExitStack() as stack:
            misses = open_misses(pins)
            stack.callback(misses.close)
            self.control = open_control(pins, misses)
            stack.callback(self.control.close)
            self.secret = pinned_secret(pins)
            self.ring = open_ring(pins, self.control)
            self._opened = stack.pop_all()

    @property
    def epoch(self) -> int:
        """Names the ring."""
        return self.control["epoch"]

    def begin_epoch(self) -> None:
        """Name the ring anew, with what is in it."""
        self.control["epoch"] = max(time.time_ns(), self.epoch + 1)

    @property
    def waiting(self) -> int:
        """Bytes that no broker has acknowledged."""
        return self.ring.producer - self.ring.consumer

    @property
    def captures(self) -> bool:
        """Whether its probe may still add to the ring."""
        return any(name.startswith("link_") for name in self.pins.names())

    def stop(self) -> None:
        """Nothing more is captured. What is in the ring stays, over an end of this process too."""
        self.control["any_mask"] = 0
        self.pins.detach()

    def close(self) -> None:
        """Give back what this process holds. Doing it again does no harm."""
        if not self._closed:
            self._closed = True
            self.ring.close()
            self._opened.close()


def find(own: PinFolder, others: list[PinFolder], choice: str) -> list[Predecessor]:
    """Those of a node, the oldest first. All folders are open; `own` is this version's. What is left of a probe without anything
    to deliver is removed. `choice`: see probe.can_adopt.

    Raises PinError, BpfError.
    """
    found = []
    for folder in (own, *others):
        names = folder.names()
        whose = "another version's"
        if folder is own:
            if not names or can_adopt(own, choice):
                continue
            if is_current(own):
                whose = f"one of source {source_of(names)}"
        if names >= {"map_events", "map_control"}:
            old = Predecessor(folder, whose)
            if old.captures or old.waiting:
                found.append(old)
                continue
            old.close()
        discard(folder, own)  # an agent was killed while it pinned or unpinned
    return sorted(found, key=lambda old: old.epoch)


def discard(folder: PinFolder, own: PinFolder) -> None:
    """Nothing that is pinned there is needed any more; the folder itself only if it is this version's."""
    if folder is own:
        folder.clear()
    else:
        folder.remove()


class Draining(Uplink):
    """Keeps the ring of a predecessor connected until all of it is in the broker's log and its probe is stopped.

    The old probe goes on capturing until the broker has what was there when the stream began: a broker that is away costs
    nothing while the ring has room.
    """

    def __init__(self, address: str, identity: Identity, old: Predecessor) -> None:
        super().__init__(address, identity, old)
        self._old = old
        self.drained = False

    async def run(self) -> None:
        """Until it is drained, or `stop`. Raises as Uplink.run does."""
        try:
            await super().run()
        except ProtocolError as error:
            raise ProtocolError(
                f"{error}; so the {self._old.waiting} bytes that the pinned probe has recorded, in {self._old.pins.path}, cannot be"
                " delivered: connect to a broker that takes them, or give them up with --unpin"
            ) from None

    def _add_to_hello(self, hello: agent_pb2.Hello) -> None:
        hello.draining = True

    def _connected(self) -> None:
        log.info(
            "the pinned probe is %s: the broker at %s gets the %d bytes that wait in its ring, then it is replaced",
            self._old.whose,
            self._address,
            self._old.waiting,
        )

    def _jobs(self, forwarder: Forwarder) -> list[Coroutine[Any, Any, Any]]:
        return [self._drain(forwarder)]

    async def _drain(self, forwarder: Forwarder) -> None:
        ring = self._old.ring
        if self._old.captures:
            await forwarder.until_released(ring.producer)
            self._old.stop()
            await asyncio.sleep(_SETTLE_S)
        await forwarder.until_released(ring.producer)
        self.drained = True
        self.stop()
