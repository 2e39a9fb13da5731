# SPDX-License-Identifier: Apache-2.0
"""What is guarded follows the cluster, whoever has read its state."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import Any, Self, cast

from kmonitor.clients import Subject, Verdict
from kmonitor.clients.ha.cluster_state import ClusterNode, ClusterState, Resource
from kmonitor.clients.ha.judge import Settings
from kmonitor.clients.ha.pacemaker import Pacemaker
from kmonitor.clients.ha.report import Lines
from kmonitor.clients.ha.unheard import Unheard

NODES = {name: ClusterNode(name, online=True) for name in ("alpha", "beta")}
WEB = Resource("web", "ocf:heartbeat:anything", "alpha", "Started")


class FakeGuard:
    """Never says anything."""

    def __init__(self) -> None:
        self.nodes: asyncio.Queue[str] = asyncio.Queue()

    async def add(self, subject: Subject) -> None:
        self.nodes.put_nowait(subject.node)

    def verdict(self, _name: str) -> Verdict:
        raise KeyError

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Verdict:
        await asyncio.Event().wait()
        raise StopAsyncIteration


class FakeView:
    """Pacemaker, of which only somebody else reads the state."""

    def __init__(self) -> None:
        self.state = ClusterState((0, 1, 1), "alpha", False, False, NODES, (WEB,))

    async def update(self) -> None:
        """There is nothing that is not known here."""


class FakeProcesses:
    async def subject(self, resource: Resource, _state: ClusterState) -> Subject:
        return Subject(f"web on {resource.node}", resource.node, pidfile="/run/web.pid")


async def test_a_move_that_was_read_while_a_death_was_looked_into() -> None:
    """The state is what it was at the last look by then: all the same it was not gone by yet."""
    guard, view = FakeGuard(), FakeView()
    unheard = cast(Any, Unheard)(None, view, Settings())
    made: Any = cast(Any, Pacemaker)(
        guard, view, FakeProcesses(), None, None, Lines(print), unheard, poll=0.01, grace_of=lambda _name, _primitive: 0.0
    )
    running = asyncio.create_task(made.run())
    try:
        async with asyncio.timeout(10):
            assert await guard.nodes.get() == "alpha"
            view.state = replace(view.state, version=(0, 2, 5), resources=(replace(WEB, node="beta"),))
            assert await guard.nodes.get() == "beta"
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
