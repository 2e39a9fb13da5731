# SPDX-License-Identifier: Apache-2.0
"""Pidfiles that a node's agent is to read, and who waits for which. What the files name is then armed as any process is."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from kmonitor.broker.registrations import Arm, Ask
from kmonitor.v1 import agent_pb2


@dataclass(eq=False, slots=True)
class _Read:
    path: str
    asks: list[Ask]
    sent: bool = False


class Pidfiles:
    """Those of one node."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._reads: dict[int, _Read] = {}
        self._of_arm: dict[Arm, int] = {}

    def want(self, ask: Ask, path: str) -> None:
        """Have the file read. A registration has it read once: two answers might be two processes."""
        call_id = self._of_arm.get(ask.arm)
        if call_id is None:
            call_id = self._of_arm[ask.arm] = next(self._ids)
            self._reads[call_id] = _Read(path, [])
        self._reads[call_id].asks.append(ask)

    def unsent(self) -> list[agent_pb2.ReadPidfileCall]:
        """What the agent has not been asked yet, and is from now on."""
        calls = []
        for call_id, read in self._reads.items():
            if not read.sent:
                read.sent = True
                calls.append(agent_pb2.ReadPidfileCall(call_id=call_id, path=read.path))
        return calls

    def answered(self, call_id: int) -> list[Ask]:
        """Those who waited for this answer; none if there is no such call any more."""
        read = self._reads.pop(call_id, None)
        if read is None:
            return []
        del self._of_arm[read.asks[0].arm]
        return read.asks

    def abandon(self) -> list[Ask]:
        """The agent is gone: all asks that no answer came to."""
        asks = [ask for read in self._reads.values() for ask in read.asks]
        self._reads.clear()
        self._of_arm.clear()
        return asks
