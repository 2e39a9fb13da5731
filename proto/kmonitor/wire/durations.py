# SPDX-License-Identifier: Apache-2.0
"""The one grammar of durations: "250ms", "3s", "1.5", "2m", "12h", "7d"."""

from __future__ import annotations

import re

from kmonitor.wire.errors import UsageError

_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}


def parse_duration(text: str) -> float:
    """Return the seconds of a duration; zero is one.

    Raises UsageError.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|)", text.strip())
    if found is None:
        raise UsageError(f"{text!r} is not a duration: write 250ms, 3s, 2m, 12h or 7d")
    return float(found[1]) * _UNITS_S[found[2]]
