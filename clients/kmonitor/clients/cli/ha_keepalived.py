# SPDX-License-Identifier: Apache-2.0
"""`kmon ha keepalived`."""

from __future__ import annotations

from kmonitor.wire.errors import UsageError


def keepalived() -> None:
    """Not there yet."""
    raise UsageError("kmon ha keepalived is not there yet")
