# SPDX-License-Identifier: Apache-2.0
"""The broker's API with what cannot be: gRPC statuses, and on a Watch stream answers that leave the stream alive."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import grpc
import pytest

from kmonitor.v1 import monitor_pb2, monitor_pb2_grpc
from tests.bad_input.refusal import GRPC_LIMIT, status_of
from tests.lab.services import Lab

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND


def registration(
    names: tuple[str, ...] = (), target: monitor_pb2.Target | None = None, mask: int = 0x40, comms: tuple[str, ...] = ()
) -> monitor_pb2.Registration:
    """One that is good where nothing is given."""
    nodes = monitor_pb2.NodeSelector(names=names)
    return monitor_pb2.Registration(nodes=nodes, target=target, event_mask=mask, filter=monitor_pb2.EventFilter(comms=comms))


def process(pid: int) -> monitor_pb2.Target:
    return monitor_pb2.Target(process=monitor_pb2.ProcessTarget(pid=pid))


BAD = {
    "unknown node": (registration(("nosuch",)), NOT_FOUND, "unknown node 'nosuch': known nodes are"),
    "no event": (registration(mask=0), INVALID, "the event mask is empty"),
    "unknown event": (registration(mask=0x80), INVALID, "unknown bits 0x80"),
    "known and unknown event": (registration(mask=0x1C0), INVALID, "unknown bits 0x180"),
    "pid 0": (registration(target=process(0)), INVALID, "pid 0 names no process"),
    "negative pid": (registration(target=process(-1)), INVALID, "pid -1 names no process"),
    "pid too large": (registration(target=process(4_194_305)), INVALID, "pid 4194305 is above"),
    "largest int64": (registration(target=process(2**63 - 1)), INVALID, "is above"),
    "node glob": (registration(("[a",)), INVALID, "malformed glob '[a' for node"),
    "node name": (registration(("a b",)), INVALID, "cannot be a node's name"),
    "empty node name": (registration(("",)), INVALID, "cannot be a node's name"),
    "long comm": (registration(comms=("elasticsearch-main",)), INVALID, "comm 'elasticsearch-main' matches nothing"),
    "comm glob": (registration(comms=("ok*", "[a")), INVALID, "malformed glob '[a' for comm"),
    "cgroup": (registration(target=monitor_pb2.Target(cgroup="/a/../b")), INVALID, "control group '/a/../b'"),
    "pidfile": (registration(target=monitor_pb2.Target(pidfile="run/x.pid")), INVALID, "pidfile 'run/x.pid': give an absolute path"),
    "no pidfile": (registration(target=monitor_pb2.Target(pidfile="")), INVALID, "pidfile '': give an absolute path"),
    "unit": (registration(target=monitor_pb2.Target(unit="a b")), INVALID, "systemd unit"),
}
CASES = pytest.mark.parametrize(("wanted", "code", "words"), BAD.values(), ids=BAD)


@CASES
def test_subscribe(channel: grpc.Channel, wanted: monitor_pb2.Registration, code: grpc.StatusCode, words: str) -> None:
    request = monitor_pb2.SubscribeRequest(registrations=[wanted])
    found, details = status_of(lambda: monitor_pb2_grpc.MonitorServiceStub(channel).Subscribe(request, timeout=GRPC_LIMIT))
    assert (found, words in details) == (code, True), details


def test_unknown_node_names_the_known_ones(channel: grpc.Channel, settled: tuple[str, str]) -> None:
    request = monitor_pb2.SubscribeRequest(registrations=[registration(("nosuch",))])
    _, details = status_of(lambda: monitor_pb2_grpc.MonitorServiceStub(channel).Subscribe(request, timeout=GRPC_LIMIT))
    assert settled[1] in details.partition("known nodes are")[2]


def test_subscribe_to_nothing(channel: grpc.Channel) -> None:
    request = monitor_pb2.SubscribeRequest()
    code, details = status_of(lambda: monitor_pb2_grpc.MonitorServiceStub(channel).Subscribe(request, timeout=GRPC_LIMIT))
    assert (code, "no registrations" in details) == (INVALID, True)


def test_watch_answers_each_and_goes_on(channel: grpc.Channel, settled: tuple[str, str]) -> None:
    requests: queue.SimpleQueue[monitor_pb2.WatchRequest | None] = queue.SimpleQueue()
    call = monitor_pb2_grpc.MonitorServiceStub(channel).Watch(iter(requests.get, None), timeout=GRPC_LIMIT)
    answers = _registered_or_deregistered(iter(call))

    for number, (wanted, code, words) in enumerate(BAD.values(), 1):
        requests.put(monitor_pb2.WatchRequest(request_id=number, register=monitor_pb2.RegisterRequest(registration=wanted)))
        answer = next(answers).registered
        assert (answer.request_id, answer.error.code) == (number, code.value[0])
        assert words in answer.error.message

    requests.put(monitor_pb2.WatchRequest(request_id=100))
    assert next(answers).registered.error.code == INVALID.value[0]
    good = registration((settled[1],))
    requests.put(monitor_pb2.WatchRequest(request_id=101, deregister=monitor_pb2.DeregisterRequest(registration=good)))
    refusal = next(answers).deregistered
    assert (refusal.request_id, refusal.error.code) == (101, NOT_FOUND.value[0])

    requests.put(monitor_pb2.WatchRequest(request_id=102, register=monitor_pb2.RegisterRequest(registration=good)))
    answer = next(answers).registered
    assert (answer.request_id, answer.state, answer.HasField("error")) == (102, monitor_pb2.REGISTRATION_STATE_ARMED, False)
    call.cancel()
    requests.put(None)


U64 = 2**64 - 1


def at(node: str, epoch: int, position: int) -> monitor_pb2.Cursor.Position:
    return monitor_pb2.Cursor.Position(node=node, epoch=epoch, position=position)


def _node(channel: grpc.Channel, name: str) -> monitor_pb2.Node:
    request = monitor_pb2.ListNodesRequest(nodes=monitor_pb2.NodeSelector(names=[name]))
    [node] = monitor_pb2_grpc.MonitorServiceStub(channel).ListNodes(request, timeout=GRPC_LIMIT).nodes
    return node


@pytest.mark.parametrize(
    ("own_epoch", "position"), [(True, U64), (True, U64 - 1), (True, 2**63), (False, U64)], ids=["last", "last but one", "half", "unknown"]
)
def test_a_cursor_from_beyond(channel: grpc.Channel, settled: tuple[str, str], own_epoch: bool, position: int) -> None:
    """Whoever believed it would say nothing for ever."""
    name = settled[1]
    cursor = monitor_pb2.Cursor(positions=[at(name, _node(channel, name).epoch if own_epoch else U64, position)])
    wanted = registration((name,))
    request = monitor_pb2.SubscribeRequest(registrations=[wanted], cursor=cursor)
    code, details = status_of(lambda: monitor_pb2_grpc.MonitorServiceStub(channel).Subscribe(request, timeout=GRPC_LIMIT))
    assert (code, f"{position} of node '{name}' is beyond all" in details) == (INVALID, True), details
    requests: queue.SimpleQueue[monitor_pb2.WatchRequest | None] = queue.SimpleQueue()
    call = monitor_pb2_grpc.MonitorServiceStub(channel).Watch(iter(requests.get, None), timeout=GRPC_LIMIT)
    answers = _registered_or_deregistered(iter(call))
    register = monitor_pb2.RegisterRequest(registration=wanted)
    requests.put(monitor_pb2.WatchRequest(request_id=1, register=register, cursor=cursor, resuming=2))
    assert next(answers).registered.error.code == INVALID.value[0]
    requests.put(monitor_pb2.WatchRequest(request_id=2, register=register))
    assert next(answers).registered.state == monitor_pb2.REGISTRATION_STATE_ARMED
    call.cancel()
    requests.put(None)


ODD_CURSORS = {
    "nothing": monitor_pb2.Cursor(),
    "zeros": monitor_pb2.Cursor(positions=[at("alpha", 0, 0)]),
    "no name": monitor_pb2.Cursor(positions=[at("", 1, 1)]),
    "unknown node": monitor_pb2.Cursor(positions=[at("nosuch", U64, U64 - 1)]),
    "unknown epoch": monitor_pb2.Cursor(positions=[at("alpha", U64, U64 - 1)]),
    "not the place of an event": monitor_pb2.Cursor(positions=[at("alpha", 1, 77)]),
    "10,000 nodes": monitor_pb2.Cursor(positions=[at(f"node{number}", number, number) for number in range(10_000)]),
    "one node 10,000 times": monitor_pb2.Cursor(positions=[at("alpha", number, number) for number in range(10_000)]),
    "no such log": monitor_pb2.Cursor(log_id=U64, number=U64, stream_id=U64),
}


@pytest.mark.parametrize("cursor", ODD_CURSORS.values(), ids=ODD_CURSORS)
def test_a_cursor_of_nobody(channel: grpc.Channel, settled: tuple[str, str], lab: Lab, cursor: monitor_pb2.Cursor) -> None:
    """What is registered beside it is armed, and what comes then is told."""
    target = lab.command("cat")
    request = monitor_pb2.SubscribeRequest(registrations=[registration((settled[1],), process(target.pid))], cursor=cursor)
    call = monitor_pb2_grpc.MonitorServiceStub(channel).Subscribe(request, timeout=GRPC_LIMIT)
    told = iter(call)
    answer = next(_registered_or_deregistered(told)).registered
    assert answer.state == monitor_pb2.REGISTRATION_STATE_RUNNING
    target.close_input()
    [ended] = next(item for item in told if item.WhichOneof("kind") == "events").events.events
    assert (ended.pid, ended.exit_code) == (target.pid, 0)
    call.cancel()


@pytest.mark.parametrize("number", [3_600_001, 2**32 - 1])
def test_linger(channel: grpc.Channel, settled: tuple[str, str], number: int) -> None:
    request = monitor_pb2.SubscribeRequest(registrations=[registration((settled[1],))], linger_ms=number)
    code, details = status_of(lambda: monitor_pb2_grpc.MonitorServiceStub(channel).Subscribe(request, timeout=GRPC_LIMIT))
    assert (code, details) == (INVALID, f"linger_ms {number}: at most 3600000")


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("", NOT_FOUND, "unknown node ''"),
        ("a b", NOT_FOUND, "unknown node 'a b'"),
        ("nosuch", NOT_FOUND, "unknown node 'nosuch': known nodes are"),
        ("alpha", grpc.StatusCode.FAILED_PRECONDITION, "node alpha is connected: stop its agent first"),
    ],
    ids=["no node", "no name", "unknown", "connected"],
)
def test_remove_node(channel: grpc.Channel, name: str, code: grpc.StatusCode, words: str) -> None:
    request = monitor_pb2.RemoveNodeRequest(node=name)
    found, details = status_of(lambda: [monitor_pb2_grpc.MonitorServiceStub(channel).RemoveNode(request, timeout=GRPC_LIMIT)])
    assert (found, words in details) == (code, True), details


def _registered_or_deregistered(notifications: Iterator[monitor_pb2.Notification]) -> Iterator[monitor_pb2.Notification]:
    return (item for item in notifications if item.WhichOneof("kind") in ("registered", "deregistered"))


def test_dead_pid(channel: grpc.Channel, settled: tuple[str, str], dead_pid: int) -> None:
    request = monitor_pb2.SubscribeRequest(registrations=[registration((settled[1],), process(dead_pid))])
    call = monitor_pb2_grpc.MonitorServiceStub(channel).Subscribe(request, timeout=GRPC_LIMIT)
    answer = next(_registered_or_deregistered(iter(call))).registered
    call.cancel()
    assert (answer.node, answer.state) == (settled[1], monitor_pb2.REGISTRATION_STATE_NOT_FOUND)


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (monitor_pb2.ListProcessesRequest(), INVALID, "name one node"),
        (monitor_pb2.ListProcessesRequest(node="nosuch"), NOT_FOUND, "unknown node 'nosuch': known nodes are"),
        (
            monitor_pb2.ListProcessesRequest(node="alpha", filter=monitor_pb2.ProcessFilter(comms=["?" * 16])),
            INVALID,
            "matches nothing: it takes 16 bytes",
        ),
        (
            monitor_pb2.ListProcessesRequest(node="alpha", filter=monitor_pb2.ProcessFilter(comms=["[a"])),
            INVALID,
            "malformed glob '[a' for comm",
        ),
        (
            monitor_pb2.ListProcessesRequest(node="alpha", filter=monitor_pb2.ProcessFilter(pids=[0])),
            INVALID,
            "pid 0 names no process",
        ),
        (
            monitor_pb2.ListProcessesRequest(node="alpha", filter=monitor_pb2.ProcessFilter(cgroup="../x")),
            INVALID,
            "control group '../x'",
        ),
        (
            monitor_pb2.ListProcessesRequest(node="alpha", filter=monitor_pb2.ProcessFilter(unit="../x.service")),
            INVALID,
            "'../x.service' is not the name of a systemd unit",
        ),
    ],
    ids=["no node", "unknown node", "long comm", "comm glob", "pid 0", "cgroup", "unit"],
)
def test_list_processes(channel: grpc.Channel, request_: monitor_pb2.ListProcessesRequest, code: grpc.StatusCode, words: str) -> None:
    found, details = status_of(lambda: [monitor_pb2_grpc.MonitorServiceStub(channel).ListProcesses(request_, timeout=GRPC_LIMIT)])
    assert (found, words in details) == (code, True), details


def test_list_nodes(channel: grpc.Channel) -> None:
    request = monitor_pb2.ListNodesRequest(nodes=monitor_pb2.NodeSelector(names=["[a"]))
    code, details = status_of(lambda: [monitor_pb2_grpc.MonitorServiceStub(channel).ListNodes(request, timeout=GRPC_LIMIT)])
    assert (code, "malformed glob '[a' for node" in details) == (INVALID, True)
