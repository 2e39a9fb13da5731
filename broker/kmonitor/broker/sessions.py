# SPDX-License-Identifier: Apache-2.0
"""One monitor's stream: its registrations, its spans, and what is still to be sent to it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from kmonitor.broker.block import Block
from kmonitor.broker.encode import Encoder
from kmonitor.broker.errors import Code, RefusedError
from kmonitor.broker.log import EventLog
from kmonitor.broker.matching import Matcher
from kmonitor.broker.nodes import Node
from kmonitor.broker.notices import progress
from kmonitor.broker.outbox import Outbox, OverflowedError
from kmonitor.broker.registrations import ArmState, Key, Registration
from kmonitor.broker.router import Router
from kmonitor.wire.record import Indices

REQUESTS_HELD_ABOVE = 256 << 10
"""Bytes of unsent messages above which no more requests are read from the stream."""
REQUESTS_PENDING = 1024
"""Requests that no node has answered yet, above which no more are read."""


class Session:
    """Takes what the broker gives it, never blocks it, and gives it out to the one task that sends."""

    def __init__(self, log: EventLog, encoder: Encoder, router: Router, lagging: set[Outbox]) -> None:
        self.matcher = Matcher()
        self.outbox = Outbox(log, encoder, router, self.matcher, lagging)
        self.registrations: dict[Key, Registration] = {}
        self.cursor: dict[str, tuple[int, int]] = {}
        """Node -> (epoch, position of the last event that the client took from an earlier stream)."""
        self.failure: RefusedError | None = None
        """Why the broker ended the stream."""
        self.pending = 0
        """Answers to requests that are still to come from agents."""
        self._calm = asyncio.Event()
        self._calm.set()

    def offer(self, block: Block, rows: Indices) -> None:
        """Rows of a block for this session."""
        if self.failure is None:
            self.outbox.offer(block, rows)

    def tell(self, message: bytes) -> None:
        """A notification, behind all that came before it. A session that lets too many gather is ended."""
        if self.failure is not None:
            return
        try:
            self.outbox.put(message)
        except OverflowedError:
            self.fail(RefusedError(Code.RESOURCE_EXHAUSTED, "the monitor does not read: too many messages wait for it"))
        self._weigh()

    def progress(self, nodes: list[tuple[str, int, int, int]]) -> None:
        """How far the nodes are that it watches: (node, epoch, position, Unix nanoseconds)."""
        if self.failure is None:
            with contextlib.suppress(OverflowedError):  # it has much to read before that
                self.outbox.put_progress(progress(nodes))

    def pends(self, answers: int) -> None:
        """So many more answers are awaited; fewer, if negative."""
        self.pending += answers
        self._weigh()

    def fail(self, failure: RefusedError) -> None:
        """End the stream. The first reason counts."""
        if self.failure is None:
            self.failure = failure
        self.outbox.close()
        self._calm.set()

    async def ready_for_request(self) -> None:
        """Wait until the monitor has read enough of what it caused for its next request to be taken."""
        await self._calm.wait()

    async def batches(self) -> AsyncIterator[list[bytes]]:
        """What is to be sent, for as long as the stream lives. Raises RefusedError when the broker ends it."""
        while True:
            await self.outbox.filled.wait()
            if self.failure is not None:
                raise self.failure
            batch = self.outbox.take()
            self._weigh()
            if batch:
                yield batch
            if len(self.outbox):
                await asyncio.sleep(0)  # a long stretch of the log must not keep others waiting

    def concerned(self, node: Node) -> list[int]:
        """Ids of the registrations that hold on a node, or will once it is armed."""
        found = []
        for registration in self.registrations.values():
            arm = registration.arms.get(node.name)
            if registration.key.selects(node.name, node.labels) if arm is None else arm.state is not ArmState.OVER:
                found.append(registration.id)
        return found

    def _weigh(self) -> None:
        if self.failure is None and (self.outbox.messages_bytes > REQUESTS_HELD_ABOVE or self.pending > REQUESTS_PENDING):
            self._calm.clear()
        else:
            self._calm.set()
