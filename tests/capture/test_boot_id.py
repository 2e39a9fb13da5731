# SPDX-License-Identifier: Apache-2.0
"""The same pid with the same start time, in another boot: another process.

A reboot that a test can have: real processes go on on the same kernel, and the next agent of the node is shown another boot id, by
a file that is bound over the kernel's in a mount namespace of its own.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest

from kmonitor.clients import (
    Event,
    Monitor,
    NodeChange,
    NodeState,
    Notification,
    Process,
    Reconnected,
    Registered,
    RegistrationState,
    connect,
)
from kmonitor.wire import clocks
from tests.bad_input.refusal import refused
from tests.capture.test_pidfile import LIMIT, end, idler, next_exit
from tests.lab.namespaces import namespaces_lack
from tests.lab.process import Running
from tests.lab.requires import need
from tests.lab.services import Lab

RUNNING, EXITED = RegistrationState.RUNNING, RegistrationState.EXITED
OTHER = str(uuid.UUID(int=0x5EC0_4D00_7 << 64, version=4))
BIND = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'


@pytest.fixture
def another_boot(tmp_path: Path) -> list[str]:
    """What to run a command with, so that it sees another boot id. Its pid stays its own."""
    need(namespaces_lack)
    file = tmp_path / "boot_id"
    file.write_text(f"{OTHER}\n")
    return ["unshare", "--mount", "--", "sh", "-c", BIND, str(file)]


async def watched(monitor: Monitor, node: str, process: Running) -> Process:
    """Registered for its end; as it was found."""
    found = (await monitor.register(node=node, pid=process.pid, events="exit")).process()
    assert found is not None
    return found


async def test_events_and_answers_name_the_boot(lab: Lab, another_boot: Sequence[str]) -> None:
    broker = lab.broker()
    lab.agent("here", broker.address)
    lab.agent("there", broker.address, prefix=another_boot)
    process = idler(lab)
    async with connect(broker.address) as monitor:
        answer = await monitor.register(pid=process.pid, events="exit")
        boots = {"here": clocks.boot_id(), "there": OTHER}
        assert {item.node: item.boot_id for item in answer.answers} == boots
        for node, boot_id in boots.items():
            [found] = await monitor.list_processes(node, pids=[process.pid])
            assert (found, found.boot_id) == (answer.process(node), boot_id)
        end(process, 3)
        ended = [await next_exit(monitor) for _ in boots]
        assert {event.node: event.boot_id for event in ended} == boots
        assert {(event.pid, event.start_time) for event in ended} == {(process.pid, found.start_time)}


async def test_pinned_to_a_boot(lab: Lab, another_boot: Sequence[str]) -> None:
    """Of two nodes with the same process one is in its boot: there alone it is armed."""
    broker = lab.broker()
    lab.agent("here", broker.address)
    lab.agent("there", broker.address, prefix=another_boot)
    process, fence = idler(lab), idler(lab)
    async with connect(broker.address) as monitor:
        [found] = await monitor.list_processes("there", pids=[process.pid])
        answer = await monitor.register(pid=process.pid, start_time=found.start_time, boot_id=OTHER, events="exit")
        assert answer.states == {"here": EXITED, "there": RUNNING}
        assert {node.name: node.watched_processes for node in await monitor.list_nodes()} == {"here": 0, "there": 1}
        await monitor.register(pid=fence.pid, events="exit")
        end(process, 3)
        end(fence, 4)
        ended = [await next_exit(monitor) for _ in range(3)]
        assert sorted((event.node, event.pid) for event in ended) == sorted(
            [("there", process.pid), ("here", fence.pid), ("there", fence.pid)]
        )


async def until_gone(monitor: Monitor, node: str, *, limit: float) -> list[Notification]:
    """What comes up to the word that the process is gone: an event, or the answer of a broker that never knew it."""
    seen: list[Notification] = []
    async with asyncio.timeout(limit):
        async for item in monitor:
            seen.append(item)
            if isinstance(item, Registered) and (item.node, item.state) == (node, EXITED):
                return seen
            if isinstance(item, Event) and item.inferred:
                return seen
    raise AssertionError("the stream has ended")


@pytest.mark.parametrize("names", [["beta"], ["*"]], ids=["named", "every node"])
@pytest.mark.parametrize("broker_too", [False, True], ids=["the node alone", "the broker too"])
async def test_a_node_that_is_rebooted(lab: Lab, another_boot: Sequence[str], names: list[str], broker_too: bool) -> None:
    """The same pid and start time are there behind it. A monitor that reconnects meanwhile takes no event of that one."""
    broker = lab.broker()
    agent = lab.agent("beta", broker.address)
    process, fence = idler(lab), idler(lab)
    async with connect(broker.address) as monitor:
        first = await monitor.register(nodes=names, pid=process.pid, events="exit")
        assert first.states == {"beta": RUNNING}
        lab.stop(agent)
        if broker_too:
            lab.stop(broker)
            broker = lab.broker(listen=broker.address)
        lab.agent("beta", broker.address, prefix=another_boot)
        seen = await until_gone(monitor, "beta", limit=30)
        answers = [item for item in seen if isinstance(item, Registered)]
        assert [item.state for item in answers if item.state is RUNNING] == [RUNNING]  # the first
        if broker_too:
            assert (answers[-1].boot_id, answers[-1].process) == (OTHER, None)
        else:
            ended = seen[-1]
            assert isinstance(ended, Event)
            assert (ended.pid, ended.boot_id, ended.raw.HasField("exit_code")) == (process.pid, clocks.boot_id(), False)
            assert [item.state for item in seen if isinstance(item, NodeChange)] == [NodeState.UNREACHABLE, NodeState.REBOOTED]
        assert any(isinstance(item, Reconnected) for item in seen) == broker_too
        assert (await monitor.list_nodes("beta"))[0].watched_processes == 0
        found = await watched(monitor, "beta", fence)
        end(process, 3)
        end(fence, 4)
        event = await next_exit(monitor)
        assert (event.pid, event.start_time, event.boot_id) == (fence.pid, found.start_time, OTHER)


def test_commands(lab: Lab, another_boot: Sequence[str]) -> None:
    broker = lab.broker()
    lab.agent("beta", broker.address, prefix=another_boot)
    process = idler(lab)
    where = ["--node", "beta", "--broker", broker.address]
    [line] = [line for line in lab.json_lines("ps", "--json", *where) if line["pid"] == process.pid]
    assert line["boot_id"] == OTHER
    which = [*where, "--pid", str(process.pid), "--start-time", str(line["start_time"]), "--boot-id"]
    refused(lab.run("kmon", "wait", *which, clocks.boot_id()), 2, f"process {process.pid} on beta has already ended")
    waiting = lab.command("kmon", "wait", *which, OTHER)
    until = time.monotonic() + LIMIT
    while lab.json_lines("nodes", "--json", "--broker", broker.address)[0]["watched_processes"] == 0:
        assert time.monotonic() < until  # `kmon wait` does not say when it is armed
    watch = lab.watch(broker.address, "--pid", str(process.pid), "--events", "exit")
    [answer] = watch.wait_registered(1, "RUNNING")
    end(process, 5)
    watch.wait_end_of(process.pid)
    assert (waiting.wait(), watch.wait()) == (5, 0)
    [event] = watch.events()
    assert (answer["boot_id"], answer["process"]["boot_id"], event["boot_id"]) == (OTHER, OTHER, OTHER)
