# SPDX-License-Identifier: Apache-2.0
"""The way to the broker: its address, and a gRPC channel that tells at once if nobody is there."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import grpc

from kmonitor.clients import errors
from kmonitor.v1.monitor_pb2_grpc import MonitorServiceStub
from kmonitor.wire.errors import KmonitorError
from kmonitor.wire.selectors import DEFAULT_ADDRESS, check_address

if TYPE_CHECKING:
    from kmonitor.v1.monitor_pb2_grpc import MonitorServiceAsyncStub  # of the type stub only


_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.enable_http_proxy", 0),  # a proxy for the web in the environment is not for this
    ("grpc.use_local_subchannel_pool", 1),  # else another monitor's failures in this program delay this one
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class Channel:
    """A gRPC channel and its stub. Owned by one monitor, shared with those that it makes for itself."""

    def __init__(self, address: str | None, credentials: grpc.ChannelCredentials | None = None) -> None:
        self.address = check_address(address or os.environ.get("KMONITOR_BROKER") or DEFAULT_ADDRESS)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(self.address, options=_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(self.address, credentials, options=_OPTIONS)
        self.stub: MonitorServiceAsyncStub = MonitorServiceStub(self._channel)

    async def ready(self, timeout_s: float) -> bool:
        """Whether the broker's transport answers; returns at the first failure, or when the time is up."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    state = self._channel.get_state(try_to_connect=True)
                    if state is grpc.ChannelConnectivity.READY:
                        return True
                    if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                        return False
                    await self._channel.wait_for_state_change(state)
        except TimeoutError:
            return False

    async def close(self) -> None:
        """End all calls."""
        await self._channel.close()

    def error(self, error: grpc.aio.AioRpcError) -> KmonitorError:
        """The typed error for a call's status."""
        return errors.from_rpc(error, self.address)
