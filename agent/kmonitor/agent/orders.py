# SPDX-License-Identifier: Apache-2.0
"""What a broker may say, looked at before it is done; and its long messages, which come in parts, made whole.

A broker that is faulty, or is none, must not have this agent look outside the control groups, fall over, or fill its memory.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from kmonitor.agent.errors import BrokerMessageError
from kmonitor.v1 import agent_pb2
from kmonitor.wire.errors import BadSelectorError
from kmonitor.wire.record import SLOT_SIZE
from kmonitor.wire.selectors import PID_MAX, check_cgroup_path

INTEREST_MOST = 128 << 20
"""Bytes of an Interest in parts: some 4,000,000 processes, as many as the largest table has."""
_NAME_MOST = 512


class Orders:
    """Of one stream."""

    def __init__(self) -> None:
        self._parts: agent_pb2.Interest | None = None
        """What has come of an Interest in parts."""
        self._bytes = 0

    def take(self, message: agent_pb2.BrokerMessage | None) -> agent_pb2.BrokerMessage | None:
        """Return a message that can be done: None while more of it is to come. `message`: of `decode`. Raises BrokerMessageError."""
        if message is None:
            raise BrokerMessageError("a message that is none of this protocol")
        kind = message.WhichOneof("kind")
        if kind == "interest":
            _check_interest(message.interest)
            return self._whole(message)
        if kind == "list_processes" and message.list_processes.filter.WhichOneof("group") is not None:
            wanted = message.list_processes.filter
            _check_group(wanted.cgroup, wanted.unit)
        return message

    def _whole(self, message: agent_pb2.BrokerMessage) -> agent_pb2.BrokerMessage | None:
        part, before = message.interest, self._parts
        if before is None and not part.more:
            return message
        if before is None:
            before, self._bytes = agent_pb2.Interest(), 0
        elif before.version != part.version:
            raise BrokerMessageError(f"version {part.version} of what to watch begins within version {before.version}")
        self._bytes += part.ByteSize()
        if self._bytes > INTEREST_MOST:
            raise BrokerMessageError(f"what to watch has more than {INTEREST_MOST} bytes")
        before.MergeFrom(part)
        self._parts = before if part.more else None
        if part.more:
            return None
        before.more = False
        return agent_pb2.BrokerMessage(interest=before)


def decode(data: bytes) -> agent_pb2.BrokerMessage | None:
    """Return the message; None for what is none: gRPC would write a traceback."""
    try:
        return agent_pb2.BrokerMessage.FromString(data)
    except DecodeError:
        return None


def check_position(what: str, position: int, most: int) -> None:
    """Raise BrokerMessageError unless a position is one of the ring's, up to `most`."""
    if position % SLOT_SIZE or position > most:
        raise BrokerMessageError(f"{what} at position {position} of a ring that has come to {most}")


def _check_interest(interest: agent_pb2.Interest) -> None:
    for group in interest.groups:
        _check_group(group.cgroup, group.unit)
    if any(not 0 < process.pid <= PID_MAX for process in interest.processes):
        raise BrokerMessageError("it names a pid that no process can have")


def _check_group(cgroup: str, unit: str) -> None:
    """Units of other kinds than this version knows are for the look-up to refuse: none of them may be a path."""
    if unit:
        if len(unit) > _NAME_MOST or "/" in unit or "\0" in unit or unit in {".", ".."}:
            raise BrokerMessageError(f"{unit[:80]!r} is no unit")
        return
    try:
        check_cgroup_path(cgroup)
    except BadSelectorError:
        raise BrokerMessageError(f"{cgroup[:80]!r} is no path of a control group") from None
