# SPDX-License-Identifier: Apache-2.0
"""Is a death to be told to the cluster? A decision without side effects: from what the cluster has, whether it is at work, and what
the resource's present process is.

Two mistakes are possible. To fail a resource that the cluster itself, or somebody who may, has just stopped: it would be started
again, or a failure counted, for nothing. And to say nothing where nothing else will for as long as a monitor's interval. The order of
the questions follows how Pacemaker works: its DC is idle only when each operation that it asked for was answered, and the answer is in
the CIB. So a CIB that was read after the DC was found idle has the result of every stop that had begun before: what is active there was
not ended by the cluster.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kmonitor.clients.ha.cluster_state import ClusterState, Resource
from kmonitor.clients.identity import Identity
from kmonitor.clients.verdict import Blindness, Life


class Act(enum.Enum):
    """What to do."""

    FAIL = "fail"
    LEAVE = "leave"
    """Not ours, for good."""
    WAIT = "wait"
    """Not to be known yet: ask again."""


class Present(enum.Enum):
    """What is found where the resource's process is looked up now: in its pidfile, or among the processes of its unit."""

    GONE = "gone"
    """It names a process that has ended, or there is none left."""
    NOTHING = "nothing"
    """There is no pidfile, or no such unit."""
    ALIVE = "alive"
    UNKNOWN = "unknown"
    """Nobody answers for the node, or the file cannot be read: one that is just being written, for example."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, and why: one line."""

    act: Act
    reason: str


@dataclass(frozen=True, slots=True)
class Case:
    """A process of a resource that is not there any more."""

    resource: str
    node: str
    inferred: bool
    """Nobody saw its end: it was found gone."""
    died: Identity | None
    """None: the process was never seen alive, and the pidfile names one that has ended."""


@dataclass(frozen=True, slots=True)
class Sight:
    """Of a process on a node, what is known of it now."""

    life: Life
    blind: Blindness | None
    unheard: float
    """Seconds for which `blind` has been UNREACHABLE; 0 if it is not."""
    process: Identity | None
    """The one that was seen alive last."""
    started_anew: bool
    """The cluster has started the resource there since: what was seen is not what runs."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user chose."""

    act_on_inferred: bool = False
    act_on_unreachable: float | None = None
    """Seconds; None: never."""


def before_asking(case: Case, settings: Settings) -> Decision | None:
    """What is clear without the cluster."""
    if case.inferred and not settings.act_on_inferred:
        return Decision(Act.LEAVE, "nobody saw its end (--act-on-inferred would act): left to Pacemaker's monitor")
    return None


def unheard(sight: Sight, settings: Settings) -> Decision:
    """Is a process whose node the broker does not hear to be taken for dead? Before the cluster is asked, and again after: FAIL is what
    `judge` may still turn down. WAIT: not for long enough yet. LEAVE: nothing of the kind, or no more."""
    limit = settings.act_on_unreachable
    if limit is None or sight.blind is not Blindness.UNREACHABLE:
        return Decision(Act.LEAVE, "its node is heard, or it is not known whether it is")
    if sight.life is not Life.ALIVE or sight.process is None:
        return Decision(Act.LEAVE, "its process was not seen alive before its node was heard no more")
    if sight.started_anew:
        return Decision(Act.LEAVE, "the cluster has started it anew since its node was heard")
    reason = f"its node has not been heard for {limit:g} s (--act-on-unreachable)"
    return Decision(Act.FAIL if sight.unheard >= limit else Act.WAIT, reason)


def judge(case: Case, state: ClusterState, *, idle: bool, planned: bool | None = None) -> Decision:
    """From a `state` that was read after the DC was asked, and was `idle` or not. `planned`: the scheduler would not leave this resource
    as it is; None if it was not asked, which is needed only where the cluster is at work for long."""
    node = state.nodes.get(case.node)
    if node is None or not node.online or node.unclean:
        return Decision(Act.LEAVE, "the cluster does not have the node online: what is on it is Corosync's to say")
    resource = state.on(case.resource, case.node)
    if resource is None:
        if idle or planned is not None:
            return Decision(Act.LEAVE, "the cluster has stopped it there")
        return Decision(Act.WAIT, "the cluster has it not there, and is at work: it may be starting it")
    hands_off = _hands_off(resource, state)
    if hands_off:
        return Decision(Act.LEAVE, hands_off)
    if resource.failed:
        return Decision(Act.LEAVE, "the cluster knows already that it has failed")
    if resource.role == "Stopping":
        return Decision(Act.LEAVE, "the cluster is stopping it")
    if resource.target_role == "Stopped":
        return Decision(Act.LEAVE, "it is to be stopped (target-role)")
    if node.standby or node.shutdown:
        return Decision(Act.LEAVE, "the node is in standby" if node.standby else "the node leaves the cluster")
    if resource.role == "Starting" or not resource.active:
        return Decision(Act.WAIT, f"the cluster is at work on it ({resource.role})")
    if resource.pending and resource.pending != "Monitoring":
        return Decision(Act.WAIT, f"the cluster is at work on it ({resource.pending})")
    if node.pending:
        return Decision(Act.WAIT, "the node is joining the cluster")
    if idle:
        return Decision(Act.FAIL, "the cluster has it active, and has nothing to do")
    if planned is None:
        return Decision(Act.WAIT, "the cluster is at work")
    if planned:
        return Decision(Act.WAIT, "the cluster is at work, and about to stop it or to move it")
    return Decision(Act.FAIL, "the cluster has it active; it is at work, but not on this")


def present(decision: Decision, case: Case, found: Present, process: Identity | None = None) -> Decision:
    """A decision to fail, in the light of what is there now: `process`, if it is ALIVE."""
    if decision.act is not Act.FAIL:
        return decision
    if found is Present.ALIVE and process is not None and case.died is not None and process.pid == case.died.pid:
        if process.start_time == case.died.start_time:
            return Decision(Act.WAIT, "it is said to have ended, and to be alive")
        return Decision(Act.FAIL, "its pid is a stranger's by now")  # a new daemon would hardly have got the same one
    if found is Present.ALIVE:
        return Decision(Act.LEAVE, f"another process is there already (pid {process.pid if process else 0})")
    if found is Present.UNKNOWN:
        return Decision(Act.WAIT, "its present process cannot be looked up")
    return decision


def _hands_off(resource: Resource, state: ClusterState) -> str:
    """Why the cluster does nothing with it now; empty if it does."""
    if state.maintenance:
        return "the cluster is in maintenance mode"
    if state.nodes[resource.node].maintenance:
        return "the node is in maintenance"
    if resource.maintenance:
        return "it is in maintenance"
    if resource.blocked:
        return "the cluster has given it up (blocked)"
    if not resource.managed:
        return "it is not managed"
    if resource.orphaned:
        return "it is no longer configured"
    if state.stopping_all:
        return "all resources are being stopped (stop-all-resources)"
    return ""
