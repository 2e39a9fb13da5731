# SPDX-License-Identifier: Apache-2.0
"""What an agent shows to its broker, and how little it trusts it."""

from __future__ import annotations

import itertools
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from kmonitor.agent.errors import BrokerMessageError
from kmonitor.agent.orders import Orders, decode
from kmonitor.v1 import agent_pb2, monitor_pb2
from kmonitor.wire.parts import PART_BYTES, parts_of
from kmonitor.wire.record import SLOT_SIZE
from tests.agent.fake_broker import LEASE_MS, FakeBroker, Stream
from tests.lab import bpffs
from tests.lab.connector import connector_lack
from tests.lab.requires import capture_lack, need
from tests.lab.services import Agent, Lab

FORK, EXIT = 0x08, 0x40
WENT_BACK = grpc.StatusCode.DATA_LOSS, "its ring is not the one that this broker knows"
SECRET_PIN = "map_secret"


@pytest.fixture
def broker() -> Iterator[FakeBroker]:
    made = FakeBroker()
    made.interest = agent_pb2.Interest(version=1, reset=True, node_mask=FORK | EXIT)
    made.ack = never
    yield made
    made.close()


@pytest.fixture
def root(lab: Lab) -> Iterator[Path]:
    folder = lab.pins / "trust"
    folder.mkdir()
    yield folder
    lab.stop(*lab.running)
    bpffs.remove_pins(folder)


def never(stream: Stream) -> None:
    """No acknowledgement."""
    del stream


def always(stream: Stream) -> agent_pb2.Ack:
    return agent_pb2.Ack(position=stream.end, received=stream.end)


class Node:
    """One that is watched as a whole, and does something when it is told to."""

    def __init__(self, lab: Lab, broker: FakeBroker, root: Path, source: str = "core") -> None:
        self.lab, self.broker, self.root, self.source = lab, broker, root, source

    def start(self) -> Agent:
        """An agent, once it captures."""
        need(capture_lack if self.source != "netlink" else connector_lack)
        number = len(self.broker.streams)
        words = self.lab.agent_command("trust", self.broker.address, source=self.source, pin=True)
        agent = self.lab.keep(Agent("trust", [*words, "--pin-root", self.root]))
        agent.wait_connected()
        stream = self.broker.stream(number)
        self.broker.applied(stream)
        return agent

    def acts(self, stream: Stream) -> None:
        """A process comes and goes, and the broker is told of it."""
        subprocess.run(["/bin/true"], check=True)
        self.broker.wait(lambda: stream.end > stream.hello.position)

    @property
    def secret(self) -> Path:
        return next(self.root.iterdir()) / SECRET_PIN


@pytest.fixture(params=["core", "netlink"])
def node(request: pytest.FixtureRequest, lab: Lab, broker: FakeBroker, root: Path) -> Node:
    return Node(lab, broker, root, request.param)


@pytest.fixture
def pinned(lab: Lab, broker: FakeBroker, root: Path) -> Node:
    return Node(lab, broker, root)


# -- the secret


@pytest.mark.capture
def test_the_secret_lies_with_the_pins(pinned: Node) -> None:
    """The next agent shows the same; nobody else can read it; it goes with the pins."""
    agent = pinned.start()
    first = pinned.broker.stream(0).hello
    assert len(first.secret) == 32
    assert pinned.secret.stat().st_mode & 0o777 == 0o600
    assert pinned.secret.parent.stat().st_mode & 0o022 == 0
    pinned.lab.kill(agent)
    agent = pinned.start()
    again = pinned.broker.stream(1).hello
    assert (again.epoch, again.secret) == (first.epoch, first.secret)
    agent.send(signal.SIGINT)
    assert agent.wait() == 0
    agent = pinned.start()
    anew = pinned.broker.stream(2).hello
    assert anew.epoch != first.epoch
    assert anew.secret not in {first.secret, b""}


@pytest.mark.capture
def test_pins_of_a_version_without_a_secret(pinned: Node) -> None:
    """The agent makes one, and the next shows it too."""
    pinned.lab.kill(pinned.start())
    pinned.secret.unlink()
    pinned.lab.kill(pinned.start())
    pinned.start()
    first, second, third = (pinned.broker.stream(number).hello for number in range(3))
    assert first.epoch == second.epoch == third.epoch
    assert len({first.secret, second.secret}) == 2
    assert (len(second.secret), second.secret) == (32, third.secret)


@pytest.mark.capture
def test_the_secret_of_a_ring_that_is_not_pinned(lab: Lab, broker: FakeBroker) -> None:
    """It is the process's."""
    need(connector_lack)
    agent = lab.agent("trust", broker.address, source="netlink")
    broker.stream(0).close((grpc.StatusCode.UNAVAILABLE, "later"))
    first, again = broker.stream(0).hello, broker.stream(1).hello
    assert (len(first.secret), first.secret, first.epoch) == (32, again.secret, again.epoch)
    lab.stop(agent)
    lab.agent("trust", broker.address, source="netlink")
    assert broker.stream(2).hello.secret != first.secret


# -- a ring that the broker knows otherwise


@pytest.mark.capture
@pytest.mark.parametrize("when", ["hello", "stream", "welcome"])
def test_a_ring_that_went_back_goes_on_in_a_new_epoch(node: Node, when: str) -> None:
    """With all in it that nobody has acknowledged. A broker of an older version does not refuse, but welcomes it further on than it is."""
    broker = node.broker
    agent = node.start()
    first = broker.stream(0)
    node.acts(first)
    old = first.hello.epoch
    if when != "welcome":
        broker.refuse = lambda hello: WENT_BACK if hello.epoch == old else None
    if when == "stream":
        first.close(WENT_BACK)  # gRPC does not hand it on if something is written in the same moment: then the next hello is refused
    elif when == "hello":
        first.close()
    else:
        broker.welcome = lambda hello: agent_pb2.Welcome(lease_ms=LEASE_MS, position=1 << 40 if hello.epoch == old else 0)
        first.close()
    second = broker.stream(2 if when == "welcome" else 1)
    assert second.hello.epoch > old
    assert second.hello.position == first.hello.position
    assert second.hello.secret == first.hello.secret
    broker.wait(lambda: second.end >= first.end)
    count = (first.end - first.hello.position) // SLOT_SIZE
    assert bool((broker.records(old)["tgid"][:count] == broker.records(second.hello.epoch)["tgid"][:count]).all())
    assert "going on in a new epoch; monitors are told of a gap" in agent.stderr_text()
    if node.source == "core":
        node.lab.kill(agent)
        number = len(broker.streams)
        node.start()
        assert broker.stream(number).hello.epoch == second.hello.epoch


@pytest.mark.capture
def test_nothing_is_released_for_a_welcome(pinned: Node) -> None:
    """The broker may mean another ring: only what it acknowledges is. What it says that it has is not sent again."""
    broker = pinned.broker
    pinned.start()
    first = broker.stream(0)
    pinned.acts(first)
    broker.welcome = lambda hello: agent_pb2.Welcome(lease_ms=LEASE_MS, position=hello.end_position)
    first.close()
    second = broker.stream(1)
    broker.applied(second)
    assert second.hello.position == first.hello.position
    broker.wrong.clear()
    subprocess.run(["/bin/true"], check=True)
    broker.wait(lambda: len(second.of("block")) > 0)
    assert second.of("block")[0].block.position >= second.hello.end_position > first.hello.position
    second.close()
    third = broker.stream(2)
    assert third.hello.position == first.hello.position


# -- a broker that says what cannot be


def ack(**fields: int) -> Callable[[Stream], None]:
    return lambda stream: stream.send(ack=agent_pb2.Ack(**fields))


def interest(**fields: Any) -> Callable[[Stream], None]:
    message = agent_pb2.Interest(version=2, reset=True)
    if "cgroup" in fields or "unit" in fields:
        message.groups.add(event_mask=EXIT, **fields)
    else:
        message.processes.add(event_mask=EXIT, look_up=True, **fields)
    return lambda stream: stream.send(interest=message)


def listing(**group: str) -> Callable[[Stream], None]:
    call = agent_pb2.ListProcessesCall(call_id=1, filter=monitor_pb2.ProcessFilter(**group))  # type: ignore[arg-type]
    return lambda stream: stream.send(list_processes=call)


def unfinished(stream: Stream) -> None:
    stream.send(interest=agent_pb2.Interest(version=2, reset=True, more=True))
    stream.send(interest=agent_pb2.Interest(version=3))


LIES = {
    "an acknowledgement of what was not sent": ack(position=1 << 40),
    "... at the end of numbers": ack(position=(1 << 64) - SLOT_SIZE),
    "... received": ack(received=1 << 40),
    "... within a record": ack(position=65),
    "NUL in a path": interest(cgroup="/a\0b"),
    "a path out of the hierarchy": interest(cgroup="/../../../.."),
    "a path that is none": interest(cgroup="a"),
    "a long path": interest(cgroup="/" + "x" * 5000),
    "a unit that is a path": interest(unit="../../etc.service"),
    "a pid that is none": interest(pid=0),
    "a pid above all": interest(pid=(1 << 32) - 1),
    "a listing out of the hierarchy": listing(cgroup="/../../../.."),
    "a part of another version": unfinished,
}


@pytest.mark.capture
def test_an_agent_outlives_all_that_a_broker_says(lab: Lab, broker: FakeBroker) -> None:
    """One line each, and another stream, on which it does what it is told."""
    need(connector_lack)
    agent = lab.agent("trust", broker.address, source="netlink")
    for number, (what, lie) in enumerate(LIES.items()):
        stream = broker.stream(number)
        broker.applied(stream)
        lie(stream)
        broker.stream(number + 1)
        assert len(stream.of("applied")) == 1, what
    said = [line for line in agent.stderr_text().splitlines() if "says what cannot be" in line]
    assert len(said) == len(LIES), said
    assert "Traceback" not in agent.stderr_text()
    last = broker.stream(len(LIES))
    broker.applied(last)
    subprocess.run(["/bin/true"], check=True)
    broker.wait(lambda: len(last.of("block")) > 0)


@pytest.mark.capture
@pytest.mark.parametrize(
    "wrong",
    [agent_pb2.Welcome(), agent_pb2.Welcome(lease_ms=(1 << 32) - 1), agent_pb2.Welcome(lease_ms=LEASE_MS, position=1)],
    ids=["no lease", "a lease of weeks", "a position within a record"],
)
def test_a_welcome_that_cannot_be(lab: Lab, broker: FakeBroker, wrong: agent_pb2.Welcome) -> None:
    """It is tried again, with a pause."""
    need(connector_lack)
    tries = itertools.count()
    broker.welcome = lambda hello: wrong if next(tries) < 3 else agent_pb2.Welcome(lease_ms=LEASE_MS)
    agent = lab.agent("trust", broker.address, source="netlink")
    stream = broker.stream(3)
    broker.applied(stream)
    assert agent.stderr_text().count("says what cannot be") + agent.stderr_text().count("in a new epoch") >= 1
    assert [each.messages for each in broker.streams[:3]] == [[], [], []]


def test_what_is_no_message() -> None:
    assert decode(b"\xff" * 20) is None
    with pytest.raises(BrokerMessageError):
        Orders().take(None)


def test_an_interest_in_parts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    part = agent_pb2.Interest(version=1, more=True)
    for pid in range(1, 1000):
        part.processes.add(pid=pid, event_mask=EXIT)
    orders = Orders()
    taken = [orders.take(agent_pb2.BrokerMessage(interest=part)) for _ in range(5)]
    assert taken == [None] * 5
    monkeypatch.setattr("kmonitor.agent.orders.INTEREST_MOST", 6 * part.ByteSize() - 1)
    with pytest.raises(BrokerMessageError, match="more than"):
        orders.take(agent_pb2.BrokerMessage(interest=part))


def test_the_parts_of_an_answer() -> None:
    """Together they are the answer; each is small."""
    answer = agent_pb2.InterestApplied(version=3, position=128, end_position=256, number=7, boottime_ns=9)
    for pid in range(1, 150_000):
        answer.processes.add(pid=pid, start_time=pid, state=1).process.comm = "work"
    for number in range(300):
        answer.groups.add(cgroup=f"/{number}" + "/x" * 2000, state=5, cgroup_ids=range(1, 2000))
    parts = list(parts_of(answer, "processes", "groups"))
    assert answer.ByteSize() > 8 << 20
    assert all(part.ByteSize() < PART_BYTES + (1 << 15) for part in parts)
    assert [part.more for part in parts] == [True] * (len(parts) - 1) + [False]
    merged = agent_pb2.InterestApplied()
    for part in parts:
        merged.MergeFrom(part)
    merged.more = False
    assert merged == answer


@pytest.mark.capture
def test_nothing_is_disarmed_between_the_parts_of_a_snapshot(lab: Lab, broker: FakeBroker) -> None:
    """The watched process ends between them, and its end is told. Then the answer comes, once, in parts too."""
    need(capture_lack)
    broker.ack = always
    broker.welcome = lambda hello: agent_pb2.Welcome(lease_ms=LEASE_MS, takes_parts=True)
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as watched, subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as other:
        first = agent_pb2.Interest(version=1, reset=True)
        for each in (watched, other):
            first.processes.add(pid=each.pid, event_mask=EXIT, look_up=True)
        broker.interest = first
        lab.agent("trust", broker.address)
        stream = broker.stream(0)
        broker.applied(stream)
        assert stream.hello.takes_parts
        part = agent_pb2.Interest(version=2, reset=True, more=True)
        part.processes.add(pid=other.pid, event_mask=EXIT, look_up=True)
        stream.send(interest=part)
        stream.send(list_processes=agent_pb2.ListProcessesCall(call_id=7))
        broker.wait(lambda: len(stream.of("processes")) > 0)  # so it has read what came before
        watched.communicate()
        broker.wait(lambda: watched.pid in broker.records(stream.hello.epoch)["tgid"].tolist())
        assert len(stream.of("applied")) == 1
        last = agent_pb2.Interest(version=2, reset=True)
        for pid in range(3_000_000, 3_090_000):
            last.processes.add(pid=pid, start_time=1, event_mask=EXIT, look_up=True)
        stream.send(interest=last)
        broker.wait(lambda: bool(stream.of("applied")[1:]) and not stream.of("applied")[-1].applied.more)
        answers = [message.applied for message in stream.of("applied")[1:]]
        assert len(answers) > 1
        assert all(answer.ByteSize() < PART_BYTES + 200 for answer in answers)
        results = [(result.pid, result.state) for answer in answers for result in answer.processes]
        assert len(results) == 90_001
        assert (other.pid, monitor_pb2.REGISTRATION_STATE_RUNNING) in results
        other.communicate()
        broker.wait(lambda: other.pid in broker.records(stream.hello.epoch)["tgid"].tolist())
