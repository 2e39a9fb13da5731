# SPDX-License-Identifier: Apache-2.0
"""What holds for every test."""

from __future__ import annotations

import signal

import pytest
from hypothesis import settings

# No deadline for one example: the machine may be busy with the workloads of other tests; pytest's own limit stays.
settings.register_profile("kmonitor", deadline=None)
settings.load_profile("kmonitor")


if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    # Under nohup: a handler protects this process as well, and is not inherited. What the tests start hears a hangup as it is documented.
    signal.signal(signal.SIGHUP, lambda _number, _frame: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Write the marker `capture` into the report, where tools/check_ran.py looks for it."""
    for item in items:
        if item.get_closest_marker("capture"):
            item.user_properties.append(("capture", "yes"))
