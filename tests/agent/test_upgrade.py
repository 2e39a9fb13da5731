# SPDX-License-Identifier: Apache-2.0
"""What an agent of another version has left pinned is brought to the broker before this version's probe takes its place."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest

from kmonitor.agent.pins import PinFolder
from kmonitor.agent.probe import image as image_of_this
from kmonitor.agent.probe import open_control, open_ring
from kmonitor.v1 import agent_pb2
from kmonitor.wire.record import RECORD_VERSION
from tests.agent import old_agent
from tests.agent.fake_broker import FakeBroker, Stream, check_storm
from tests.bad_input.refusal import refused
from tests.lab import bpffs, storm
from tests.lab.requires import capture_lack, need
from tests.lab.services import Agent, Lab
from tests.lab.workload import Programs

pytestmark = pytest.mark.capture

FORK, EXIT = 0x08, 0x40
OTHER = RECORD_VERSION + 1
PADDING = 8
NODE = "old.node"


@pytest.fixture(autouse=True)
def _needs_capture() -> None:
    need(capture_lack)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A probe with another record version, and a table of another size."""
    return old_agent.build(tmp_path_factory.mktemp("other"), OTHER, padding=PADDING)


@pytest.fixture
def broker() -> Iterator[FakeBroker]:
    made = FakeBroker()
    made.interest = agent_pb2.Interest(version=1, reset=True, node_mask=FORK | EXIT)
    yield made
    made.close()
    assert made.wrong == []


@pytest.fixture
def root(pins: Path) -> Iterator[Path]:
    folder = pins / "upgrade"
    folder.mkdir()
    yield folder
    bpffs.remove_pins(folder)


@dataclass
class Held:
    """The old ring and its control, over the end of their pins."""

    consumer: Callable[[], int]
    producer: Callable[[], int]
    any_mask: Callable[[], int]


@dataclass
class Upgrade:
    """Of one node."""

    lab: Lab
    broker: FakeBroker
    root: Path
    other: Path

    def old(self, version: int = OTHER, padding: int = PADDING, image: Path | None = None) -> Agent:
        """Start the other version's agent, and wait until it captures."""
        words = self.options()
        agent = self.lab.keep(Agent(NODE, old_agent.command(image or self.other, version, *words, padding=padding)))
        number = len(self.broker.streams)
        agent.wait_connected()
        stream = self.broker.stream(number)
        self.broker.wait(lambda: len(stream.of("applied")) > 0)
        return agent

    def new(self) -> Agent:
        """Start this version's. Not waited for."""
        return self.lab.keep(Agent(NODE, [self.lab.agent_command(NODE, "")[0], *self.options()]))

    def options(self) -> list[str]:
        return ["--broker", self.broker.address, "--node", NODE, "--source", "core", "--pin-root", str(self.root), "--ring-size", "16M"]

    def names(self) -> set[str]:
        return {path.name for path in self.root.iterdir()}

    def folder(self, version: int = OTHER) -> PinFolder:
        return PinFolder(self.root, NODE, "host", version)

    @contextlib.contextmanager
    def hold(self, version: int = OTHER) -> Iterator[Held]:
        control = open_control(self.folder(version))
        ring = open_ring(self.folder(version), control)
        yield Held(lambda: ring.consumer, lambda: ring.producer, lambda: control["any_mask"])
        ring.wakeups.close()
        control.close()

    def is_replaced(self, streams: int, old_version: int = OTHER) -> None:
        """The next streams were those of an upgrade, and nothing of the old is left."""
        draining, own = self.broker.stream(streams), self.broker.stream(streams + 1)
        assert (draining.hello.draining, draining.hello.record_version) == (True, old_version)
        assert (draining.hello.infers_exits, draining.of("applied")) == (False, [])
        assert draining.half_closed
        assert (own.hello.draining, own.hello.record_version, own.hello.infers_exits) == (False, RECORD_VERSION, True)
        assert self.broker.epochs == [draining.hello.epoch, own.hello.epoch]
        assert self.names() == {self.folder(RECORD_VERSION).path.name}
        names = self.folder(RECORD_VERSION).names()
        assert len([name for name in names if name.startswith("link_")]) == 6


@pytest.fixture
def upgrade(lab: Lab, broker: FakeBroker, root: Path, other: Path) -> Upgrade:
    return Upgrade(lab, broker, root, other)


@contextlib.contextmanager
def load() -> Iterator[int]:
    """Short-lived processes all the time; the pid of their parent."""
    with subprocess.Popen(["/bin/sh", "-c", "while :; do /bin/true; done"]) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def never(stream: Stream) -> None:
    """No acknowledgement."""
    del stream


def always(stream: Stream) -> agent_pb2.Ack:
    return agent_pb2.Ack(position=stream.end)


def test_all_of_the_old_ring_comes_once_and_then_the_new_epoch(upgrade: Upgrade, programs: Programs, tmp_path: Path) -> None:
    """Killed under load; the old probe goes on, while no agent runs and while its ring is brought to the broker."""
    broker = upgrade.broker
    broker.ack = lambda stream: agent_pb2.Ack(received=stream.end)  # on its way to the log for ever
    old = upgrade.old()
    work = storm.start(upgrade.lab, programs, tmp_path / "storm", "fork", 8000)
    work.say("go")
    stream = broker.stream(0)
    broker.wait(lambda: stream.end > 200_000)
    upgrade.lab.kill(old)
    told = storm.read(work, tmp_path / "storm")
    with upgrade.hold() as ring, load() as parent:
        assert ring.consumer() == 0
        broker.ack = always
        new = upgrade.new()
        new.wait_connected()
        upgrade.is_replaced(1)
        broker.wait(lambda: len(broker.stream(2).of("block")) > 0)  # the load, seen by the new probe
        assert (ring.any_mask(), ring.consumer()) == (0, ring.producer())
        rows = broker.records(stream.hello.epoch)
        assert len(broker.logs[stream.hello.epoch]) == ring.producer(), "all that it ever held"
    assert set(rows["version"].tolist()) == {OTHER}
    check_storm(told, rows)
    forks = rows[rows["type"] == FORK]
    assert parent in forks["tgid"].tolist(), "the old probe went on until its ring was delivered"
    assert bool((np.diff(forks["boottime_ns"].astype(np.int64)) > -100_000_000).all()), "in order"
    assert broker.resent > 0
    again = broker.records(broker.epochs[1])
    assert set(again["version"].tolist()) == {RECORD_VERSION}
    assert int(again["boottime_ns"][0]) > int(rows["boottime_ns"][-1]) - 100_000_000
    blind_ms = (int(again["boottime_ns"].min()) - int(rows["boottime_ns"].max())) / 1e6
    print(f"\n{len(rows)} records of the old ring, {broker.resent} bytes sent twice; {blind_ms:.0f} ms to the first of the new one")


def test_another_object_of_the_same_version(upgrade: Upgrade, tmp_path: Path) -> None:
    """It has the folder that this one will use."""
    image = tmp_path / "same.bpf.o"
    image.write_bytes(image_of_this() + bytes(8))
    old = upgrade.old(RECORD_VERSION, 0, image)
    with load(), upgrade.hold(RECORD_VERSION) as ring:
        upgrade.lab.kill(old)
        upgrade.new().wait_connected()
        upgrade.is_replaced(1, RECORD_VERSION)
        assert (ring.any_mask(), ring.consumer()) == (0, ring.producer())


def test_a_probe_of_before_exits_were_inferred(upgrade: Upgrade) -> None:
    """All is there but the program for that."""
    agent = upgrade.new()
    agent.wait_connected()
    upgrade.lab.kill(agent)
    (upgrade.folder(RECORD_VERSION).path / "prog_kmonitor_infer").unlink()
    upgrade.new().wait_connected()
    upgrade.is_replaced(1, RECORD_VERSION)


def test_a_broker_that_is_away(upgrade: Upgrade) -> None:
    """Nothing is stopped or lost; SIGTERM leaves it so, and the next agent delivers it."""
    upgrade.lab.kill(upgrade.old())
    tried = threading.Event()

    def refuse(hello: agent_pb2.Hello) -> tuple[grpc.StatusCode, str]:
        assert hello.draining
        tried.set()
        return grpc.StatusCode.UNAVAILABLE, "later"

    upgrade.broker.refuse = refuse
    waiting = upgrade.new()
    assert tried.wait(20)
    with upgrade.hold() as ring, load():
        made = ring.producer()
        while ring.producer() == made:
            time.sleep(0.01)
        waiting.send(signal.SIGTERM)
        assert waiting.wait(5) == 0
        assert ring.any_mask() != 0
        upgrade.broker.refuse = lambda hello: None
        upgrade.new().wait_connected()
        upgrade.is_replaced(1)


def test_sigterm_while_the_broker_does_not_acknowledge(upgrade: Upgrade) -> None:
    upgrade.broker.ack = never
    old = upgrade.old()
    with load():
        upgrade.broker.wait(lambda: upgrade.broker.stream(0).end > 0)
        upgrade.lab.kill(old)
        waiting = upgrade.new()
        upgrade.broker.wait(lambda: len(upgrade.broker.stream(1).of("block")) > 0)
        waiting.send(signal.SIGTERM)
        assert waiting.wait(5) == 0
        upgrade.broker.ack = always
        upgrade.new().wait_connected()
        upgrade.is_replaced(2)


def test_sigint_removes_what_was_not_delivered(upgrade: Upgrade) -> None:
    upgrade.broker.ack = never
    old = upgrade.old()
    with load():
        upgrade.broker.wait(lambda: upgrade.broker.stream(0).end > 0)
        upgrade.lab.kill(old)
        waiting = upgrade.new()
        upgrade.broker.stream(1)
        waiting.send(signal.SIGINT)
        assert waiting.wait(5) == 0
    assert upgrade.names() == set()


def test_killed_when_the_old_probe_was_stopped(upgrade: Upgrade) -> None:
    """Its ring has still to be delivered."""
    upgrade.broker.ack = never
    old = upgrade.old()
    with load():
        upgrade.broker.wait(lambda: upgrade.broker.stream(0).end > 0)
        upgrade.lab.kill(old)
    with contextlib.closing(upgrade.folder()) as folder:
        folder.open()
        folder.detach()
    with upgrade.hold() as ring:
        assert ring.producer() > 0
        upgrade.broker.ack = always
        upgrade.new().wait_connected()
        upgrade.is_replaced(1)
        assert len(upgrade.broker.logs[upgrade.broker.epochs[0]]) == ring.producer() == ring.consumer()


def test_a_broker_that_does_not_take_the_old_records(upgrade: Upgrade) -> None:
    upgrade.lab.kill(upgrade.old())
    before = upgrade.folder().names()

    def refuse(hello: agent_pb2.Hello) -> tuple[grpc.StatusCode, str] | None:
        return (grpc.StatusCode.FAILED_PRECONDITION, "records of version 2") if hello.record_version == OTHER else None

    upgrade.broker.refuse = refuse
    command = [upgrade.lab.agent_command(NODE, "")[0], *upgrade.options()]
    refused(upgrade.lab.run(*command), 2, "records of version 2", "cannot be delivered", "--unpin")
    assert upgrade.folder().names() == before, "the old probe goes on"
    assert upgrade.lab.run(*command, "--unpin").code == 0
    assert upgrade.names() == set()
    upgrade.new().wait_connected()
    assert not upgrade.broker.stream(1).hello.draining


def test_a_version_that_cannot_capture_here_leaves_the_old_one_at_work(upgrade: Upgrade) -> None:
    upgrade.lab.kill(upgrade.old())
    before = upgrade.folder().names()
    command = [upgrade.lab.agent_command(NODE, "")[0], *upgrade.options()]
    hide = 'mount -t tmpfs none /sys/kernel/btf && exec "$0" "$@"'
    refused(upgrade.lab.run("unshare", "--mount", "sh", "-c", hide, *command), 2, "no BTF")
    assert upgrade.folder().names() == before
    assert len(upgrade.broker.streams) == 1


def test_an_agent_of_the_other_version_that_runs(upgrade: Upgrade) -> None:
    running = upgrade.old()
    command = [upgrade.lab.agent_command(NODE, "")[0], *upgrade.options()]
    refused(upgrade.lab.run(*command), 2, f"another agent runs as node {NODE}")
    upgrade.lab.stop(running)


def test_what_was_left_half_pinned(upgrade: Upgrade) -> None:
    """Nothing waits in it, and nothing fills it: it goes without a word."""
    upgrade.broker.interest = agent_pb2.Interest(version=1, reset=True)
    upgrade.lab.kill(upgrade.old())
    with contextlib.closing(upgrade.folder()) as folder:
        folder.open()
        folder.detach()
    upgrade.new().wait_connected()
    assert [stream.hello.draining for stream in upgrade.broker.streams] == [False, False]
    assert upgrade.names() == {upgrade.folder(RECORD_VERSION).path.name}
