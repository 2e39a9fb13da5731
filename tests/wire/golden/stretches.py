# SPDX-License-Identifier: Apache-2.0
"""A captured stretch of a ring, and how the broker and the client decode it together."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kmonitor.broker.block import Block
from kmonitor.broker.elements import Encoded
from kmonitor.broker.encode import Encoder
from kmonitor.clients import Batch
from kmonitor.clients.cli.jsonlines import event_line
from kmonitor.v1 import events_pb2, monitor_pb2

HERE = Path(__file__).parent
NODE = "golden"


@dataclass(frozen=True)
class Stretch:
    """Bytes of a ring, and what the agent sends beside them."""

    position: int
    epoch: int
    boottime_to_unix_ns: int
    data: bytes

    def block(self) -> Block:
        """As the broker takes it in."""
        return Block(NODE, self.epoch, self.position, self.data, self.boottime_to_unix_ns)


def load(name: str) -> tuple[Stretch, list[dict[str, Any]]]:
    """A golden stretch, and what it says."""
    told = json.loads(Path(HERE, f"{name}.json").read_text(encoding="utf-8"))
    return Stretch(data=Path(HERE, f"{name}.bin").read_bytes(), **told["stretch"]), told["events"]


def names() -> list[str]:
    """Of all that there are."""
    return sorted(path.stem for path in HERE.glob("*.bin"))


def decode(stretch: Stretch) -> list[dict[str, Any]]:
    """All of its events, as `kmon watch --json` prints them: through the notifications that monitors get."""
    block = stretch.block()
    lines = []
    for message in Encoder().notifications([(block, np.arange(len(block)))]):
        batch = monitor_pb2.Notification.FromString(message).events
        lines += [_line(batch.node, batch.epoch, event) for event in batch.events]
    return lines


def decode_with(stretch: Stretch, encode: Callable[[Block], Encoded]) -> list[dict[str, Any]]:
    """The same through one of the broker's two encoders."""
    block = stretch.block()
    encoded = encode(block)
    events: list[events_pb2.Event] = []
    for begin, end in zip(encoded.offsets[:-1].tolist(), encoded.offsets[1:].tolist(), strict=True):
        events += events_pb2.EventBatch.FromString(encoded.data[begin:end]).events
    return [_line(block.node, block.epoch, event) for event in events]


def _line(node: str, epoch: int, event: events_pb2.Event) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(event_line(Batch(node, epoch, [event]), event))
    del line["boot_id"]  # no record carries it
    return line
