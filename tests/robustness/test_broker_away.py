# SPDX-License-Identifier: Apache-2.0
"""A broker that does not run for a while: events wait in the kernel's rings."""

from __future__ import annotations

import pytest

from tests.lab.services import Lab
from tests.robustness.account import PROCESS
from tests.robustness.rig import Rig

pytestmark = pytest.mark.timeout(150)
"""Each wait has a limit of its own, and says what did not come; the one for a broker that starts was cut off by the usual 60 s where 20
processes and more wanted the two cores (30 to 48 s with 13 to 17 of them)."""

MIDST = 300


def test_stopped(in_memory: Rig, lab: Lab) -> None:
    """Longer than the agents' patience with a silent connection would be: nothing is missing."""
    pace = in_memory.pace(lab, "a", rate=300)
    span = in_memory.pace(lab, "a", rate=200, count=1800)
    follow = in_memory.listener(lab, pace.tree, span.tree)
    pace.go()
    follow.wait_more(MIDST)
    with in_memory.broker_stopped():
        span.go()
        truth = span.done()
    follow.wait_more(MIDST)
    truth += pace.stop()
    follow.wait_counted(truth.total)
    print(f"\nstopped for {span.seconds:.1f} s: {follow.account.read().summary(truth.total)}")
    assert follow.account.differences({"a": truth}, whole=True) == []


def test_stopped_for_longer_than_the_ring_holds(in_memory: Rig, lab: Lab) -> None:
    """What found no room is counted, by type."""
    pace = in_memory.pace(lab, "s", rate=300)
    span = in_memory.pace(lab, "s", count=1500)
    follow = in_memory.listener(lab, pace.tree, span.tree)
    pace.go()
    follow.wait_more(MIDST)
    with in_memory.broker_stopped():
        span.go()
        truth = span.done()
    follow.wait_more(MIDST)
    truth += pace.stop()
    follow.wait_counted(truth.total)
    print(f"\n{follow.account.read().summary(truth.total)}")
    assert {gap["reason"] for gap in follow.account.gaps} == {"RING"}
    assert follow.account.differences({"s": truth}, whole=False) == []


def test_killed_for_ten_seconds_under_load(on_disk: Rig, lab: Lab) -> None:
    """Another one on the same log: nothing is missing, nothing comes twice."""
    pace = on_disk.pace(lab, "a", rate=300)
    span = on_disk.pace(lab, "a", rate=200, count=2000)
    follow = on_disk.listener(lab, pace.tree, span.tree)
    wide = on_disk.listener(lab, {"node": "a", "events": "process"})
    on_disk.agents_did("a")
    pace.go()
    follow.wait_more(MIDST)
    on_disk.kill_broker()
    span.go()
    truth = span.done()
    on_disk.start_broker()
    follow.wait_more(MIDST)
    truth += pace.stop()
    follow.wait_counted(truth.total)
    all_there_was = (truth + on_disk.agents_did("a")).of_types(PROCESS)
    wide.wait_counted(all_there_was.total)
    print(f"\naway for {span.seconds:.1f} s: {follow.account.read().summary(truth.total)}")
    assert follow.account.differences({"a": truth}, whole=True) == []
    assert wide.account.read().differences({"a": all_there_was}, whole=True) == []


def test_killed_for_longer_than_the_ring_holds(on_disk: Rig, lab: Lab) -> None:
    """What found no room is counted, by type, though the broker that has to tell it is another one."""
    pace = on_disk.pace(lab, "s", rate=300)
    span = on_disk.pace(lab, "s", count=1500)
    follow = on_disk.listener(lab, pace.tree, span.tree)
    pace.go()
    follow.wait_more(MIDST)
    on_disk.kill_broker()
    span.go()
    truth = span.done()
    on_disk.start_broker()
    follow.wait_more(MIDST)
    truth += pace.stop()
    follow.wait_counted(truth.total)
    print(f"\n{follow.account.read().summary(truth.total)}")
    assert {gap["reason"] for gap in follow.account.gaps} == {"RING"}
    assert follow.account.differences({"s": truth}, whole=False) == []
