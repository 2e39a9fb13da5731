# SPDX-License-Identifier: Apache-2.0
"""How far a monitor has come: the last position taken of each node. Brought to the broker, events go on behind it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from kmonitor.clients.events import Batch
from kmonitor.clients.notifications import Gap, Notice, Progress, Registered
from kmonitor.v1 import monitor_pb2
from kmonitor.wire.errors import UsageError

_VERSION = 1


class Cursor:
    """A mutable map: node -> (epoch, position of the last event taken)."""

    __slots__ = ("_at",)

    def __init__(self, positions: dict[str, tuple[int, int]] | None = None) -> None:
        self._at = dict(positions or {})

    def __bool__(self) -> bool:
        return bool(self._at)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cursor) and self._at == other._at

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        return f"Cursor({self._at})"

    def copy(self) -> Cursor:
        """One that no longer follows this."""
        return Cursor(self._at)

    def positions(self) -> dict[str, tuple[int, int]]:
        """node -> (epoch, position)."""
        return dict(self._at)

    def advance(self, node: str, epoch: int, position: int) -> None:
        """Take note of a position. A lower one of the same epoch changes nothing; another epoch starts anew."""
        at = self._at.get(node)
        if at is None or at[0] != epoch or at[1] < position:
            self._at[node] = (epoch, position)

    def take(self, item: Batch | Notice) -> None:
        """Take note of all that a batch or notice says."""
        if isinstance(item, Batch):
            for raw in reversed(item.events):
                if not raw.inferred:  # one that was found, not read from the ring, says nothing of how far the ring was read
                    self.advance(item.node, item.epoch, raw.position)
                    return
        elif isinstance(item, Progress):
            # It may name the position at which the next event will stand, and that one was not taken: hence one less.
            for node in item.nodes:
                self._before(node.node, node.epoch, node.position)
        elif isinstance(item, Gap):
            self._before(item.node, item.epoch, item.to_position)
        elif isinstance(item, Registered) and item.node and not item.error:
            at = self._at.get(item.node)
            if at is None or at[0] != item.epoch:
                self._before(item.node, item.epoch, item.position)

    def _before(self, node: str, epoch: int, position: int) -> None:
        if node and epoch and position:
            self.advance(node, epoch, position - 1)

    def to_proto(self) -> monitor_pb2.Cursor:
        """As kmonitor.v1.Cursor."""
        return monitor_pb2.Cursor(
            positions=[monitor_pb2.Cursor.Position(node=node, epoch=at[0], position=at[1]) for node, at in sorted(self._at.items())]
        )

    def save(self, path: Path) -> None:
        """Write it as JSON so that a reader, and a crash, finds the old or the new one whole. Raises UsageError."""
        positions = [{"node": node, "epoch": at[0], "position": at[1]} for node, at in sorted(self._at.items())]
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with fresh.open("w", encoding="utf-8") as file:
                json.dump({"version": _VERSION, "positions": positions}, file)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        except OSError as error:
            raise UsageError(f"cannot save the cursor in {path}: {error.strerror}") from None

    @classmethod
    def load(cls, path: Path) -> Cursor:
        """Read one that `save` wrote; an empty one if there is no such file. Raises UsageError for anything else."""
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return cls()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the cursor in {path}: {error}") from None
        try:
            content = json.loads(text)
            version = content["version"]
            positions = {str(at["node"]): (int(at["epoch"]), int(at["position"])) for at in content["positions"]}
        except (ValueError, KeyError, TypeError):
            version, positions = None, {}
        if version != _VERSION:
            raise UsageError(f"{path} holds no cursor of this version: name another file, or remove it to start anew")
        return cls(positions)
