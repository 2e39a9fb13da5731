# SPDX-License-Identifier: Apache-2.0
"""What the broker refuses, with the code of google.rpc.Code that says why."""

from __future__ import annotations

import enum

from kmonitor.wire.errors import KmonitorError


class Code(enum.IntEnum):
    """Those numbers of google.rpc.Code that the broker uses; gRPC's status codes are the same."""

    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    INTERNAL = 13
    UNAVAILABLE = 14


class RefusedError(KmonitorError):
    """A request, or a stream, that the broker does not accept or go on with."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
