# SPDX-License-Identifier: Apache-2.0
"""The exceptions of kmonitor, and the exit statuses of its commands (DESIGN section 6)."""

from __future__ import annotations

from typing import ClassVar


class KmonitorError(Exception):
    """Base of all. `str()` is one line: what happened and what to do.

    `exit_status` is what a command ends with when nothing better is to be done.
    """

    exit_status: ClassVar[int] = 1


class UsageError(KmonitorError):
    """The caller asked for something that cannot be: a bad argument, a name in use, a machine that lacks what it takes."""

    exit_status = 2


class BrokerUnreachableError(KmonitorError):
    """No broker answers at the address."""

    exit_status = 3


class NotAuthorisedError(KmonitorError):
    """The broker, or the kernel, does not let this caller do it."""

    exit_status = 4


class GapError(KmonitorError):
    """Events are missing, and the caller asked to stop at that."""

    exit_status = 5


class BadRecordError(KmonitorError):
    """Bytes that are not records of this version: another version's agent, or damage."""


class BadMaskError(UsageError):
    """An event mask that is zero, or has unknown bits or names."""


class BadSelectorError(UsageError):
    """A glob, pid, cgroup path, unit name or label that cannot be meant."""
