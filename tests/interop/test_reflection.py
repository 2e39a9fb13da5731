# SPDX-License-Identifier: Apache-2.0
"""What grpcurl and load balancers ask of the broker: reflection, and the health service."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.lab.services import Lab

LIMIT = 10.0


@pytest.fixture(scope="module")
def channel(module_lab: Lab) -> Iterator[grpc.Channel]:
    """To a broker without agents."""
    with grpc.insecure_channel(module_lab.broker().address) as channel:
        grpc.channel_ready_future(channel).result(LIMIT)
        yield channel


def test_reflection_lists_the_services(channel: grpc.Channel) -> None:
    services = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert services == {
        "kmonitor.v1.MonitorService",
        "kmonitor.v1.AgentService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "grpc.reflection.v1.ServerReflection",
    }


def test_reflection_by_its_newer_name(channel: grpc.Channel) -> None:
    """As grpcurl asks first, and others only. The messages are the older one's, which are the same."""
    ask = channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    listed, asked = (reflection_pb2.ServerReflectionRequest(list_services=""), reflection_pb2.ServerReflectionRequest(file_by_filename="x"))
    services, missing = ask(iter((listed, asked)), timeout=LIMIT)
    assert "kmonitor.v1.MonitorService" in [service.name for service in services.list_services_response.service]
    assert missing.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_resolves_itself(channel: grpc.Channel, version: str) -> None:
    """Whoever lists the services asks for each of them."""
    pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    service = pool.FindServiceByName(f"grpc.reflection.{version}.ServerReflection")
    [method] = service.methods
    answer = method.output_type
    assert (method.name, answer.full_name) == ("ServerReflectionInfo", f"grpc.reflection.{version}.ServerReflectionResponse")
    answers = pool.FindMessageTypeByName(f"grpc.reflection.{version}.ListServiceResponse")
    assert answer.fields_by_name["list_services_response"].message_type is answers


def test_reflection_resolves_our_types(channel: grpc.Channel) -> None:
    pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    event = pool.FindMessageTypeByName("kmonitor.v1.Event")
    assert event.file.name == "kmonitor/v1/events.proto"
    assert event.fields_by_name["exit_code"].number == 19
    assert pool.FindEnumTypeByName("kmonitor.v1.EventType").values_by_name["EVENT_TYPE_PROCESS_EXIT"].number == 0x40
    monitor = pool.FindServiceByName("kmonitor.v1.MonitorService")
    assert [method.name for method in monitor.methods] == ["Watch", "Subscribe", "ListNodes", "ListProcesses", "RemoveNode"]
    assert monitor.methods_by_name["Subscribe"].output_type.full_name == "kmonitor.v1.Notification"


@pytest.mark.parametrize("service", ["", "kmonitor.v1.MonitorService", "kmonitor.v1.AgentService"])
def test_health_is_serving(channel: grpc.Channel, service: str) -> None:
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=LIMIT)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_health_of_an_unknown_service(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="kmonitor.v1.NoService"), timeout=LIMIT)
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
