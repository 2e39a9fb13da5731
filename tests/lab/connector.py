# SPDX-License-Identifier: Apache-2.0
"""The kernel's process connector: a second witness of forks, execs and exits.

Formats: include/uapi/linux/netlink.h, connector.h and cn_proc.h. Works in the initial network and pid namespace only.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from types import TracebackType
from typing import NamedTuple

from tests.lab.requires import Lack

NETLINK_CONNECTOR = 11
CN_IDX_PROC = 1
CN_VAL_PROC = 1
PROC_CN_MCAST_LISTEN = 1
PROC_EVENT_NONE = 0
PROC_EVENT_FORK = 0x00000001
PROC_EVENT_EXEC = 0x00000002
PROC_EVENT_EXIT = 0x80000000
SO_RCVBUFFORCE = 33
NLMSG_DONE = 3

_NLMSG = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_CN = struct.Struct("=IIIIHH")  # index, value, sequence, acknowledgement, length, flags
_EVENT = struct.Struct("=IIQ")  # what, cpu, nanoseconds
_FORK = struct.Struct("=IIII")  # parent's tid and tgid, child's tid and tgid
_EXEC = struct.Struct("=II")  # tid, tgid
_EXIT = struct.Struct("=IIII")  # tid, tgid, status, signal to the parent
_BODY = _NLMSG.size + _CN.size + _EVENT.size


class Witnessed(NamedTuple):
    """What the connector told of. For a fork `pid` and `tid` are the child's, `parent` its parent's pid."""

    what: int
    pid: int
    tid: int
    parent: int
    status: int


class Connector:
    """Listens from when it is made. Raises OSError when the kernel could not keep up (ENOBUFS)."""

    def __init__(self, buffer_bytes: int = 64 << 20) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_CONNECTOR)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, buffer_bytes)
        self._socket.bind((0, CN_IDX_PROC))  # any port: one process may have several
        self._sequences: dict[int, int] = {}
        self.numbers: list[tuple[int, int]] = []
        """CPU and sequence number of all that was read."""
        self.lost = 0
        """Messages that are missing, by the kernel's own counting on each CPU."""
        operation = struct.pack("=I", PROC_CN_MCAST_LISTEN)
        message = _CN.pack(CN_IDX_PROC, CN_VAL_PROC, 0, 0, len(operation), 0) + operation
        self._socket.send(_NLMSG.pack(_NLMSG.size + len(message), NLMSG_DONE, 0, 0, 0) + message)
        # The kernel answers once it listens.
        self._read_until(lambda event: event.what == PROC_EVENT_NONE, 5.0)

    def __enter__(self) -> Connector:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close()

    def until_end_of(self, pid: int, limit: float = 20.0) -> list[Witnessed]:
        """All that it told, up to the end of a process. Read late: until then the socket's buffer keeps it."""
        return self._read_until(lambda event: event.what == PROC_EVENT_EXIT and event.tid == pid, limit)

    def _read_until(self, last: object, limit: float) -> list[Witnessed]:
        assert callable(last)
        told: list[Witnessed] = []
        until = time.monotonic() + limit
        while True:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._socket], [], [], left)[0]:
                raise TimeoutError(f"the process connector did not tell in {limit:g} s")
            event = self._parse(self._socket.recv(4096))
            if event is None:
                continue
            told.append(event)
            if last(event):
                return told

    def _parse(self, data: bytes) -> Witnessed | None:
        sequence = _CN.unpack_from(data, _NLMSG.size)[2]
        what, cpu, _ = _EVENT.unpack_from(data, _NLMSG.size + _CN.size)
        self.numbers.append((cpu, sequence))
        # Answers, to other listeners too, are numbered like events; by older kernels they are not, and have no CPU.
        if cpu != 0xFFFFFFFF:
            if cpu in self._sequences:
                self.lost += (sequence - self._sequences[cpu] - 1) & 0xFFFFFFFF
            self._sequences[cpu] = sequence
        if what == PROC_EVENT_NONE:
            return Witnessed(what, 0, 0, 0, 0)
        if what == PROC_EVENT_FORK:
            _, parent_tgid, child_tid, child_tgid = _FORK.unpack_from(data, _BODY)
            return Witnessed(what, child_tgid, child_tid, parent_tgid, 0)
        if what == PROC_EVENT_EXEC:
            tid, tgid = _EXEC.unpack_from(data, _BODY)
            return Witnessed(what, tgid, tid, 0, 0)
        if what == PROC_EVENT_EXIT:
            tid, tgid, status, _ = _EXIT.unpack_from(data, _BODY)
            return Witnessed(what, tgid, tid, 0, status)
        return None


def connector_lack() -> Lack | None:
    """Why it cannot be had here; None if it can."""
    try:
        with Connector(1 << 16):
            return None
    except (OSError, TimeoutError):
        return Lack.CONNECTOR
