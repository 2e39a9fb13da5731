# SPDX-License-Identifier: Apache-2.0
"""Which death is told to the cluster, and which is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kmonitor.clients.ha import judge
from kmonitor.clients.ha.cluster_state import ClusterNode, ClusterState, Resource
from kmonitor.clients.ha.judge import Act, Case, Present, Settings, Sight
from kmonitor.clients.identity import Identity
from kmonitor.clients.verdict import Blindness, Life

DIED = Identity("boot", 4711, 1000)
CASE = Case("web", "alpha", inferred=False, died=DIED)
NODE = ClusterNode("alpha", online=True)
WEB = Resource("web", "ocf:heartbeat:anything", "alpha", "Started")


def state(resource: Resource | None = WEB, node: ClusterNode = NODE, **what: Any) -> ClusterState:
    """A cluster of a node and a resource."""
    usual = ClusterState((0, 1, 1), "alpha", False, False, {node.name: node}, () if resource is None else (resource,))
    return replace(usual, **what)


def test_an_ordinary_death() -> None:
    assert judge.judge(CASE, state(), idle=True).act is Act.FAIL


@pytest.mark.parametrize(
    "seen",
    [
        state(replace(WEB, role="Stopping")),
        state(replace(WEB, target_role="Stopped")),
        state(replace(WEB, failed=True)),
        state(replace(WEB, managed=False)),
        state(replace(WEB, maintenance=True)),
        state(replace(WEB, blocked=True)),
        state(replace(WEB, orphaned=True)),
        state(maintenance=True),
        state(stopping_all=True),
        state(node=replace(NODE, maintenance=True)),
        state(node=replace(NODE, standby=True)),
        state(node=replace(NODE, shutdown=True)),
        state(node=replace(NODE, online=False)),
        state(node=replace(NODE, unclean=True)),
        state(nodes={}),
    ],
)
@pytest.mark.parametrize("idle", [True, False])
def test_left_alone(seen: ClusterState, idle: bool) -> None:
    assert judge.judge(CASE, seen, idle=idle).act is Act.LEAVE


@pytest.mark.parametrize(
    ("seen", "idle"),
    [
        (state(), False),
        (state(None), False),
        (state(replace(WEB, role="Starting")), True),
        (state(replace(WEB, pending="Migrating")), True),
        (state(node=replace(NODE, pending=True)), True),
    ],
)
def test_not_to_be_known_yet(seen: ClusterState, idle: bool) -> None:
    assert judge.judge(CASE, seen, idle=idle).act is Act.WAIT


def test_a_pending_monitor_is_no_work() -> None:
    assert judge.judge(CASE, state(replace(WEB, pending="Monitoring")), idle=True).act is Act.FAIL


def test_it_was_stopped_between_the_death_and_the_question() -> None:
    assert judge.judge(CASE, state(None), idle=True).act is Act.LEAVE


@pytest.mark.parametrize(("planned", "act"), [(False, Act.FAIL), (True, Act.WAIT)])
def test_a_cluster_that_is_at_work_for_long(planned: bool, act: Act) -> None:
    assert judge.judge(CASE, state(), idle=False, planned=planned).act is act


@pytest.mark.parametrize(
    ("found", "process", "act"),
    [
        (Present.GONE, None, Act.FAIL),
        (Present.NOTHING, None, Act.FAIL),
        (Present.UNKNOWN, None, Act.WAIT),
        (Present.ALIVE, Identity("boot", 4712, 2000), Act.LEAVE),
        (Present.ALIVE, Identity("boot", 4711, 2000), Act.FAIL),
        (Present.ALIVE, DIED, Act.WAIT),
    ],
)
def test_in_the_light_of_what_is_there_now(found: Present, process: Identity | None, act: Act) -> None:
    decided = judge.judge(CASE, state(), idle=True)
    assert judge.present(decided, CASE, found, process).act is act


def test_nobody_saw_it() -> None:
    unseen = replace(CASE, inferred=True)
    left = judge.before_asking(unseen, Settings())
    assert left is not None
    assert left.act is Act.LEAVE
    assert judge.before_asking(unseen, Settings(act_on_inferred=True)) is None
    assert judge.before_asking(CASE, Settings()) is None


UNHEARD = Sight(Life.ALIVE, Blindness.UNREACHABLE, 30.0, DIED, started_anew=False)


@pytest.mark.parametrize(
    ("sight", "act"),
    [
        (UNHEARD, Act.FAIL),
        (replace(UNHEARD, unheard=29.9), Act.WAIT),
        (replace(UNHEARD, life=Life.DEAD), Act.LEAVE),
        (replace(UNHEARD, life=Life.UNKNOWN, process=None), Act.LEAVE),
        (replace(UNHEARD, started_anew=True), Act.LEAVE),
        (replace(UNHEARD, blind=None), Act.LEAVE),
        *((replace(UNHEARD, blind=blind), Act.LEAVE) for blind in Blindness if blind is not Blindness.UNREACHABLE),
    ],
)
def test_its_node_is_not_heard(sight: Sight, act: Act) -> None:
    assert judge.unheard(sight, Settings(act_on_unreachable=30.0)).act is act
    assert judge.unheard(sight, Settings()).act is Act.LEAVE


def test_for_how_long_it_was_not_heard_is_said() -> None:
    said = judge.unheard(UNHEARD, Settings(act_on_unreachable=30.0)).reason
    assert said == "its node has not been heard for 30 s (--act-on-unreachable)"
