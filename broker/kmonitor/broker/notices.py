# SPDX-License-Identifier: Apache-2.0
"""Notifications other than events, as the bytes that go out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from kmonitor.v1 import events_pb2, monitor_pb2


def gap(
    node: str,
    reason: monitor_pb2.GapReason.ValueType,
    epoch: int,
    *,
    positions: tuple[int, int],
    times: tuple[int, int],
    counts: Mapping[int, int],
    number: int = 0,
    log_id: int = 0,
) -> bytes:
    """Events are missing: `positions` [from, to) in bytes, `times` in Unix nanoseconds, `counts` by event type.

    `number` and `log_id`: of the mark in the log that says so, if there is one.
    """
    message = monitor_pb2.Gap(
        node=node,
        reason=reason,
        epoch=epoch,
        from_position=positions[0],
        to_position=positions[1],
        from_time_unix_nano=_u64(times[0]),
        to_time_unix_nano=_u64(times[1]),
        number=number,
        log_id=log_id,
    )
    for kind in sorted(counts):
        message.lost.add(type=events_pb2.EventType.Name(kind), count=_u64(counts[kind]))  # type: ignore[arg-type]
    return monitor_pb2.Notification(gap=message).SerializeToString()


def node_change(node: str, state: monitor_pb2.NodeState.ValueType, boot_id: str, reason: str, registration_ids: Iterable[int]) -> bytes:
    """A node came or went, now."""
    message = monitor_pb2.NodeChange(
        node=node, state=state, time_unix_nano=time.time_ns(), boot_id=boot_id, reason=reason, registration_ids=registration_ids
    )
    return monitor_pb2.Notification(node=message).SerializeToString()


def progress(nodes: Iterable[tuple[str, int, int, int]], number: int, log_id: int, stream_id: int = 0) -> bytes:
    """(node, epoch, position, Unix nanoseconds): all before it was delivered; and the marks of the log up to `number` were told."""
    message = monitor_pb2.Progress(number=number, log_id=log_id, stream_id=stream_id)
    for node, epoch, position, unix_ns in nodes:
        message.nodes.add(node=node, epoch=epoch, position=position, time_unix_nano=_u64(unix_ns))
    return monitor_pb2.Notification(progress=message).SerializeToString()


def _u64(number: int) -> int:
    """Clocks, and agents, may say anything."""
    return min(max(number, 0), (1 << 64) - 1)


def registered(message: monitor_pb2.Registered) -> bytes:
    """The answer to a register request, from one node."""
    return monitor_pb2.Notification(registered=message).SerializeToString()


def deregistered(message: monitor_pb2.Deregistered) -> bytes:
    """The answer to a deregister request."""
    return monitor_pb2.Notification(deregistered=message).SerializeToString()
