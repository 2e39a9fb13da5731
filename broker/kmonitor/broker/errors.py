# SPDX-License-Identifier: Apache-2.0
"""What the broker refuses, with the code of google.rpc.Code that says why."""

from __future__ import annotations

import enum

from kmonitor.wire.errors import KmonitorError

MESSAGE_MOST = 600
"""Characters."""


class Code(enum.IntEnum):
    """Those numbers of google.rpc.Code that the broker uses; gRPC's status codes are the same."""

    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15


class RefusedError(KmonitorError):
    """A request, or a stream, that the broker does not accept or go on with."""

    def __init__(self, code: Code, message: str) -> None:
        # It may repeat what somebody wrote, and goes where there is room for a line.
        super().__init__(message if len(message) <= MESSAGE_MOST else message[: MESSAGE_MOST - 3] + "...")
        self.code = code
