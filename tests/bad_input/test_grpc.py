# SPDX-License-Identifier: Apache-2.0
"""The broker's API with what cannot be: gRPC statuses, and on a Watch stream answers that leave the stream alive."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import grpc
import pytest

from kmonitor.v1 import monitor_pb2, monitor_pb2_grpc
from tests.bad_input.refusal import GRPC_LIMIT, status_of

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
            monitor_pb2.ListProcessesRequest(node="alpha", filter=monitor_pb2.ProcessFilter(comms=["[a"])),
            INVALID,
            "malformed glob '[a' for comm",
        ),
        (
            monitor_pb2.ListProcessesRequest(node="alpha", filter=monitor_pb2.ProcessFilter(pids=[0])),
            INVALID,
            "pid 0 names no process",
        ),
    ],
    ids=["no node", "unknown node", "comm glob", "pid 0"],
)
def test_list_processes(channel: grpc.Channel, request_: monitor_pb2.ListProcessesRequest, code: grpc.StatusCode, words: str) -> None:
    found, details = status_of(lambda: [monitor_pb2_grpc.MonitorServiceStub(channel).ListProcesses(request_, timeout=GRPC_LIMIT)])
    assert (found, words in details) == (code, True), details


def test_list_nodes(channel: grpc.Channel) -> None:
    request = monitor_pb2.ListNodesRequest(nodes=monitor_pb2.NodeSelector(names=["[a"]))
    code, details = status_of(lambda: [monitor_pb2_grpc.MonitorServiceStub(channel).ListNodes(request, timeout=GRPC_LIMIT)])
    assert (code, "malformed glob '[a' for node" in details) == (INVALID, True)
