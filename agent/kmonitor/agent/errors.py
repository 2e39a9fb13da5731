# SPDX-License-Identifier: Apache-2.0
"""What can go wrong on a node. Each message is one line that says what to do."""

from __future__ import annotations

from kmonitor.wire.errors import KmonitorError, NotAuthorisedError, UsageError


class CaptureError(UsageError):
    """This machine, or this process, cannot capture: something that the source needs is missing."""


class MissingCapabilityError(NotAuthorisedError):
    """The kernel refuses for lack of a capability."""


class PinError(UsageError):
    """The folder of pins cannot be used: no bpffs, not writable, another agent holds it, or another version made it."""


class BpfError(KmonitorError):
    """libbpf or bpf(2) failed. `log` is what libbpf and the verifier said of it; empty if nothing."""

    def __init__(self, message: str, errno: int, log: str = "") -> None:
        super().__init__(message)
        self.errno = errno
        self.log = log


class ConnectorMessageError(KmonitorError):
    """The kernel's proc connector said something that is not understood."""


class NodeNameTakenError(UsageError):
    """Another agent is connected under this node's name."""


class PidfileError(UsageError):
    """A file does not name a process. The text follows the file's name: "is empty"."""


class PidfileMissingError(PidfileError):
    """There is no such file."""


class BrokerMessageError(KmonitorError):
    """The broker says what no broker of this protocol can mean. The stream is given up, and another one tried."""


class RingWentBackError(KmonitorError):
    """The broker knows another ring by this one's name, such as after the machine was restored from a snapshot."""


class ProtocolError(UsageError):
    """The broker refused what this agent sends: the two are of different versions."""
