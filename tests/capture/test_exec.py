# SPDX-License-Identifier: Apache-2.0
"""PROCESS_EXEC: what a process runs, and with what arguments."""

from __future__ import annotations

import pytest

from tests.lab import check
from tests.lab.workload import Stage


@pytest.mark.parametrize("scene", ["exec", "exec_chain", "exec_fd", "exec_script", "exec_fails"])
def test_execs_are_seen_as_they_were(stage: Stage, scene: str) -> None:
    check.exact(stage.play(scene), stage.node)


def test_an_exec_keeps_the_process_and_its_registration(stage: Stage) -> None:
    seen = stage.play("exec_root", code=14)
    check.exact(seen, stage.node)
    assert [line["type"] for line in seen.events] == ["PROCESS_EXEC", "PROCESS_EXIT"]


@pytest.mark.knows("arguments")
def test_what_is_too_long_says_so(stage: Stage) -> None:
    seen = stage.play("exec_long")
    check.exact(seen, stage.node)
    one, many, name = check.of_type(seen.events, "PROCESS_EXEC")
    assert one["args_truncated"]
    assert one["args"][:3] == ["truth", "end", "0"]
    assert set(one["args"][3]) == {"x"}
    assert many["args_truncated"]
    assert len(many["args"]) > 100
    assert name["args_truncated"]
    assert name["args"] == ["truth", "end", "0"]
    assert set(name["filename"]) == {"/"}


@pytest.mark.knows("arguments")
def test_short_arguments_are_whole(stage: Stage) -> None:
    assert not any(line.get("args_truncated") for line in stage.play("exec").events)


def test_exec_by_a_thread_that_is_not_the_first(stage: Stage) -> None:
    seen = stage.play("exec_thread")
    check.exact(seen, stage.node)
    # The first thread's end, and the end of the one that took its place, are nobody's business.
    assert len(check.of_type(seen.events, "THREAD_EXIT")) == 1
    assert len(check.of_type(seen.events, "PROCESS_EXIT")) == 2
