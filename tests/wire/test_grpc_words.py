# SPDX-License-Identifier: Apache-2.0
"""Statuses as grpc 1.85 words them, and what people are shown."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from kmonitor.wire.grpc_words import plain_reason


@pytest.mark.parametrize(
    ("details", "shown"),
    [
        (
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Failed to connect to remote host: "
            "Connection refused",
            "connection refused",
        ),
        (
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:192.0.2.1:7221: connection attempt timed out before receiving "
            "SETTINGS frame",
            "it does not answer",
        ),
        ("DNS resolution failed for nosuch.example:7221: C-ares status is not ARES_SUCCESS", "the name nosuch.example has no address"),
        (
            "errors resolving nosuch.invalid:1: [field:hostname lookup error:address lookup failed for nosuch.invalid:1: Domain name not "
            "found]",
            "the name nosuch.invalid has no address",
        ),
        ("Stream removed (Socket closed)", "the connection was closed"),
        ("Stream removed (ping timeout)", "it does not answer"),
        ("recvmsg:Connection reset by peer", "the connection was closed"),
        ("Cancelling all calls", "it ended"),
        ("Internal error from Core", "the connection broke"),
        ("the broker is stopping", "the broker is stopping"),
        ("lease ran out: nothing came from its agent for 1 s", "lease ran out: nothing came from its agent for 1 s"),
        ("", ""),
    ],
)
def test_words(details: str, shown: str) -> None:
    assert plain_reason(details) == shown


async def test_of_a_real_channel() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        call: Any = channel.unary_unary("/a/b")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(b"")
    assert plain_reason(error.value.details() or "") == "connection refused"
