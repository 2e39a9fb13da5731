# SPDX-License-Identifier: Apache-2.0
"""More is asked of a node, and answered by it, than one message can say."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc

from kmonitor.v1 import monitor_pb2, monitor_pb2_grpc
from tests.lab.requires import capture_lack, need
from tests.lab.services import Lab

COUNT = 4200
PATH = "/x" * 2000
NOT_FOUND, UNREACHABLE = monitor_pb2.REGISTRATION_STATE_NOT_FOUND, monitor_pb2.REGISTRATION_STATE_NODE_UNREACHABLE


def requests(done: threading.Event) -> Iterator[monitor_pb2.WatchRequest]:
    """Groups by long paths, which make 17 MB: an agent takes 16 in a message, and a broker 8."""
    for number in range(COUNT):
        request = monitor_pb2.WatchRequest(request_id=number)
        request.register.registration.event_mask = 0x40
        request.register.registration.nodes.names.append("long")
        request.register.registration.target.cgroup = f"/{number}{PATH}"
        yield request
    done.wait()


def test_a_node_with_many_long_paths_can_come_back(lab: Lab) -> None:
    need(capture_lack)
    broker = lab.broker()
    agent = lab.agent("long", broker.address)
    lab.stop(agent)
    done = threading.Event()
    options = [("grpc.max_receive_message_length", 64 << 20)]
    with grpc.insecure_channel(broker.address, options=options) as channel:
        told = monitor_pb2_grpc.MonitorServiceStub(channel).Watch(requests(done), timeout=50)
        states = (note.registered.state for note in told if note.WhichOneof("kind") == "registered")
        assert [next(states) for _ in range(COUNT)] == [UNREACHABLE] * COUNT
        agent = lab.agent("long", broker.address)
        assert [next(states) for _ in range(COUNT)] == [NOT_FOUND] * COUNT
        done.set()
        told.cancel()
    assert "broke" not in agent.stderr_text()
    assert len(agent.lines) == 1, "it has connected once"
