# SPDX-License-Identifier: Apache-2.0
"""The way to the broker: its address, and a gRPC channel that tells at once if nobody is there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from typing import TYPE_CHECKING

import grpc

from kmonitor.clients import errors, reach
from kmonitor.clients.reach import Reach
from kmonitor.v1.monitor_pb2_grpc import MonitorServiceStub
from kmonitor.wire.errors import BrokerUnreachableError, KmonitorError
from kmonitor.wire.selectors import DEFAULT_ADDRESS, check_address

if TYPE_CHECKING:
    from kmonitor.v1.monitor_pb2_grpc import MonitorServiceAsyncStub  # of the type stub only


_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.enable_http_proxy", 0),  # a proxy for the web in the environment is not for this
    ("grpc.use_local_subchannel_pool", 1),  # else another monitor's failures in this program delay this one
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5000),  # so long a slow broker is given for one attempt; the name's next address is tried beside it
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.dns_min_time_between_resolutions_ms", 500),  # else a broker that has moved is looked for where it was, for 30 s
    # A broker that has stopped, or whose machine is gone, sends no word of it. Progress comes every second: these go when it does not.
    ("grpc.keepalive_time_ms", 3000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.http2.ping_timeout_ms", 3000),  # what ends the stream of one that has stopped: it is a minute else
    ("grpc.http2.max_pings_without_data", 0),  # as many as it takes: else two, and then one a minute
]
logging.getLogger("grpc").addHandler(logging.NullHandler())  # what it says of messages that cannot be read is said in a typed error
_LOOK_S = 2.0
_PATIENCE_S = 20.0
"""For a broker that takes connections and is slow to answer."""


async def _look(address: str) -> tuple[Reach, str]:
    """As `reach.look`, in a thread that nobody waits for: a name server that does not answer takes its time, and Ctrl-C does not."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[tuple[Reach, str]] = loop.create_future()

    def take(found: tuple[Reach, str]) -> None:
        if not answer.done():
            answer.set_result(found)

    def work() -> None:
        found = reach.look(address, _LOOK_S)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(take, found)

    threading.Thread(target=work, name="kmonitor reach", daemon=True).start()
    try:
        async with asyncio.timeout(2 * _LOOK_S):
            return await answer
    except TimeoutError:
        return Reach.UNNAMED, "no name server answers"


class Channel:
    """A gRPC channel and its stub. Owned by one monitor, shared with those that it makes for itself."""

    def __init__(self, address: str | None, credentials: grpc.ChannelCredentials | None = None) -> None:
        self.address = check_address(address or os.environ.get("KMONITOR_BROKER") or DEFAULT_ADDRESS)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(self.address, options=_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(self.address, credentials, options=_OPTIONS)
        self.stub: MonitorServiceAsyncStub = MonitorServiceStub(self._channel)

    async def connect(self, timeout_s: float) -> None:
        """Wait until the broker's transport answers. Raises BrokerUnreachableError, which says why, `timeout_s` after the attempt began,
        or at once if nobody listens there; a broker that listens, and is slow, has longer."""
        clock = asyncio.get_running_loop().time
        began = clock()
        while not await self.ready(timeout_s):
            found, reason = await _look(self.address)
            is_slow = found in (Reach.SILENT, Reach.SERVED) and clock() - began < _PATIENCE_S
            may_answer = found is Reach.AWAY and clock() - began < timeout_s
            if not is_slow and not may_answer:
                raise BrokerUnreachableError(reach.in_words(self.address, found, reason))

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
