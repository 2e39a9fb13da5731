# SPDX-License-Identifier: Apache-2.0
"""The proc connector's socket: listening, receiving many messages with one system call, and counting those that are missing.

The kernel puts each message into the socket's receive buffer, in the order of the events, before the process goes on. When the
buffer is full it drops messages until the reader has emptied it (net/netlink/af_netlink.c, NETLINK_S_CONGESTED), and the next
receive says ENOBUFS, once. So what is missing lies, in one piece, behind what the buffer held.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import select
import socket
import struct
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kmonitor.agent import capabilities
from kmonitor.agent.errors import CaptureError, MissingCapabilityError
from kmonitor.agent.sources import proc_messages
from kmonitor.agent.sources.proc_messages import DATAGRAM_SIZE, IGNORE, LISTEN, NONE, Messages, command, messages_of

log = logging.getLogger("kmonitor-agent")

_NETLINK_CONNECTOR = 11
_SO_RCVBUFFORCE = 33
_SO_MEMINFO = 55
_MEMINFO_DROPS = 8  # SK_MEMINFO_DROPS, include/uapi/linux/sock_diag.h
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO, include/linux/proc_ns.h
_INITIAL_USER_NAMESPACE = 0xEFFFFFFD
_ANSWER_S = 2.0
_NO_CPU = 0xFFFFFFFF  # in the answers of older kernels: they are not counted; newer ones count answers like events

_HEADER = np.dtype(
    [("name", "P"), ("namelen", "I"), ("iov", "P"), ("iovlen", "P"), ("control", "P"), ("controllen", "P"), ("flags", "i")], align=True
)
_MMSGHDR = np.dtype([("header", _HEADER), ("length", "I")], align=True)  # struct mmsghdr, recvmmsg(2)
_IOVEC = np.dtype([("base", "P"), ("length", "P")], align=True)
_ADDRESS = np.dtype([("family", "=u2"), ("pad", "=u2"), ("port", "=u4"), ("groups", "=u4")])  # struct sockaddr_nl, netlink(7)

_libc = ctypes.CDLL(None, use_errno=True)


class Batch:
    """Room for many datagrams, filled by one recvmmsg(2)."""

    def __init__(self, most: int = 1024) -> None:
        self._datagrams = np.zeros((most, DATAGRAM_SIZE), dtype=np.uint8)
        self._addresses = np.zeros(most, dtype=_ADDRESS)
        self._iovecs = np.zeros(most, dtype=_IOVEC)
        self._headers = np.zeros(most, dtype=_MMSGHDR)
        counted = np.arange(most, dtype=np.uintp)
        self._iovecs["base"] = self._datagrams.ctypes.data + counted * DATAGRAM_SIZE
        self._iovecs["length"] = DATAGRAM_SIZE
        header = self._headers["header"]
        header["name"] = self._addresses.ctypes.data + counted * _ADDRESS.itemsize
        header["namelen"] = _ADDRESS.itemsize
        header["iov"] = self._iovecs.ctypes.data + counted * _IOVEC.itemsize
        header["iovlen"] = 1
        self._at = ctypes.c_void_p(self._headers.ctypes.data)
        self._most = ctypes.c_uint(most)
        self._flags = ctypes.c_int(socket.MSG_DONTWAIT)

    def receive(self, fd: int) -> Messages | None:
        """What lies in the socket's buffer, as much as there is room for; None if it is empty. It is a view: use it before the next.

        Raises OSError (ENOBUFS: messages were dropped), ConnectorMessageError.
        """
        count = _libc.recvmmsg(fd, self._at, self._most, self._flags, None)
        if count < 0:
            number = ctypes.get_errno()
            if number in (errno.EAGAIN, errno.EINTR):
                return None
            raise OSError(number, os.strerror(number))
        lengths: npt.NDArray[np.uint32] = self._headers["length"][:count]
        # Whoever has CAP_NET_ADMIN can write to this socket, and only the kernel is to be believed: its port is 0.
        kernels = self._addresses["port"][:count] == 0
        if bool(kernels.all()):
            return messages_of(self._datagrams, lengths)
        mine = np.flatnonzero(kernels)
        return messages_of(np.ascontiguousarray(self._datagrams[mine]), lengths[mine])


class Connector:
    """A socket that listens from when it is made until `close`. Numbers and messages begin anew with each."""

    def __init__(self, buffer_bytes: int, batch: Batch) -> None:
        """`buffer_bytes` is doubled by the kernel, which counts some 800 bytes for each message (socket(7), SO_RCVBUF).

        Raises CaptureError, MissingCapabilityError.
        """
        check_namespaces()
        self.overrun = False
        """The kernel said that messages were dropped, since this was last cleared."""
        self.heard: dict[int, tuple[int, int]] = {}
        """Of each CPU the first sequence number, and the one that is expected next."""
        self.received = 0
        """Messages that have such a number."""
        self._missing = 0
        self._batch = batch
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, _NETLINK_CONNECTOR
            )
        except OSError as error:
            raise refusal(error) from error
        try:
            self.buffer_bytes = _size(self._socket, buffer_bytes)
            """As the kernel gave it, doubled."""
            self._socket.bind((0, proc_messages.CN_IDX_PROC))
            self._socket.send(command(LISTEN, self._number()))
            self._wait_answer()
        except OSError as error:
            self._socket.close()
            raise refusal(error) from error
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Readable when there are messages."""
        return self._socket.fileno()

    def receive(self) -> Messages | None:
        """The next messages, counted; None when there are none for now. A view: use it before the next call."""
        try:
            messages = self._batch.receive(self._socket.fileno())
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            self.overrun = True
            messages = self._batch.receive(self._socket.fileno())
        if messages is not None:
            self._count(messages)
        return messages

    def missing(self) -> int:
        """Messages that the kernel could not give to this socket, since it was made.

        Two counts, of which the higher is right. The socket's own knows at once what the full buffer refused. The sequence numbers,
        of which each CPU has its own, also know of what the kernel had no memory for, but not before that CPU's next message.
        """
        drops = 0
        with contextlib.suppress(OSError, struct.error):  # before 4.12
            drops = int(struct.unpack("9I", self._socket.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36))[_MEMINFO_DROPS])
        return max(drops, self._missing)

    @property
    def missing_by_sequence(self) -> int:
        """What the sequence numbers alone know."""
        return self._missing

    def close(self) -> None:
        """Say that nobody listens here, so that the kernel need not make messages, and give the socket back."""
        with contextlib.suppress(OSError):
            # Before 6.6 the kernel does not notice when a listener is gone.
            self._socket.send(command(IGNORE, self._number()))
        self._socket.close()

    def _number(self) -> int:
        # All listeners get the answers to all: told apart by this. The port is nobody else's.
        port: int = self._socket.getsockname()[0]
        return port & 0xFFFFFFFF

    def _wait_answer(self) -> None:
        """The kernel answers before send() returns, if it does. What other listeners made it send before is of no interest."""
        number = self._number()
        until = time.monotonic() + _ANSWER_S
        while True:
            if not select.select([self._socket], [], [], max(until - time.monotonic(), 0))[0]:
                raise CaptureError("the proc connector does not answer: the kernel must be built with CONFIG_PROC_EVENTS")
            messages = self.receive()
            if messages is None:
                continue
            answers = np.flatnonzero((messages["what"] == NONE) & (messages["ack"] == number))
            if len(answers):
                refused = int(messages["words"][answers[0]][0])
                if refused:
                    raise OSError(refused, os.strerror(refused))
                self.overrun = False
                return

    def _count(self, messages: Messages) -> None:
        """Per CPU the numbers are consecutive, for all that the kernel sent or wanted to send."""
        cpus = messages["cpu"]
        events = cpus != _NO_CPU
        sequences = messages["sequence"]
        for cpu in np.unique(cpus[events]).tolist():
            own = sequences[events & (cpus == cpu)]
            following = int(own[-1]) + 1 & 0xFFFFFFFF
            first, expected = self.heard.get(cpu, (int(own[0]), int(own[0])))
            self.heard[cpu] = first, following
            self.received += len(own)
            self._missing += following - expected - len(own) & 0xFFFFFFFF


def check_namespaces() -> None:
    """Raises CaptureError unless this process is in the initial pid and user namespaces: elsewhere the kernel says nothing."""
    for name, initial in (("pid", _INITIAL_PID_NAMESPACE), ("user", _INITIAL_USER_NAMESPACE)):
        if Path(f"/proc/self/ns/{name}").stat().st_ino != initial:
            raise CaptureError(f"source netlink needs the initial {name} namespace, and this agent runs in another: run it on the host")


def _size(listener: socket.socket, wanted: int) -> int:
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, wanted)
    except PermissionError:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wanted)
    given = listener.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    if given < wanted:
        log.warning(
            "the kernel gives a receive buffer of %d KiB and not of %d: give CAP_NET_ADMIN, or raise sysctl net.core.rmem_max",
            given >> 10,
            wanted >> 10,
        )
    return given


def refusal(error: OSError) -> CaptureError | MissingCapabilityError:
    """What to say of an error of the socket."""
    if error.errno in (errno.EPERM, errno.EACCES):
        return capabilities.refusal("the kernel refuses to report process events", "CAP_NET_ADMIN")
    if error.errno == errno.ECONNREFUSED:
        return CaptureError(
            "source netlink needs the initial network namespace, and this agent runs in another: run it on the host's network"
        )
    if error.errno in (errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT, errno.EAFNOSUPPORT):
        return CaptureError("the kernel has no proc connector: it must be built with CONFIG_CONNECTOR and CONFIG_PROC_EVENTS")
    return CaptureError(f"the proc connector cannot be used: {error.strerror or error}")
