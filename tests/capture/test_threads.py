# SPDX-License-Identifier: Apache-2.0
"""THREAD_CREATE, THREAD_ABORT, THREAD_EXIT; and processes that are more than their first thread."""

from __future__ import annotations

import time

import pytest

from tests.lab import check
from tests.lab.watch import Watch
from tests.lab.workload import Root, Stage


def test_threads_are_seen_as_they_were(stage: Stage) -> None:
    check.exact(stage.play("threads"), stage.node)


@pytest.mark.parametrize("way", ["9", "15", "exit_group", "fault"])
def test_a_process_that_is_ended_while_it_has_threads(stage: Stage, way: str) -> None:
    seen = stage.play("thread_abort", way)
    check.exact(seen, stage.node)
    assert len(check.of_type(seen.events, "PROCESS_EXIT")) == 2


@pytest.mark.parametrize(
    ("ending", "code"),
    [("0", 3), ("1", 7), ("2", 0)],
    ids=["the last thread ends", "a thread calls exit", "the last thread returns"],
)
def test_the_end_of_the_first_thread_is_not_the_end(stage: Stage, ending: str, code: int) -> None:
    ended_ns: list[int] = []

    def dialogue(root: Root, _: Watch) -> None:
        root.wait_said("outlived")
        ended_ns.append(time.time_ns())
        root.say("on")

    seen = stage.play("leader_first", ending, dialogue=dialogue)
    check.exact(seen, stage.node)
    child = check.of_type(seen.truth, "PROCESS_FORK")[0]["child_pid"]
    (end,) = [line for line in check.of_type(seen.events, "PROCESS_EXIT") if line["pid"] == child]
    # The kernel's own word, which differs from version to version, is in the truth; on this side of 5.17 the last one's counts.
    assert end["exit_code"] in {code, 5}
    assert end["time"] > ended_ns[0] - 10_000_000


def test_a_signal_after_the_end_of_the_first_thread(stage: Stage) -> None:
    def dialogue(root: Root, _: Watch) -> None:
        root.wait_said("outlived")
        root.say("on")
        root.wait_said("lives")
        root.say("kill")

    check.exact(stage.play("leader_first", "3", dialogue=dialogue), stage.node)


@pytest.mark.parametrize("by_group", ["0", "1"], ids=["each ends itself", "each ends all"])
def test_threads_that_end_in_the_same_moment_end_the_process_once(stage: Stage, by_group: str) -> None:
    check.exact(stage.play("together", "300", by_group), stage.node)
