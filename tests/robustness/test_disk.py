# SPDX-License-Identifier: Apache-2.0
"""A disk that is full under the broker's log: nothing is acknowledged that is not written, and who watches hears on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.services import Lab
from tests.robustness.conftest import SMALL_RING, Maker
from tests.robustness.rig import PATIENT, SQLITE, Rig

MIDST = 300
RATE = 200
SIZE = "12M"


@pytest.fixture
def small_disk(make_rig: Maker) -> Iterator[Rig]:
    """Nodes a and s, as `on_disk`; the log is on a disk of its own."""
    with make_rig(*PATIENT, nodes={"a": (), "s": SMALL_RING}, log=SQLITE, disk=SIZE) as made:
        yield made


def test_full_and_freed(small_disk: Rig, lab: Lab) -> None:
    """A monitor that is there is told all the while; what was not written meanwhile is written then, and told to one that comes back."""
    rig = small_disk
    pace, span = rig.pace(lab, "a", rate=RATE), rig.pace(lab, "a", rate=RATE, count=2 * RATE)
    there, back = rig.listener(lab, pace.tree), rig.listener(lab, pace.tree)
    pace.go()
    there.wait_more(MIDST)
    with rig.disk_full():
        back.kill()
        span.go()
        span.done()
        there.wait_more(MIDST)
        rig.broker.wait_stderr(r"(?i)no space|disk|full")
    back.again()
    there.wait_more(MIDST)
    truth = pace.stop()
    for listener in (there, back):
        listener.wait_counted(truth.total)
        assert listener.account.read().differences({"a": truth}, whole=True) == []
    assert "Traceback" not in rig.broker.stderr_text()


def test_full_for_longer_than_the_ring_holds(small_disk: Rig, lab: Lab) -> None:
    """What found no room in the ring is counted, by type."""
    rig = small_disk
    pace, span = rig.pace(lab, "s", rate=RATE), rig.pace(lab, "s", count=1_500)
    there = rig.listener(lab, pace.tree, span.tree)
    pace.go()
    there.wait_more(MIDST)
    with rig.disk_full():
        span.go()
        truth = span.done()
    there.wait_more(MIDST)
    truth += pace.stop()
    there.wait_counted(truth.total)
    print(f"\n{there.account.read().summary(truth.total)}")
    assert {gap["reason"] for gap in there.account.gaps} <= {"RING"}
    assert there.account.differences({"s": truth}, whole=False) == []


def test_full_and_the_broker_is_killed(small_disk: Rig, lab: Lab) -> None:
    """What it had not written was not acknowledged: it comes once more from the agents, and no monitor is told of it twice."""
    rig = small_disk
    pace = rig.pace(lab, "a", rate=RATE)
    there = rig.listener(lab, pace.tree)
    pace.go()
    there.wait_more(MIDST)
    with rig.disk_full():
        there.wait_more(MIDST)
        rig.kill_broker()
    rig.start_broker()
    there.wait_more(MIDST)
    truth = pace.stop()
    there.wait_counted(truth.total)
    assert there.account.read().differences({"a": truth}, whole=True) == []
