# SPDX-License-Identifier: Apache-2.0
"""Processes in a child pid namespace, by the pids of the agent's."""

from __future__ import annotations

import pytest

from tests.lab import check
from tests.lab.workload import Stage


@pytest.mark.parametrize("kill_init", ["0", "1"], ids=["it ends by itself", "its init is killed"])
def test_processes_of_a_child_namespace(stage: Stage, kill_init: str) -> None:
    check.exact(stage.play("namespace", kill_init), stage.node)
