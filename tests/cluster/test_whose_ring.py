# SPDX-License-Identifier: Apache-2.0
"""A node's agent against others who would be it, and against itself on a machine that was restored from a snapshot."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from kmonitor.agent.pins import PinFolder
from kmonitor.agent.secret import pinned_secret
from kmonitor.v1 import agent_pb2, agent_pb2_grpc, monitor_pb2, monitor_pb2_grpc
from kmonitor.wire.record import RECORD_SIZE, RECORD_VERSION, SLOT_SIZE
from tests.bad_input.refusal import refused, status_of
from tests.broker.records import EXIT, build, rec
from tests.lab import bpffs
from tests.lab.requires import capture_lack, need
from tests.lab.services import Agent, Broker, Lab

NODE = "held"
LIMIT_S = 20.0


class Held:
    """A node with pins, and its broker, with a log in a file."""

    def __init__(self, lab: Lab, folder: Path, pins: Path) -> None:
        self.lab, self.pins = lab, pins
        self.broker: Broker = lab.broker("--log", f"sqlite:{folder / 'log'}")
        self.channel = grpc.insecure_channel(self.broker.address)

    def agent(self) -> Agent:
        started = self.start()
        started.wait_connected()
        return started

    def start(self, *options: str) -> Agent:
        words = self.lab.agent_command(NODE, self.broker.address, *options, pin=True)
        return self.lab.keep(Agent(NODE, [*words, "--pin-root", self.pins, "--ring-size", "1M"]))

    def listed(self) -> monitor_pb2.Node:
        answer = monitor_pb2_grpc.MonitorServiceStub(self.channel).ListNodes(monitor_pb2.ListNodesRequest(), timeout=LIMIT_S)
        node: monitor_pb2.Node
        (node,) = answer.nodes
        return node

    def secret(self) -> bytes:
        return pinned_secret(PinFolder(self.pins, NODE, "host"))

    def hello(self, **fields: object) -> agent_pb2.AgentMessage:
        """What whoever has read the list of nodes can say."""
        seen = self.listed()
        made = agent_pb2.Hello(
            node=NODE, boot_id=seen.boot_id, epoch=seen.epoch, position=seen.position, record_version=RECORD_VERSION,
            record_size=RECORD_SIZE, slot_size=SLOT_SIZE,
        )  # fmt: skip
        for name, value in fields.items():
            setattr(made, name, value)
        return agent_pb2.AgentMessage(hello=made)

    def says(self, *messages: agent_pb2.AgentMessage) -> tuple[grpc.StatusCode, str]:
        """How a stream with these ends."""
        return status_of(lambda: agent_pb2_grpc.AgentServiceStub(self.channel).Connect(iter(messages), timeout=LIMIT_S))


@pytest.fixture
def held(lab: Lab, tmp_path: Path) -> Iterator[Held]:
    need(capture_lack)
    pins = lab.pins / "held"
    pins.mkdir()
    made = Held(lab, tmp_path, pins)
    yield made
    made.channel.close()
    lab.stop(*lab.running)
    bpffs.remove_pins(pins)


def test_nobody_silences_a_node_or_keeps_its_agent_away(held: Held) -> None:
    """With all that the list of nodes tells, at any position: while its agent is there, and while it is not."""
    agent = held.agent()
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as watched:
        waiting = held.lab.command("kmon", "wait", "--broker", held.broker.address, "--node", NODE, "--pid", str(watched.pid))
        everything = held.lab.watch(held.broker.address, "--node", NODE, "--events", "exit")
        everything.wait_registered(1, "ARMED")
        for away in (False, True):
            if away:
                held.lab.kill(agent)
            seen = held.listed()
            for secret in (b"", b"whatever somebody made up"):
                for at in (seen.position, seen.position + 65, seen.position + SLOT_SIZE, 1 << 62):
                    forged = build([rec(EXIT, watched.pid)])
                    block = agent_pb2.AgentMessage(block=agent_pb2.Block(position=at, data=forged))
                    code, _ = held.says(held.hello(position=at, secret=secret), block)
                    assert code in {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT}
            assert held.listed().epoch == seen.epoch
        agent = held.agent()
        assert "in a new epoch" not in agent.stderr_text()
        watched.communicate()
        assert waiting.wait() == 0
        everything.wait_end_of(watched.pid)
    assert [line["exit_code"] for line in everything.events() if line["pid"] == watched.pid] == [0]
    assert everything.of_kind("gap") == []


@pytest.mark.parametrize("lost", [40, 1], ids=["not so far again", "further than before"])
def test_a_machine_that_was_restored_from_a_snapshot(held: Held, lost: int) -> None:
    """The broker has `lost` records of a time of which the machine knows nothing. The ends of watched processes are told all the same, each
    once, behind a gap; and so is what happens from then on."""
    agent = held.agent()
    with contextlib.ExitStack() as stack:
        *gone, lives = (stack.enter_context(subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE)) for _ in range(4))
        pids = [word for each in (*gone, lives) for word in ("--pid", str(each.pid))]
        watch = held.lab.watch(held.broker.address, "--node", NODE, *pids, "--events", "exit")
        watch.wait_registered(4, "RUNNING")
        held.lab.stop(agent)
        before = held.listed()
        other_time = build([rec(EXIT, 3_000_000 + each, boottime_ns=each) for each in range(lost)])
        block = agent_pb2.AgentMessage(block=agent_pb2.Block(position=before.position, data=other_time))
        hello = held.hello(secret=held.secret(), ring_bytes=1 << 20)
        assert list(agent_pb2_grpc.AgentServiceStub(held.channel).Connect(iter([hello, block]), timeout=LIMIT_S))
        assert held.listed().position == before.position + len(other_time)
        for each in gone:
            each.communicate()
        agent = held.agent()
        for each in gone:
            watch.wait_end_of(each.pid)
        lives.communicate()
        watch.wait_end_of(lives.pid)
    assert held.listed().epoch > before.epoch
    assert sorted(line["pid"] for line in watch.events()) == sorted(each.pid for each in (*gone, lives))
    assert {line["epoch"] for line in watch.events()} == {held.listed().epoch}
    (last,) = (line for line in watch.events() if line["pid"] == lives.pid)
    assert (last["exit_code"], last["inferred"]) == (0, False)
    assert "AGENT" in [line["reason"] for line in watch.of_kind("gap")]
    assert agent.stderr_text().count("going on in a new epoch") == 1


def test_a_refused_agent_leaves_no_pin(held: Held) -> None:
    """And says who holds the name."""
    held.lab.agent(NODE, held.broker.address)
    second = held.start()
    second.wait(60)
    held.lab.expect(second, 2)
    said = second.stderr_text().splitlines()[-1]
    assert f"node {NODE} is connected to {held.broker.address} already: stop the other agent, at 127.0.0.1, or give" in said
    assert list(held.pins.iterdir()) == []


@pytest.mark.parametrize(
    ("node", "words"),
    [("", "cannot be a node's name"), ("n" * 250, "at most 240 characters"), ("a" + ".b" * 60, "each dot counting as three")],
    ids=["none", "too long", "many dots"],
)
def test_a_name_that_cannot_be_pinned(held: Held, node: str, words: str) -> None:
    refused(held.lab.run(*held.lab.agent_command(node, held.broker.address, pin=True)), 2, words)
