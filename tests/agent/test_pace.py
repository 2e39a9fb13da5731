# SPDX-License-Identifier: Apache-2.0
"""How long what comes gathers, at rates that a test makes up."""

from __future__ import annotations

import pytest

from kmonitor.agent.pace import GATHER_S, URGENT_GATHER_S, Pace


def at_rate(pace: Pace, slots_a_second: float, *, every_s: float = 0.01, for_s: float = 5.0, start: float = 0.0) -> float:
    """Send evenly; when it ended."""
    now = start
    while now < start + for_s:
        pace.sent(now, round(slots_a_second * every_s))
        now += every_s
    return now


def test_nothing_gathers_at_first() -> None:
    assert Pace().nap_s(0.0) == 0


def test_a_process_that_comes_execs_and_goes_is_not_much() -> None:
    pace = Pace()
    for number in range(4):
        assert pace.nap_s(number * 0.002) == 0
        pace.sent(number * 0.002, 1)


@pytest.mark.parametrize(("slots", "least", "most"), [(2_000, 0.8, 1.0), (100_000, 1.0, 1.0), (500, 0.2, 0.3)])
def test_the_more_there_is_the_longer(slots: int, least: float, most: float) -> None:
    pace = Pace()
    now = at_rate(pace, slots)
    assert least * GATHER_S <= pace.nap_s(now) <= most * GATHER_S


def test_a_storm_is_forgotten_soon() -> None:
    pace = Pace()
    now = at_rate(pace, 50_000)
    assert pace.nap_s(now + 2.5) == 0


def test_urgent_ones_gather_only_when_they_are_many() -> None:
    pace = Pace()
    now = 100.0
    sent = 0
    while pace.calm_s(now) == 0:
        pace.sent_early(now)
        sent += 1
    assert sent == 50
    assert 0 < pace.calm_s(now) <= URGENT_GATHER_S
    assert pace.calm_s(now + URGENT_GATHER_S) == 0


def test_who_does_not_want_it_gets_everything_at_once() -> None:
    pace = Pace(0.0)
    assert pace.nap_s(at_rate(pace, 100_000)) == 0
