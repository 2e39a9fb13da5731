# SPDX-License-Identifier: Apache-2.0
"""`kmon ha pacemaker`."""

from __future__ import annotations

from kmonitor.wire.errors import UsageError


def pacemaker() -> None:
    """Not there yet."""
    raise UsageError("kmon ha pacemaker is not there yet")
