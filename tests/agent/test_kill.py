# SPDX-License-Identifier: Apache-2.0
"""The agent killed under load and started again, on its pins, with a broker whose log is behind: all that happened comes, and once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from kmonitor.v1 import agent_pb2
from kmonitor.wire.record import SLOT_SIZE
from tests.agent.fake_broker import FakeBroker, Stream, check_storm
from tests.lab import bpffs, storm
from tests.lab.requires import capture_lack, need
from tests.lab.services import Agent, Lab
from tests.lab.workload import Programs

pytestmark = pytest.mark.capture

FORK, EXIT = 0x08, 0x40
KILLS = 3
BLOCKS_BEHIND = 6
EVERY = 4


@pytest.fixture
def broker() -> Iterator[FakeBroker]:
    made = FakeBroker()
    made.interest = agent_pb2.Interest(version=1, reset=True, node_mask=FORK | EXIT)
    yield made
    made.close()


@pytest.fixture
def root(pins: Path) -> Iterator[Path]:
    folder = pins / "killed"
    folder.mkdir()
    yield folder
    bpffs.remove_pins(folder)


def late_and_seldom(stream: Stream) -> agent_pb2.Ack | None:
    """All has come; in the log is what came some blocks ago, and that is said at every so-many-th block only."""
    blocks = stream.of("block")
    logged = blocks[-BLOCKS_BEHIND].block.position if len(blocks) >= BLOCKS_BEHIND else 0
    return agent_pb2.Ack(received=stream.end, position=logged if len(blocks) % EVERY == 0 else 0)


def has_come(stream: Stream, position: int) -> bool:
    """So much, in so many blocks that some of it was said to be logged."""
    return stream.end > position and len(stream.of("block")) >= BLOCKS_BEHIND + EVERY


@pytest.mark.parametrize("source", ["core", "bcc"])
def test_everything_once(lab: Lab, broker: FakeBroker, root: Path, programs: Programs, tmp_path: Path, source: str) -> None:
    need(capture_lack)
    broker.ack = late_and_seldom
    words = [*lab.agent_command("killed", broker.address, source=source, pin=True), "--pin-root", root]
    agent = lab.keep(Agent("killed", words))
    agent.wait_connected()
    broker.wait(lambda: len(broker.streams[0].of("applied")) > 0)
    work = storm.start_endless(lab, programs, tmp_path / "storm")
    for worker in work:
        worker.say("go")
    for number in range(KILLS):
        stream = broker.stream(number)
        enough = stream.hello.position + (number + 1) * 2000 * SLOT_SIZE
        broker.wait(partial(has_come, stream, enough))
        lab.kill(agent)
        agent = lab.keep(Agent("killed", words))
        agent.wait_connected()
    last = broker.stream(KILLS)
    told = storm.end(work, tmp_path / "storm")
    # A mark behind all that the storm did: the agent has sent everything that lies before it. In a storm pids come round, and one of its
    # processes may have had the mark's: it is the mark only if it ended when the storm was over.
    over_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    mark = lab.command("sh", "-c", "exit 77")
    mark.wait()
    [epoch] = broker.epochs

    def marked() -> bool:
        rows = broker.records(epoch)
        return bool(((rows["tgid"] == mark.pid) & (rows["type"] == EXIT) & (rows["boottime_ns"] >= over_ns)).any())

    broker.wait(marked)
    check_storm(told, broker.records(epoch))
    assert broker.wrong == [], "no hole, and what came twice was the same"
    assert broker.resent > 0
    assert [stream.hello.position for stream in broker.streams] == sorted(stream.hello.position for stream in broker.streams)
    assert not last.hello.draining
    assert all(stream.hello.lost.counts == [] and stream.of("lost") == [] for stream in broker.streams)
    broker.ack = lambda stream: agent_pb2.Ack(position=stream.end)
    last.send(ack=agent_pb2.Ack(position=last.end))
    lab.stop(agent)
    print(f"\n{told.count} processes at {told.rate:.0f}/s, {len(broker.records(epoch))} records, {broker.resent} bytes sent twice")
