# SPDX-License-Identifier: Apache-2.0
"""PROCESS_FORK: who has whom as a child."""

from __future__ import annotations

import pytest

from tests.lab import check
from tests.lab.compare import differences
from tests.lab.workload import Stage


@pytest.mark.parametrize(
    "scene",
    ["vfork", "generations", "many", "thread_forks", "clone_parent", "daemon", "subreaper"],
)
def test_forks_are_seen_as_they_were(stage: Stage, scene: str) -> None:
    check.exact(stage.play(scene), stage.node)


def test_a_fork_says_who_the_child_is_for_good(stage: Stage) -> None:
    seen = stage.play("generations", "4")
    forks = check.of_type(seen.events, "PROCESS_FORK")
    exits = {line["pid"]: line for line in check.of_type(seen.events, "PROCESS_EXIT")}
    assert len(forks) == 4
    for fork in forks:
        end = exits[fork["child_pid"]]
        # The pid may be given out again: with the start time it is the same process.
        assert fork["child_start_time"] == end["start_time"]
        assert fork["start_time"] < end["start_time"] + stage.knowledge.start_step_ns
        assert end["start_time"] <= fork["time"]
        assert end["ppid"] == fork["pid"]
        if "control groups" in stage.knowledge.knows:
            assert end["cgroup_id"] == fork["cgroup_id"] > 0
        else:
            assert end["cgroup_id"] == fork["cgroup_id"] == 0


def test_a_fork_comes_before_all_that_the_child_does(stage: Stage) -> None:
    seen = stage.play("many", "300")
    born = {seen.root}
    for line in seen.events:
        assert line["pid"] in born, line
        if line["type"] == "PROCESS_FORK":
            born.add(line["child_pid"])
    assert len(born) == 301


def test_without_follow_a_child_is_not_the_parents(stage: Stage) -> None:
    root = stage.start("codes", "3", "4")
    fence = stage.fence()
    watch = stage.watch(root.root_pid, fence.pid)
    root.say("go")
    root.truth()
    stage.end_fence(fence, watch)
    assert [line["type"] for line in watch.events() if line["pid"] == root.root_pid] == ["PROCESS_FORK", "PROCESS_FORK", "PROCESS_EXIT"]
    assert {line["pid"] for line in watch.events()} == {root.root_pid, fence.pid}


@pytest.mark.parametrize(
    ("events", "types"),
    [
        ("fork", {"PROCESS_FORK"}),
        ("exit", {"PROCESS_EXIT"}),
        ("0x48", {"PROCESS_FORK", "PROCESS_EXIT"}),
        ("exec,abort", {"PROCESS_EXEC", "PROCESS_ABORT"}),
        ("thread-create,abort", {"THREAD_CREATE", "PROCESS_ABORT"}),
    ],
)
def test_only_the_types_asked_for(stage: Stage, events: str, types: set[str]) -> None:
    root, behind = stage.start("mixed"), stage.start("mixed")
    watch = stage.watch(root.root_pid, behind.root_pid, options=["--follow", "--events", events])
    root.say("go")
    truth = stage.knowledge.sees(root.truth(), "mixed", root.root_pid)
    # The same again is what says that all of the first was seen: a fence of any type.
    behind.say("go")
    last = check.of_type(stage.knowledge.sees(behind.truth(), "mixed", behind.root_pid), *types)[-1]
    watch.wait_for(lambda line: line["kind"] == "event" and differences([last], [line]) == [], f"{last}")
    stage.lab.stop(watch)
    expected = check.of_type(truth, *types)
    assert differences(expected, watch.events()[: len(expected)]) == []
    assert {line["type"] for line in watch.events()} == types
    assert len(watch.events()) == 2 * len(expected)
