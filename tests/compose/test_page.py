# SPDX-License-Identifier: Apache-2.0
"""How the page is read: what may differ from it, and what may not. No engine is needed."""

from __future__ import annotations

import pytest

from tests.compose import page

KILLED = [
    "09:20:50.447  web1      FORK        8  node             → 62",
    "09:20:51.100  web1      ABORT      62  shop             SIGKILL by sh(54) uid 0",
    "09:20:51.100  web1      EXIT       62  shop             SIGKILL by sh(54) uid 0  after 31.32 s",
]
REALLY = [
    "23:59:01.001 web1 FORK 1 node → 7",
    "23:59:01.002 web1 FORK 1 node → 9",
    "23:59:01.003 db1 FORK 1 shop → 10",
    "23:59:01.004 web1 ABORT 9 shop SIGKILL by sh(12) uid 0",
    "23:59:01.005 web1 EXIT 9 shop SIGKILL by sh(12) uid 0 after 4.0 ms",
]


def test_the_page_has_two_tours_each_up_and_down() -> None:
    tours = page.tours()
    assert [" up --build" in tour[0].steps[0].command for tour in tours] == [True, True]
    assert [tour[-1].steps[-1].command.endswith(" down --volumes") for tour in tours] == [True, True]
    assert all(tour[0].steps[0].seen for tour in tours)


def test_a_pid_that_is_shown_twice_is_the_same_process() -> None:
    assert page.match(KILLED, REALLY, {}) == {"8": "1", "62": "9", "54": "12"}
    assert page.match(KILLED, REALLY, {"54": "11"}) is None
    assert page.match(KILLED, [*REALLY[:4], REALLY[4].replace("EXIT 9", "EXIT 7")], {}) is None


@pytest.mark.parametrize(
    ("old", "new"), [("web1", "web2"), ("SIGKILL", "SIGTERM"), ("uid 0", "uid 1"), ("ABORT", "EXIT"), ("shop", "order")]
)
def test_nothing_else_may_differ(old: str, new: str) -> None:
    assert page.match(KILLED, [line.replace(old, new) for line in REALLY], {}) is None


def test_the_order_counts() -> None:
    assert page.match(KILLED, REALLY[::-1], {}) is None


@pytest.mark.parametrize(
    ("shown", "really"),
    [
        ("── web2: node is UP: its agent connected ─────", "── web2: node is UP: its agent connected ──"),
        ("── web2: node is UNREACHABLE: … ────", "── web2: node is UNREACHABLE: its agent ended the stream ──"),
        ("── the broker at broker:7221 answers again after 5.3 s ──", "── the broker at broker:7221 answers again after 12.0 s ──"),
        (
            " db1    UP      for 14.28 s   core   6.18.44   0.1.0   all   768 B   0",
            "db1 UP for 1m05s core 5.15.0-91-generic 0.2.0 all 1.1 KiB 0",
        ),
        ("app: pid 75 was killed, pid 155 runs after 302 ms", "app: pid 1 was killed, pid 2 runs after 5901 ms"),
    ],
)
def test_what_may_differ(shown: str, really: str) -> None:
    assert page.match([shown], [page.plain(really)], {}) is not None
