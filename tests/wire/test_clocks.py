# SPDX-License-Identifier: Apache-2.0
"""The two clocks of an event."""

from __future__ import annotations

import time
import uuid

import pytest

from kmonitor.wire import clocks

pytestmark = pytest.mark.wheel_ok


def test_boot_time_plus_the_offset_is_the_wall_clock() -> None:
    offset = clocks.boottime_to_unix_ns()
    before = time.time_ns()
    told = time.clock_gettime_ns(time.CLOCK_BOOTTIME) + offset
    after = time.time_ns()
    # 50 ms: an adjustment of the wall clock may fall in between, and a busy machine may hold us up.
    assert before - 50_000_000 <= told <= after + 50_000_000


def test_the_boot_id_is_a_uuid_that_stays() -> None:
    assert uuid.UUID(clocks.boot_id()).version == 4
    assert clocks.boot_id() == clocks.boot_id()
