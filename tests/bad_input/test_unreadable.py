# SPDX-License-Identifier: Apache-2.0
"""Requests that are no messages at all, for a broker: a status for whoever sent it, and one line in its log."""

from __future__ import annotations

import grpc
import pytest

from kmonitor.v1 import monitor_pb2, monitor_pb2_grpc
from tests.bad_input.refusal import GRPC_LIMIT, status_of
from tests.lab.services import Lab

GARBAGE = b"\xff\xff\xff"
SERVICE = "/kmonitor.v1.MonitorService"
LINE = "kmonitor-broker: WARNING: a request cannot be read, and was refused: "


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        (f"{SERVICE}/ListNodes", "unary_unary"),
        (f"{SERVICE}/Subscribe", "unary_stream"),
        (f"{SERVICE}/Watch", "stream_stream"),
        ("/kmonitor.v1.AgentService/Connect", "stream_stream"),
        ("/grpc.health.v1.Health/Check", "unary_unary"),
        ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "stream_stream"),
    ],
)
def test_a_request_that_is_no_message(lab: Lab, method: str, kind: str) -> None:
    broker = lab.broker()
    with grpc.insecure_channel(broker.address) as channel:
        call = getattr(channel, kind)(method, request_serializer=None, response_deserializer=None)
        request = iter([GARBAGE]) if kind == "stream_stream" else GARBAGE
        answer = (lambda: [call(request, timeout=GRPC_LIMIT)]) if kind == "unary_unary" else lambda: call(request, timeout=GRPC_LIMIT)
        code, details = status_of(answer)
        assert (code, "Error parsing message" in details) == (grpc.StatusCode.UNKNOWN, True)
        assert monitor_pb2_grpc.MonitorServiceStub(channel).ListNodes(monitor_pb2.ListNodesRequest(), timeout=GRPC_LIMIT).nodes == []
    lab.stop(broker)
    [line] = broker.stderr_text().splitlines()
    assert line.startswith(LINE)
