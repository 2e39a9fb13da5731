# SPDX-License-Identifier: Apache-2.0
"""A followed tree through its agent's kill and a ring that runs over: all of it is told, or counted, exactly."""

from __future__ import annotations

from dataclasses import dataclass

from tests.lab.process import LabError
from tests.lab.services import Lab
from tests.robustness.account import PROCESS
from tests.robustness.listener import Listener
from tests.robustness.rig import Rig

MIDST = 300
"""So many events told: the workload is well under way."""


@dataclass(frozen=True)
class Overrun:
    """How it went."""

    wrong: list[str]
    """What does not add up, one line each."""
    reasons: set[str]
    """Of the gaps."""
    summary: str
    in_gaps: int


def overrun(rig: Rig, lab: Lab, node: str) -> Overrun:
    """Kill the agent of a node with a small ring while a tree is followed there, fill the ring, start the next agent, do the books."""
    pace = rig.pace(lab, node, rate=400)
    other = rig.pace(lab, node, count=1500)
    follow = rig.listener(lab, pace.tree, other.tree)
    wide = rig.listener(lab, {"node": node, "events": "process"})
    rig.agents_did(node)
    pace.go()
    follow.wait_more(MIDST)
    rig.kill_agent(node)
    other.go()
    truth = other.done()
    rig.restart_agent(node)
    follow.wait_more(MIDST)
    truth += pace.stop()
    wrong = _counted(follow, truth.total)
    all_there_was = (truth + rig.agents_did(node)).of_types(PROCESS)
    wrong += _counted(wide, all_there_was.total)
    account = follow.account.read()
    wrong += account.differences({node: truth}, whole=False)
    wrong += wide.account.read().differences({node: all_there_was}, whole=False)
    return Overrun(wrong, {gap["reason"] for gap in account.gaps}, account.summary(truth.total), account.in_gaps)


def _counted(listener: Listener, total: int) -> list[str]:
    try:
        listener.wait_counted(total)
    except LabError as error:
        return [str(error)]
    return []
