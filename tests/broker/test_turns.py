# SPDX-License-Identifier: Apache-2.0
"""Who waits while the broker sends a lot, at rates that a test makes up."""

from __future__ import annotations

import pytest

from kmonitor.broker.turns import MOST_S, Turns


def at_rate(turns: Turns, messages_a_second: int) -> float:
    """Send evenly for some seconds; when that ended."""
    now = 100.0
    while now < 103.0:
        turns.sent(now, messages_a_second // 100)
        now += 0.01
    return now


def test_nobody_waits_while_little_is_sent() -> None:
    turns = Turns()
    now = at_rate(turns, 900)
    assert turns.wait_s(now, now) == 0


def test_who_has_just_sent_waits_and_who_seldom_does_does_not() -> None:
    turns = Turns()
    now = at_rate(turns, 1500)
    assert 0.02 < turns.wait_s(now, now) < 0.08
    assert turns.wait_s(now, float("-inf")) == 0
    assert turns.wait_s(now, now - 0.1) == 0


def test_nobody_waits_for_long_however_much_is_sent() -> None:
    turns = Turns()
    now = at_rate(turns, 100_000)
    assert turns.wait_s(now, now) == pytest.approx(MOST_S)


def test_it_is_forgotten_soon() -> None:
    turns = Turns()
    now = at_rate(turns, 5_000)
    assert turns.wait_s(now + 1, now + 1) == 0
