# SPDX-License-Identifier: Apache-2.0
"""What comes of a process, or of a control group, after its end was heard: it is told all the same, however long that takes by the
broker's clock. Only the node's own progress says that nothing more can come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kmonitor.broker.broker import Broker
from kmonitor.broker.log.memory import MemoryLog
from kmonitor.broker.router import LATE_NS
from kmonitor.v1 import monitor_pb2
from kmonitor.wire.record import F_MATCH_CGROUP, F_MATCH_PROCESS, SLOT_SIZE
from tests.broker.direct import ARMED, EXITED, RUNNING, DirectAgent, DirectMonitor, of_group, of_process, turn
from tests.broker.records import EXEC, EXIT, FORK, THREAD_EXIT, Rec, rec

TICK_S = 0.01


@pytest.fixture
async def broker() -> AsyncIterator[Broker]:
    """With a clock that ticks fast."""
    made = Broker(MemoryLog(1 << 20), lease=1000, progress_interval=TICK_S)
    yield made
    made.stop()


async def several_ticks() -> None:
    """Of the broker's clock."""
    await asyncio.sleep(5 * TICK_S)


def own(kind: int, pid: int, at: int, **more: Any) -> Rec:
    """A record that a process's own entry asked for, made at a time of the node's boot-time clock."""
    return rec(kind, pid, flags=F_MATCH_PROCESS, boottime_ns=at, **more)


async def watched(broker: Broker, *wanted: monitor_pb2.Registration, **cgroups: list[int]) -> tuple[DirectAgent, DirectMonitor]:
    """An agent, and a monitor that is armed."""
    agent = DirectAgent(broker, {f"/{name}": ids for name, ids in cgroups.items()})
    agent.connect()
    monitor = DirectMonitor(broker, wanted)
    await agent.serve()
    return agent, monitor


async def test_a_thread_that_ends_after_its_process(broker: Broker) -> None:
    agent, monitor = await watched(broker, of_process(EXIT | THREAD_EXIT, 100))
    agent.record(own(EXIT, 100, 1_000))
    agent.send()
    await several_ticks()  # in which the agent is cut off
    agent.record(own(THREAD_EXIT, 100, 1_001, tid=101))
    agent.send()
    assert monitor.events == [(EXIT, 100), (THREAD_EXIT, 100)]


async def test_nothing_is_kept_for_ever(broker: Broker) -> None:
    """From a while later on, by the node's clock, no thread's end comes: by records whose process has the same pid and start time by
    fault, one could tell."""
    agent, monitor = await watched(broker, of_process(EXIT | THREAD_EXIT, 100))
    agent.record(own(EXIT, 100, 1_000))
    agent.send()
    agent.beat(1_000 + LATE_NS - 1)
    agent.record(own(THREAD_EXIT, 100, 1_001, tid=101))
    agent.send()
    agent.beat(1_000 + LATE_NS)
    agent.record(own(THREAD_EXIT, 100, 1_002, tid=102))
    agent.send()
    assert monitor.events == [(EXIT, 100), (THREAD_EXIT, 100)]


async def test_an_agent_that_says_no_boot_time(broker: Broker) -> None:
    """It is of an earlier version: the wall clock stands for it."""
    agent, monitor = await watched(broker, of_process(EXIT | THREAD_EXIT, 100))
    agent.record(own(EXIT, 100, 1_000))
    agent.send()
    for time_ns, count in ((1_001_000 + LATE_NS - 1, 1), (1_001_000 + LATE_NS, 1)):
        agent.say(heartbeat={"position": agent.position, "time_unix_nano": time_ns})
        agent.record(own(THREAD_EXIT, 100, 1_001, tid=101))
        agent.send()
        assert len(monitor.events) == 1 + count


async def test_a_loss_from_before_the_end_that_a_hello_tells(broker: Broker) -> None:
    """The agent was away: what was lost meanwhile is told behind all that is in its ring, and the process has ended in between."""
    agent, monitor = await watched(broker, of_process(EXEC | EXIT, 100))
    agent.disconnect()
    agent.record(own(EXIT, 100, 1_000))
    agent.record(own(EXEC, 7, 2_000))
    agent.connect(lost=agent.lost(EXEC, 3))
    agent.answer()  # the next one's stream is slow: it has sent the first record, and not all
    block = agent.position - SLOT_SIZE
    agent.say(block={"position": 0, "data": _first(agent), "boottime_to_unix_ns": 1})
    agent.beat(0, position=block)
    await several_ticks()
    progress = [item.progress for item in monitor.take() if item.WhichOneof("kind") == "progress"]
    assert progress
    assert all(node.position == 0 for item in progress for node in item.nodes), "it is complete up to the loss, and no further"
    agent.send()
    assert monitor.events == [(EXIT, 100)]
    assert [{each.type: each.count for each in gap.lost} for gap in monitor.gaps] == [{EXEC: 3}]


def _first(agent: DirectAgent) -> bytes:
    position, data = agent.ring[0]
    assert position == 0
    return data


async def test_a_loss_from_before_an_end_without_a_record(broker: Broker) -> None:
    """Its monitor wants no ends, so none is inferred: the registration is over by the agent's answer, and the loss is told later."""
    agent, monitor = await watched(broker, of_process(FORK, 100))
    agent.disconnect()
    agent.gone.add(100)
    agent.connect()
    await agent.serve()
    await several_ticks()
    agent.lose(FORK, 2)
    assert monitor.states == [RUNNING, EXITED]
    assert [{each.type: each.count for each in gap.lost} for gap in monitor.gaps] == [{FORK: 2}]
    agent.beat(1 + LATE_NS)
    agent.lose(FORK, 3)
    assert len(monitor.gaps) == 1, "that one was lost after the end, and is somebody else's"


@pytest.mark.parametrize("anew", [False, True])
async def test_a_group_that_is_gone_before_its_records_have_come(broker: Broker, *, anew: bool) -> None:
    """The agent notices at once; what was recorded of the group waits in the ring, for a broker that does not keep up."""
    agent, monitor = await watched(broker, of_group(EXIT, "/a"), a=[50])
    agent.record(rec(EXIT, 100, flags=F_MATCH_CGROUP, match_cgroup_id=50, boottime_ns=1))
    agent.cgroups = {"/a": [60]} if anew else {}
    agent.say(groups_changed={"groups": [{"cgroup": "/a"}]})
    await turn()
    agent.answer()
    await several_ticks()
    agent.send()
    assert monitor.events == [(EXIT, 100)]
    assert monitor.states == [ARMED, ARMED if anew else EXITED]
    agent.beat(1 + LATE_NS)
    agent.record(rec(EXIT, 101, flags=F_MATCH_CGROUP, match_cgroup_id=60, boottime_ns=1))
    agent.send()
    assert monitor.events == [(EXIT, 100), (EXIT, 101)][: 1 + anew]
