# SPDX-License-Identifier: Apache-2.0
"""PROCESS_EXIT and PROCESS_ABORT: what waitpid reports, for every way to end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab import check
from tests.lab.memory_cgroup import memory_cgroup
from tests.lab.watch import Watch
from tests.lab.workload import Root, Stage


def test_codes(stage: Stage) -> None:
    check.exact(stage.play("codes", "0", "1", "2", "127", "128", "254", "255", "256", "-1"), stage.node)


def test_a_signal_that_is_caught_is_no_abort(stage: Stage) -> None:
    check.exact(stage.play("caught"), stage.node)


def test_a_zombie_has_ended(stage: Stage) -> None:
    def dialogue(root: Root, watch: Watch) -> None:
        zombie = root.wait_said("zombie")
        watch.wait_end_of(zombie)  # and nobody has waited for it yet
        assert Path(f"/proc/{zombie}/stat").exists()
        root.say("reap")

    check.exact(stage.play("zombie", dialogue=dialogue), stage.node)


@pytest.mark.parametrize("core_limit", [0, 1 << 30], ids=["without core", "with core"])
def test_every_signal(stage: Stage, core_limit: int) -> None:
    seen = stage.play("signals", str(core_limit))
    check.exact(seen, stage.node)
    aborts = check.of_type(seen.events, "PROCESS_ABORT")
    assert len(aborts) >= 50
    pattern = Path("/proc/sys/kernel/core_pattern").read_text(encoding="utf-8").strip()
    if core_limit == 0 and not pattern.startswith("|"):
        assert not any(line.get("core_dumped") for line in aborts)
    if core_limit and pattern and not pattern.startswith(("|", "@", "/")):
        # Into the working directory, which is ours: those whose default action is a core, by signal(7).
        assert {line["exit_signal"] for line in aborts if line.get("core_dumped")} == {3, 4, 5, 6, 7, 8, 11, 24, 25, 31}


@pytest.mark.knows("killers")
def test_who_sent_the_signal(stage: Stage) -> None:
    seen = stage.play("killers")
    check.exact(seen, stage.node)
    assert [line["exit_signal"] for line in check.of_type(seen.events, "PROCESS_ABORT")] == [15, 10, 37, 9, 64, 9]


@pytest.mark.knows("killers")
def test_a_fault_is_the_kernels(stage: Stage) -> None:
    seen = stage.play("signals", "0")
    faults = [line for line in check.of_type(seen.events, "PROCESS_EXIT") if line.get("exit_signal") in {4, 7, 8, 11}]
    assert [(line["exit_signal"], line["killed_by"]["pid"]) for line in faults] == [(4, 0), (7, 0), (8, 0), (11, 0)]


@pytest.mark.knows("out of memory")
def test_out_of_memory(stage: Stage) -> None:
    with memory_cgroup(32 << 20) as procs:
        check.exact(stage.play("oom", str(procs)), stage.node)


@pytest.mark.knows("out of memory")
def test_out_of_memory_with_threads(stage: Stage) -> None:
    with memory_cgroup(32 << 20) as procs:
        seen = stage.play("oom", str(procs), "3")
    check.exact(seen, stage.node)
    aborts = check.of_type(seen.events, "THREAD_ABORT", "PROCESS_ABORT")
    assert len(aborts) >= 3 + 1
    assert all(line["oom_killed"] for line in aborts)
    assert {line["killed_by"]["pid"] for line in aborts} == {0}


@pytest.mark.knows("out of memory")
def test_out_of_memory_by_another_process(stage: Stage) -> None:
    """The victim is not the one that asked for too much."""
    with memory_cgroup(32 << 20) as procs:
        for _ in range(5):
            check.exact(stage.play("oom_other", str(procs), "0"), stage.node)


@pytest.mark.knows("out of memory")
def test_killed_just_before_memory_ran_out(stage: Stage) -> None:
    """The kernel chooses who is dying already, and has not sent anything: it was killed by whoever did."""
    with memory_cgroup(32 << 20) as procs:
        check.exact(stage.play("oom_other", str(procs), "1"), stage.node)


def test_signals_of_every_way_to_send_one(stage: Stage) -> None:
    seen = stage.play("killers")
    check.exact(seen, stage.node)
    assert [line["exit_signal"] for line in check.of_type(seen.events, "PROCESS_ABORT")] == [15, 10, 37, 9, 64, 9]


def test_no_other_end_is_out_of_memory(stage: Stage) -> None:
    assert not any(line.get("oom_killed") for line in stage.play("killers").events)
