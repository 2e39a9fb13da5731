# SPDX-License-Identifier: Apache-2.0
"""The proc connector's messages as numpy columns: include/uapi/linux/netlink.h, connector.h and cn_proc.h.

A datagram is a netlink header, a connector header, and one proc_event: 76 bytes. Its fields are not aligned. All integers are
in the byte order of the machine, ids are those of the initial namespaces, and times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from kmonitor.agent.errors import ConnectorMessageError

DATAGRAM_SIZE = 128
"""Room for each datagram: more than any kernel has sent so far."""

NLMSG_DONE = 3
CN_IDX_PROC = 1
CN_VAL_PROC = 1
LISTEN = 1  # PROC_CN_MCAST_LISTEN
IGNORE = 2  # PROC_CN_MCAST_IGNORE

NONE = 0x00000000  # an acknowledgement
FORK = 0x00000001
EXEC = 0x00000002
UID = 0x00000004
GID = 0x00000040
SID = 0x00000080
PTRACE = 0x00000100
COMM = 0x00000200
COREDUMP = 0x40000000
EXIT = 0x80000000

MESSAGE_DTYPE: np.dtype[Any] = np.dtype(
    {
        "names": ["size", "kind", "index", "value", "sequence", "ack", "length", "what", "cpu", "monotonic_ns", "words"],
        "formats": ["=u4", "=u2", "=u4", "=u4", "=u4", "=u4", "=u2", "=u4", "=u4", "=u8", ("=u4", (6,))],
        "offsets": [0, 4, 16, 20, 24, 28, 32, 36, 40, 44, 52],
        "itemsize": DATAGRAM_SIZE,
    }
)
"""`words`, by `what`: FORK parent's tid and tgid, child's tid and tgid; EXEC tid, tgid; UID, GID tid, tgid, real id; COMM tid,
tgid, 16 bytes of name; EXIT tid, tgid, status, signal to the parent, and (from 4.18 on) the parent's tid and tgid; NONE an errno."""

_HEADER_END = 36  # where proc_event begins
_WORDS = 52  # where its data begins
_LEAST_WORDS = {NONE: 1, FORK: 4, EXEC: 2, UID: 4, GID: 4, COMM: 6, EXIT: 4}
"""Words of data that are read, by `what`. Others are not looked at."""
_NLMSG = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_CN = struct.Struct("=IIIIHH")  # index, value, sequence, acknowledgement, length, flags

Messages = npt.NDArray[np.void]
"""Shape (n,), dtype MESSAGE_DTYPE."""


def command(operation: int, answer: int) -> bytes:
    """What asks the kernel to LISTEN or IGNORE. It answers all listeners with `what` NONE, and `ack` as given here."""
    data = struct.pack("=I", operation)
    size = _NLMSG.size + _CN.size + len(data)
    return _NLMSG.pack(size, NLMSG_DONE, 0, 0, 0) + _CN.pack(CN_IDX_PROC, CN_VAL_PROC, 0, answer - 1 & 0xFFFFFFFF, len(data), 0) + data


def messages_of(datagrams: bytes | bytearray | memoryview | npt.NDArray[np.uint8], lengths: npt.NDArray[np.integer[Any]]) -> Messages:
    """View datagrams, each at the start of DATAGRAM_SIZE bytes, as messages.

    `lengths`, shape (n,): bytes of each. Raises ConnectorMessageError if one is no message of the proc connector, or is cut off.
    """
    messages = np.frombuffer(datagrams, dtype=MESSAGE_DTYPE, count=len(lengths))
    sizes = lengths.astype(np.int64)
    if bool((sizes < _WORDS).any()) or bool((sizes > DATAGRAM_SIZE).any()):
        raise ConnectorMessageError(_MALFORMED.format("size"))
    # A later kernel may have more to say behind what is known here.
    whole = (messages["size"].astype(np.int64) <= sizes) & (messages["length"].astype(np.int64) + _HEADER_END <= sizes)
    if not bool(whole.all()):
        raise ConnectorMessageError(_MALFORMED.format("length"))
    if bool(((messages["index"] != CN_IDX_PROC) | (messages["value"] != CN_VAL_PROC)).any()):
        raise ConnectorMessageError(_MALFORMED.format("id"))
    data = messages["length"].astype(np.int64) + _HEADER_END - _WORDS
    what = messages["what"]
    for kind, words in _LEAST_WORDS.items():
        if bool(((what == kind) & (data < 4 * words)).any()):
            raise ConnectorMessageError(_MALFORMED.format("data"))
    return messages


_MALFORMED = "a message of the proc connector has another {} than this version knows: please report it, with the kernel's version"
