# SPDX-License-Identifier: Apache-2.0
"""The version of kmonitor that is installed."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

_BEFORE, _AFTER = "kmonitor-", ".dist-info"


@cache  # a broker is asked for it with each list of nodes, and does not look at its disk for that
def installed_version() -> str:
    """As in the name of the folder of its metadata (PEP 376). importlib.metadata says the same, with 2 MB of parsers for mail and zip."""
    for folder in sys.path:
        for found in Path(folder).glob(f"{_BEFORE}*{_AFTER}"):
            return found.name[len(_BEFORE) : -len(_AFTER)]
    from importlib.metadata import version  # noqa: PLC0415

    return version("kmonitor")
