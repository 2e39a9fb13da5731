# SPDX-License-Identifier: Apache-2.0
"""How deep a control group may be that is watched: what the probe would never match is refused, and not acknowledged."""

from __future__ import annotations

import pytest

from kmonitor.agent.groups import LEVELS_MOST
from tests.lab.control_groups import control_group, hierarchy_lack
from tests.lab.requires import capture_lack, need
from tests.lab.services import Lab

pytestmark = pytest.mark.capture


@pytest.mark.parametrize("source", ["core", "bcc"])
def test_the_deepest_group_and_one_below(lab: Lab, source: str) -> None:
    need(capture_lack)
    need(hierarchy_lack)
    broker = lab.broker()
    lab.agent("deep", broker.address, source=source)
    with control_group() as top:
        deepest = top.group("/".join(["d"] * (LEVELS_MOST - 2)))  # the root is one level, and `top` the next
        deeper = deepest.group("d")
        process = lab.command("cat")
        deepest.take(process.pid)
        watch = lab.watch(broker.address, "--cgroup", deepest.path, "--events", "exit")
        watch.wait_registered(1, "ARMED")
        done = lab.run("kmon", "watch", "--broker", broker.address, "--node", "deep", "--cgroup", deeper.path, "--for", "20s")
        assert done.code == 2, done
        assert f"the control group is {LEVELS_MOST} levels below the root, and at most {LEVELS_MOST - 1} can be watched" in done.stderr
        process.close_input()
        watch.wait_end_of(process.pid)
        lab.stop(watch)
