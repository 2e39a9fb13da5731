# SPDX-License-Identifier: Apache-2.0
"""AgentService.Connect with what no agent of this version sends; the test plays the agent."""

from __future__ import annotations

import grpc
import pytest

from kmonitor.v1 import agent_pb2, agent_pb2_grpc
from kmonitor.wire.record import RECORD_SIZE, RECORD_VERSION, SLOT_SIZE
from tests.bad_input.refusal import GRPC_LIMIT, status_of
from tests.broker.records import EXEC, EXIT, build, rec
from tests.lab.services import Lab

INVALID = grpc.StatusCode.INVALID_ARGUMENT
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
VERSION_AT = 8  # in a slot: bpf/kmonitor.h, behind the ring's own header

EXITS = build([rec(EXIT, 100), rec(EXIT, 101)])
LONG_EXEC = build([rec(EXEC, 102, filename=b"/bin/true", args=(b"true", b"x" * 200))])


def hello(node: str = "played", **fields: object) -> agent_pb2.AgentMessage:
    """One that the broker takes, but for `fields`."""
    good = agent_pb2.Hello(
        node=node, boot_id="boot-1", epoch=7, record_version=RECORD_VERSION, record_size=RECORD_SIZE, slot_size=SLOT_SIZE
    )
    for name, value in fields.items():
        setattr(good, name, value)
    return agent_pb2.AgentMessage(hello=good)


def block(data: bytes) -> agent_pb2.AgentMessage:
    return agent_pb2.AgentMessage(block=agent_pb2.Block(data=data))


def changed(data: bytes, at: int, byte: int) -> bytes:
    return data[:at] + bytes([byte]) + data[at + 1 :]


REFUSED = {
    "block before hello": ([block(EXITS)], INVALID, "no hello"),
    "heartbeat before hello": ([agent_pb2.AgentMessage(heartbeat=agent_pb2.Heartbeat())], INVALID, "no hello"),
    "empty message": ([agent_pb2.AgentMessage()], INVALID, "no hello"),
    "nothing": ([], INVALID, "no hello"),
    "second hello": ([hello(), hello()], INVALID, "second hello"),
    "no name": ([hello("")], INVALID, "cannot be a node's name"),
    "impossible name": ([hello("a b")], INVALID, "cannot be a node's name"),
    "no boot id": ([hello(boot_id="")], INVALID, "boot id"),
    "no epoch": ([hello(epoch=0)], INVALID, "epoch"),
    "record version": ([hello(record_version=2)], PRECONDITION, "records of version 2"),
    "record size": ([hello(record_size=128)], PRECONDITION, "128 bytes"),
    "slot size": ([hello(slot_size=256)], PRECONDITION, "slots of 256"),
    "version in a block": ([hello(), block(changed(EXITS, SLOT_SIZE + VERSION_AT, 2))], INVALID, "record version 2, expected 1"),
    "type in a block": ([hello(), block(changed(EXITS, VERSION_AT + 1, 0x60))], INVALID, "not one event bit"),
    "record size in a block": ([hello(), block(changed(EXITS, 0, RECORD_SIZE - 8))], INVALID, "does not fill its slots"),
    "record not committed": ([hello(), block(changed(EXITS, 3, 0x80))], INVALID, "not committed"),
    "block cut within a slot": ([hello(), block(EXITS[:-8])], INVALID, "no whole number of 128-byte slots"),
    "block cut within a record": ([hello(), block(LONG_EXEC[:SLOT_SIZE])], INVALID, "cut off"),
}


@pytest.mark.parametrize(("messages", "code", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(channel: grpc.Channel, messages: list[agent_pb2.AgentMessage], code: grpc.StatusCode, words: str) -> None:
    found, details = status_of(lambda: agent_pb2_grpc.AgentServiceStub(channel).Connect(iter(messages), timeout=GRPC_LIMIT))
    assert (found, words in details) == (code, True), details


def test_good_blocks_are_taken(channel: grpc.Channel) -> None:
    """What the blocks above are made from is good itself."""
    messages = [hello("played-well"), block(EXITS + LONG_EXEC)]
    answers = list(agent_pb2_grpc.AgentServiceStub(channel).Connect(iter(messages), timeout=GRPC_LIMIT))
    assert answers[0].WhichOneof("kind") == "welcome"


@pytest.mark.parametrize("fields", [{"boot_id": "another"}, {"epoch": 1}], ids=["another boot", "another ring"])
def test_name_in_use(lab: Lab, channel: grpc.Channel, settled: tuple[str, str], fields: dict[str, object]) -> None:
    address, node = settled
    [before] = lab.json_lines("nodes", "--json", node, "--broker", address)
    assert before["state"] == "UP"
    taker = hello(node, **{"boot_id": before["boot_id"], "epoch": before["epoch"], **fields})
    code, details = status_of(lambda: agent_pb2_grpc.AgentServiceStub(channel).Connect(iter([taker]), timeout=GRPC_LIMIT))
    assert code is grpc.StatusCode.ALREADY_EXISTS
    assert f"node {node} is connected already" in details
    assert "--node" in details
    [after] = lab.json_lines("nodes", "--json", node, "--broker", address)
    assert [after[key] for key in ("state", "since_unix_nano", "epoch")] == [before[key] for key in ("state", "since_unix_nano", "epoch")]
