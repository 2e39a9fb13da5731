# SPDX-License-Identifier: Apache-2.0
"""The health check of the broker's image: grpc.health.v1, asked on the loopback. Exit status 0 if it serves, else 1 and one line."""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def main(address: str = "127.0.0.1:7221") -> str | None:
    """What is wrong, in one line."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=4)
        except grpc.RpcError as error:
            return f"{address} does not answer: {error.code().name}"
    state = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return None if state == "SERVING" else f"{address} is {state}"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
