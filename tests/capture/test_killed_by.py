# SPDX-License-Identifier: Apache-2.0
"""killed_by: who sent the signal that ended a process, and nobody else who had sent it one."""

from __future__ import annotations

import pytest

from tests.lab import check
from tests.lab.compare import differences
from tests.lab.control_groups import control_group
from tests.lab.workload import Performance, Stage

pytestmark = pytest.mark.knows("killers")


def play(stage: Stage, case: str, *arguments: str) -> Performance:
    """A case of tests/workload/truth_killers.c, seen as it was."""
    seen = stage.play("killed", case, *arguments)
    check.exact(seen, stage.node)
    assert not any(line.get("killed_by") for line in seen.events if line.get("exit_signal") is None)
    return seen


def signals(seen: Performance) -> list[int]:
    """What ended the processes of a case, in order."""
    return [line["exit_signal"] for line in check.of_type(seen.events, "PROCESS_ABORT")]


@pytest.mark.parametrize(
    "case",
    [
        "handled_then_killed",
        "handled_then_raised",
        "handled_then_sent_again",
        "handled_then_fault",
        "blocked_then_killed",
        "ignored_then_sent_again",
    ],
)
def test_a_signal_that_was_survived_leaves_no_trace(stage: Stage, case: str) -> None:
    assert signals(play(stage, case))


@pytest.mark.parametrize("case", ["handled_then_exit", "ignored_then_exit"])
def test_who_ends_by_itself_was_not_killed(stage: Stage, case: str) -> None:
    seen = play(stage, case)
    assert signals(seen) == []
    assert not any(line.get("killed_by") for line in seen.events)


@pytest.mark.parametrize("case", ["two_blocked", "blocked_twice"])
def test_of_signals_that_wait_the_one_that_killed_counts(stage: Stage, case: str) -> None:
    play(stage, case)


@pytest.mark.parametrize(
    ("case", "winner"),
    [("kill_then_term", 9), ("term_then_kill", 15), ("quit_then_kill", 9), ("kill_twice", 9)],
)
def test_two_at_once(stage: Stage, case: str, winner: int) -> None:
    """The victim does not run between the first and the second: which one it dies of is what waitpid says."""
    assert set(signals(play(stage, case))) == {winner}


@pytest.mark.parametrize("case", ["group", "own_thread", "by_thread"])
def test_ways_to_send(stage: Stage, case: str) -> None:
    play(stage, case)


def test_by_another_user(stage: Stage) -> None:
    seen = stage.play("killed", "other_user")
    # Not `exact`, which takes all for root's.
    assert differences(seen.truth, seen.events) == []
    (abort,) = check.of_type(seen.events, "PROCESS_ABORT")
    assert abort["killed_by"]["uid"] == abort["uid"] == 65534


def test_faults_are_the_kernels(stage: Stage) -> None:
    assert signals(play(stage, "faults")) == [11, 7, 8, 4, 5, 31]


def test_a_fault_that_was_sent_is_the_senders(stage: Stage) -> None:
    assert signals(play(stage, "faults_that_were_sent")) == [11, 7, 8, 4, 5, 31]


@pytest.mark.parametrize(("case", "number"), [("alarm", 14), ("timer", 10)])
def test_a_timer_is_the_kernels(stage: Stage, case: str, number: int) -> None:
    """And not that of whoever ran when it went off."""
    assert set(signals(play(stage, case))) == {number}


def test_the_limit_of_processor_time(stage: Stage) -> None:
    assert signals(play(stage, "cpu_limit")) == [24]


def test_a_terminal(stage: Stage) -> None:
    assert signals(play(stage, "terminal")) == [1, 2]


def test_what_the_kernel_sends_in_a_process_s_name(stage: Stage) -> None:
    """SIGPIPE and SIGXFSZ are its own doing; a parent-death signal comes from the parent."""
    assert signals(play(stage, "own_writes")) == [13, 25]
    assert set(signals(play(stage, "parent_death"))) == {12, 15}


def test_cgroup_kill_is_whoever_wrote_there(stage: Stage) -> None:
    with control_group() as group:
        assert signals(play(stage, "group_kill", str(group.folder))) == [9]


def test_the_end_of_a_pid_namespace(stage: Stage) -> None:
    """Its init is killed by somebody; the others by the kernel."""
    seen = stage.play("namespace", "1")
    check.exact(seen, stage.node)
    killers = [line["killed_by"] for line in check.of_type(seen.events, "PROCESS_ABORT")]
    assert sorted(killer["pid"] for killer in killers) == [0, seen.root]
