# SPDX-License-Identifier: Apache-2.0
"""Agents that are killed: the kernel's ring is the spool, and the next agent carries on there."""

from __future__ import annotations

from tests.lab.services import Lab
from tests.robustness.account import PROCESS
from tests.robustness.overrun import MIDST, overrun
from tests.robustness.rig import Rig


def test_three_times_under_load(in_memory: Rig, lab: Lab) -> None:
    """Each event once, without a gap, to one who follows a process and to one who watches the node."""
    pace = in_memory.pace(lab, "a", rate=400)
    follow = in_memory.listener(lab, pace.tree)
    wide = in_memory.listener(lab, {"node": "a", "events": "process"})
    in_memory.agents_did("a")
    pace.go()
    for _ in range(3):
        follow.wait_more(MIDST)
        start = follow.said
        in_memory.kill_agent("a")
        follow.wait_change("a", "UNREACHABLE", start=start)
        in_memory.restart_agent("a")
        follow.wait_change("a", "UP", start=start)
    truth = pace.stop()
    follow.wait_counted(truth.total)
    all_there_was = (truth + in_memory.agents_did("a")).of_types(PROCESS)
    wide.wait_counted(all_there_was.total)
    print(f"\n{follow.account.read().summary(truth.total)}")
    assert follow.account.differences({"a": truth}, whole=True) == []
    assert wide.account.read().differences({"a": all_there_was}, whole=True) == []


def test_for_longer_than_the_ring_holds(in_memory: Rig, lab: Lab) -> None:
    """What found no room is counted, by type, and nothing else is missing."""
    done = overrun(in_memory, lab, "s")
    print(f"\n{done.summary}")
    assert done.reasons == {"RING"}
    assert done.wrong == []


def test_without_pins(in_memory: Rig, lab: Lab) -> None:
    """What happened meanwhile is a gap whose size nobody knows; all else is told, once, and what still runs is watched again."""
    in_memory.node("unpinned", pin=False)
    pace = in_memory.pace(lab, "unpinned", rate=200)
    follow = in_memory.listener(lab, pace.tree)
    pace.go()
    follow.wait_more(MIDST)
    in_memory.kill_agent("unpinned")
    in_memory.restart_agent("unpinned")
    follow.wait_more(MIDST)
    truth = pace.stop()
    follow.wait_end_of(pace.pid)
    account = follow.account.read()
    assert [gap["reason"] for gap in account.gaps] == ["AGENT"]
    assert account.wrong == []
    told = account.told["unpinned"]
    assert told <= truth.counts
    known = {end for end in account.ends["unpinned"] if end[1] is not None}
    assert known <= set(truth.ends)
