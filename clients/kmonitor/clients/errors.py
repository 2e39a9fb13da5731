# SPDX-License-Identifier: Apache-2.0
"""What goes wrong for a monitor, as typed errors. Each one's text is a line for the person who asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kmonitor.wire.errors import BrokerUnreachableError, KmonitorError, NotAuthorisedError, UsageError
from kmonitor.wire.plain import plain_text

if TYPE_CHECKING:
    import grpc

INVALID_ARGUMENT, NOT_FOUND, PERMISSION_DENIED, FAILED_PRECONDITION, UNAUTHENTICATED = 3, 5, 7, 9, 16  # google.rpc.Code


class RegistrationError(UsageError):
    """The broker refused a registration or deregistration. `code` is a number of google.rpc.Code."""

    def __init__(self, message: str, code: int = INVALID_ARGUMENT) -> None:
        super().__init__(message)
        self.code = code


class NoSuchRegistrationError(RegistrationError):
    """There is nothing registered with these nodes, target and filter."""


class ProcessGoneError(UsageError):
    """The process that was to be waited for cannot be waited for. `pid` is 0 if it was asked for by a pidfile."""

    def __init__(self, node: str, pid: int, message: str) -> None:
        super().__init__(message)
        self.node = node
        self.pid = pid


class ProcessExitedError(ProcessGoneError):
    """It had ended already, or it ended unseen: its status is not known."""


class ProcessNotFoundError(ProcessGoneError):
    """There is no such process on the node."""


class NodeGoneError(ProcessGoneError):
    """An operator removed its node: nothing more will come from there."""


class WaitTimeoutError(KmonitorError, TimeoutError):
    """The process was still running when the time was up."""

    exit_status = 124  # as timeout(1)


class ClosedError(KmonitorError):
    """The monitor is closed, and was asked for more."""


class BrokerError(KmonitorError):
    """The broker failed at the request: its own fault, not the caller's."""


class NodeUnreachableError(KmonitorError):
    """The broker does not hear the node that was to be asked. It may do so again."""

    exit_status = 2


def unreachable(address: str) -> BrokerUnreachableError:
    """The one line for a broker that does not answer."""
    return BrokerUnreachableError(f"no broker answers at {address}: start kmonitor-broker, or set --broker / KMONITOR_BROKER")


def of_node(error: grpc.aio.AioRpcError, node: str) -> KmonitorError | None:
    """The error of a call that the broker has answered, and the node that it asked has not. None for any other."""
    text = plain_text(error.details() or "")
    if error.code().name != "UNAVAILABLE" or not text.startswith((f"node {node} ", f"node {node}: ")):
        return None  # of a connection that broke the text is grpc's
    if text.startswith(f"node {node} "):  # is not connected, went away
        return NodeUnreachableError(f"{text}: start its agent there, or ask again when it is back")
    return BrokerError(text)


def unreadable(address: str) -> BrokerError:
    """The error for a message that is none."""
    return BrokerError(f"what {address} sent cannot be read: it is no kmonitor broker, or one of another version: upgrade the older side")


def from_code(code: int, message: str) -> KmonitorError:
    """The error for a refusal in an answer (RequestError); `code` is a number of google.rpc.Code."""
    message = plain_text(message)
    if code in (PERMISSION_DENIED, UNAUTHENTICATED):
        return NotAuthorisedError(message)
    if code == NOT_FOUND:
        return NoSuchRegistrationError(message, code)
    return RegistrationError(message, code)


def from_rpc(error: grpc.aio.AioRpcError, address: str) -> KmonitorError:
    """The error for a call or stream that ended with a status other than OK."""
    name = error.code().name
    text = plain_text(" ".join((error.details() or name).split()))
    if name == "DEADLINE_EXCEEDED":
        return BrokerUnreachableError(f"the broker at {address} is there, and has not answered in time: it is overloaded, or has stopped")
    if name in ("UNAVAILABLE", "CANCELLED"):
        return unreachable(address)
    if name in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return NotAuthorisedError(text)
    if name in ("INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "ALREADY_EXISTS", "OUT_OF_RANGE", "RESOURCE_EXHAUSTED"):
        return UsageError(text)
    if name == "UNIMPLEMENTED":
        return UsageError(f"what answers at {address} is no kmonitor broker, or an older one ({text})")
    return BrokerError(f"the broker at {address} failed: {text}")
