# SPDX-License-Identifier: Apache-2.0
"""The node's own stream: what the source captures goes up, what monitors ask for comes down."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import partial
from typing import Any

from kmonitor.agent.errors import CaptureError
from kmonitor.agent.forwarder import Forwarder
from kmonitor.agent.identity import Identity
from kmonitor.agent.inference import Inference
from kmonitor.agent.interest import InterestTable
from kmonitor.agent.listing import Listing
from kmonitor.agent.pace import GATHER_S
from kmonitor.agent.pidfile import PidfileReader
from kmonitor.agent.source import Source
from kmonitor.agent.uplink import Uplink
from kmonitor.v1 import agent_pb2
from kmonitor.wire.saying import say

_GROUPS_SECONDS = 0.1
"""How often watched groups are looked at; some 3 us for each."""
_NO_GROUPS_SECONDS = 1.0
"""How often it is looked whether there are any."""
_ORDERS_MOST = 16
"""Of the broker that wait to be done. With more, nothing is read from it."""


class Connection(Uplink):
    """Keeps the node connected to its broker until it is stopped."""

    def __init__(self, address: str, identity: Identity, source: Source, gather_s: float = GATHER_S) -> None:
        super().__init__(address, identity, source, gather_s)
        self._source = source
        self._interest = InterestTable(source)
        self._listing = Listing(source)
        self._pidfiles = PidfileReader(source.processes)
        self._orders: asyncio.Queue[agent_pb2.BrokerMessage] = asyncio.Queue()
        """The stream's: what changes the source, or its ring, in the order in which it came."""

    def _add_to_hello(self, hello: agent_pb2.Hello) -> None:
        hello.reads_pidfiles = True
        hello.infers_exits = True

    def _connected(self) -> None:
        identity = self._identity
        say(f"kmonitor-agent: {identity.node} is connected to {self._address} (source {self._source.name}, scope {identity.scope})")

    def _jobs(self, forwarder: Forwarder) -> list[Coroutine[Any, Any, Any]]:
        self._orders = asyncio.Queue(_ORDERS_MOST)
        inference = Inference(self._source, self._interest, forwarder.wake)
        return [self._watch_groups(forwarder), self._obey(self._orders, inference, forwarder), inference.run()]

    async def _take(self, message: agent_pb2.BrokerMessage, forwarder: Forwarder) -> None:
        """Beside the loop that reads, whatever takes longer than a moment: acknowledgements must be read meanwhile."""
        kind = message.WhichOneof("kind")
        if kind in ("interest", "infer_exits"):
            await self._orders.put(message)
        elif kind == "list_processes":
            self._listing.start(message.list_processes, forwarder.send)
        elif kind == "read_pidfile":
            self._pidfiles.start(message.read_pidfile, forwarder.send)

    async def _obey(self, orders: asyncio.Queue[agent_pb2.BrokerMessage], inference: Inference, forwarder: Forwarder) -> None:
        """Do what the broker orders, one after the other, for ever."""
        while True:
            order = await orders.get()
            if order.WhichOneof("kind") == "interest":
                await forwarder.answer(partial(self._apply, order.interest))
            else:
                await inference.ask(order.infer_exits)

    async def _apply(self, interest: agent_pb2.Interest) -> agent_pb2.AgentMessage:
        return agent_pb2.AgentMessage(applied=await self._interest.apply(interest))

    async def _disconnected(self) -> None:
        await self._listing.abandon()
        await self._pidfiles.abandon()

    async def _watch_groups(self, forwarder: Forwarder) -> None:
        """Say so when a control group or unit that is watched went away, or came anew, for ever."""
        while True:
            await asyncio.sleep(_GROUPS_SECONDS if self._interest.groups.mask() else _NO_GROUPS_SECONDS)
            try:
                changed = await self._interest.groups.changed()
            except CaptureError:
                continue  # the next time
            if changed is not None:
                await forwarder.send(agent_pb2.AgentMessage(groups_changed=changed))
