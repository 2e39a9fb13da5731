# SPDX-License-Identifier: Apache-2.0
"""The node's own stream: what the source captures goes up, what monitors ask for comes down."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from kmonitor.agent import listing
from kmonitor.agent.forwarder import Forwarder
from kmonitor.agent.identity import Identity
from kmonitor.agent.inference import Inference
from kmonitor.agent.interest import InterestTable
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


class Connection(Uplink):
    """Keeps the node connected to its broker until it is stopped."""

    def __init__(self, address: str, identity: Identity, source: Source, gather_s: float = GATHER_S) -> None:
        super().__init__(address, identity, source, gather_s)
        self._source = source
        self._interest = InterestTable(source)
        self._pidfiles = PidfileReader(source.processes)
        self._inference: Inference | None = None
        """The stream's."""

    def _add_to_hello(self, hello: agent_pb2.Hello) -> None:
        hello.reads_pidfiles = True
        hello.infers_exits = True

    def _connected(self) -> None:
        identity = self._identity
        say(f"kmonitor-agent: {identity.node} is connected to {self._address} (source {self._source.name}, scope {identity.scope})")

    def _jobs(self, forwarder: Forwarder) -> list[Coroutine[Any, Any, Any]]:
        self._inference = Inference(self._source, self._interest, forwarder.wake)
        return [self._watch_groups(forwarder), self._inference.run()]

    async def _take(self, message: agent_pb2.BrokerMessage, forwarder: Forwarder) -> None:
        kind = message.WhichOneof("kind")
        if kind == "interest":
            await forwarder.answer(lambda: agent_pb2.AgentMessage(applied=self._interest.apply(message.interest)))
        elif kind == "infer_exits" and self._inference is not None:
            self._inference.ask(message.infer_exits)
        elif kind == "list_processes":
            await forwarder.send(agent_pb2.AgentMessage(processes=listing.answer(self._source, message.list_processes)))
        elif kind == "read_pidfile":
            # Beside this loop: a file may lie on a server that does not answer.
            self._pidfiles.start(message.read_pidfile, forwarder.send)

    async def _disconnected(self) -> None:
        self._inference = None
        await self._pidfiles.abandon()

    async def _watch_groups(self, forwarder: Forwarder) -> None:
        """Say so when a control group or unit that is watched went away, or came anew, for ever."""
        while True:
            await asyncio.sleep(_GROUPS_SECONDS if self._interest.groups.mask() else _NO_GROUPS_SECONDS)
            changed = self._interest.groups.changed()
            if changed is not None:
                await forwarder.send(agent_pb2.AgentMessage(groups_changed=changed))
