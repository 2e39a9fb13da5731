# SPDX-License-Identifier: Apache-2.0
"""How far a monitor has come, and which processes it watches. Brought to the broker, events go on behind it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from kmonitor.clients import selection
from kmonitor.clients.events import Batch
from kmonitor.clients.identity import Identity
from kmonitor.clients.notifications import Deregistered, Gap, Notice, Progress, Registered, RegistrationState
from kmonitor.v1 import events_pb2, monitor_pb2
from kmonitor.wire import files
from kmonitor.wire.errors import UsageError

_VERSION = 2
_READABLE = (1, _VERSION)  # 1 had positions only
_EXIT = 0x40
_U64 = 1 << 64
_CHARACTERS_MOST = 64 << 20
"""Of a file: more than any cluster has nodes."""


class Cursor:
    """Mutable. Of each node the epoch and the position (bytes in its ring) of the last event taken; the number of the last gap
    taken in the broker's log; the stream that it is of; and for registrations by pid or pidfile which processes they are of.

    Within an epoch of a node, and within a log, it only ever moves forward.
    """

    __slots__ = ("_at", "_ends_with", "_found", "_log", "_stream")

    def __init__(
        self, positions: Mapping[str, tuple[int, int]] | None = None, *, log_id: int = 0, number: int = 0, stream_id: int = 0
    ) -> None:
        self._at = dict(positions or {})
        self._log = (log_id, number)
        self._stream = stream_id
        self._found: dict[bytes, dict[str, Identity]] = {}  # by selection.key: node -> the process that was found there
        self._ends_with: dict[tuple[str, int], set[bytes]] = {}  # (node, pid) -> the registrations that are over with that process

    def __bool__(self) -> bool:
        """Whether there is anything to go on behind."""
        return bool(self._at) or self._log != (0, 0) or self._stream != 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cursor) and self._all == other._all

    @property
    def _all(self) -> tuple[Any, ...]:
        return self._at, self._log, self._stream, self._found

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        return f"Cursor({self._at}, log_id={self._log[0]}, number={self._log[1]}, stream_id={self._stream})"

    def copy(self) -> Cursor:
        """One that no longer follows this."""
        copy = Cursor(self._at, log_id=self._log[0], number=self._log[1], stream_id=self._stream)
        copy._found = {key: dict(found) for key, found in self._found.items()}
        copy._ends_with = {place: set(keys) for place, keys in self._ends_with.items()}
        return copy

    # ---- how far

    def positions(self) -> dict[str, tuple[int, int]]:
        """node -> (epoch, position)."""
        return dict(self._at)

    @property
    def log_id(self) -> int:
        """Names the broker's log that `number` is of; 0 is none."""
        return self._log[0]

    @property
    def number(self) -> int:
        """Gaps of the log up to this number were taken."""
        return self._log[1]

    @property
    def stream_id(self) -> int:
        """Names the stream that it is of, and those that went on with it; 0 is not known."""
        return self._stream

    def advance(self, node: str, epoch: int, position: int) -> None:
        """Take note of a position. A lower one of the same epoch changes nothing; another epoch starts anew."""
        at = self._at.get(node)
        if at is None or at[0] != epoch or at[1] < position:
            self._at[node] = (epoch, position)

    def take(self, item: Batch | Notice) -> None:
        """Take note of all that a batch or notice says."""
        self.move(item)
        if isinstance(item, Registered) and item.state is RegistrationState.RUNNING and not item.error:
            process = item.process
            if process is not None and item.registration is not None:
                self._is_of(item.registration, item.node, Identity(process.boot_id, process.pid, process.start_time))

    def move(self, item: Batch | Notice) -> None:
        """Take note of how far a batch or notice leads, and not of processes."""
        if isinstance(item, Batch):
            if len(item.events):
                self.advance(item.node, item.epoch, item.events[-1].position)
        elif isinstance(item, Progress):
            # It may name the position at which the next event will stand, and that one was not taken: hence one less.
            for node in item.nodes:
                self._before(node.node, node.epoch, node.position)
            self._numbered(item.log_id, item.number)
            self._stream = item.stream_id or self._stream
        elif isinstance(item, Gap):
            self._before(item.node, item.epoch, item.to_position)
            if item.number:  # else it is that stream's alone
                self._numbered(item.log_id, item.number)
        elif isinstance(item, Registered) and item.node and not item.error:
            self._stream = item.stream_id or self._stream
            at = self._at.get(item.node)
            if at is None or at[0] != item.epoch:
                self._before(item.node, item.epoch, item.position)

    def _before(self, node: str, epoch: int, position: int) -> None:
        if node and epoch and position:
            self.advance(node, epoch, position - 1)

    def _numbered(self, log_id: int, number: int) -> None:
        if log_id and (log_id != self._log[0] or number > self._log[1]):
            self._log = (log_id, number)

    # ---- whom

    def found(self) -> dict[bytes, dict[str, Identity]]:
        """By `selection.key` of registrations by pid or pidfile: node -> the process that it was found to be of."""
        return {key: dict(found) for key, found in self._found.items()}

    def forget_ended(self, batch: Batch, events: Iterable[events_pb2.Event]) -> None:
        """Forget the processes that these events of the batch are the ends of, where the registration is over with it: a monitor
        that lives for months must not collect them. One that is to mean the same after that, too, does not call this."""
        if not self._ends_with:
            return
        for event in events:
            if event.type == _EXIT:
                ended = Identity(batch.boot_id, event.pid, event.start_time)
                for key in list(self._ends_with.get((batch.node, event.pid), ())):
                    if self._found[key][batch.node].may_be(ended):
                        self._forget(key)

    def forget_deregistered(self, notice: Deregistered) -> None:
        """Forget the processes of a registration that is over."""
        if notice.registration is not None and not notice.event_mask and not notice.error:
            self._forget(selection.key(notice.registration))

    def keep_only(self, registrations: Iterable[monitor_pb2.Registration]) -> None:
        """Forget the processes of all other registrations."""
        for key in self._found.keys() - {selection.key(registration) for registration in registrations}:
            self._forget(key)

    def _is_of(self, registration: monitor_pb2.Registration, node: str, process: Identity) -> None:
        key = selection.key(registration)
        before = self._found.setdefault(key, {}).get(node)
        if before is not None:
            self._unlist(key, node, before)
        self._found[key][node] = process
        if selection.ends_with_process(registration):
            self._ends_with.setdefault((node, process.pid), set()).add(key)

    def _forget(self, key: bytes) -> None:
        for node, process in self._found.pop(key, {}).items():
            self._unlist(key, node, process)

    def _unlist(self, key: bytes, node: str, process: Identity) -> None:
        keys = self._ends_with.get((node, process.pid))
        if keys is not None:
            keys.discard(key)
            if not keys:
                del self._ends_with[node, process.pid]

    # ---- elsewhere

    def to_proto(self) -> monitor_pb2.Cursor:
        """As kmonitor.v1.Cursor."""
        return monitor_pb2.Cursor(
            positions=[monitor_pb2.Cursor.Position(node=node, epoch=at[0], position=at[1]) for node, at in sorted(self._at.items())],
            log_id=self._log[0],
            number=self._log[1],
            stream_id=self._stream,
        )

    def to_json(self) -> str:
        """All of it, in one line of text: for who keeps it together with what was done with the events."""
        content = {
            "version": _VERSION,
            "positions": [{"node": node, "epoch": at[0], "position": at[1]} for node, at in sorted(self._at.items())],
            "log": {"id": self._log[0], "number": self._log[1]},
            "stream": self._stream,
            "found": [
                {
                    "registration": json_format.MessageToDict(monitor_pb2.Registration.FromString(key), preserving_proto_field_name=True),
                    "processes": [
                        {"node": node, "boot_id": process.boot_id, "pid": process.pid, "start_time": process.start_time}
                        for node, process in sorted(found.items())
                    ],
                }
                for key, found in sorted(self._found.items())
            ],
        }
        return json.dumps(content)

    @classmethod
    def from_json(cls, text: str) -> Cursor:
        """What `to_json` made. Raises UsageError for anything else."""
        try:
            return cls._from_json(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError, json_format.Error):
            raise UsageError("this is no cursor of this version") from None

    def save(self, path: Path) -> None:
        """Write it as JSON so that a reader, and a crash, finds the old or the new one whole. Raises UsageError."""
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with contextlib.suppress(FileNotFoundError):
                fresh.unlink()  # of one that had this pid, or of somebody else
            made = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            with os.fdopen(made, "w", encoding="utf-8") as file:
                file.write(self.to_json() + "\n")  # json.dump takes five times as long
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        except OSError as error:
            raise UsageError(f"cannot save the cursor in {path}: {error.strerror}") from None

    @classmethod
    def load(cls, path: Path) -> Cursor:
        """Read one that `save` wrote; an empty one if there is no such file. Raises UsageError for anything else."""
        try:
            with os.fdopen(files.open_own(path, os.O_RDONLY), encoding="utf-8") as file:
                text = file.read(_CHARACTERS_MOST)
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise UsageError(f"cannot read the cursor in {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            text = ""
        try:
            return cls.from_json(text)
        except UsageError:
            raise UsageError(f"{path} holds no cursor of this version: name another file, or remove it to start anew") from None

    @classmethod
    def _from_json(cls, content: Any) -> Cursor:
        version = content["version"]
        if version not in _READABLE:
            raise ValueError(version)
        cursor = cls({_text(at["node"]): (_u64(at["epoch"]), _u64(at["position"])) for at in content["positions"]})
        if version == 1:
            return cursor
        cursor._log = (_u64(content["log"]["id"]), _u64(content["log"]["number"]))
        cursor._stream = _u64(content["stream"])
        for item in content["found"]:
            registration = json_format.ParseDict(item["registration"], monitor_pb2.Registration())
            for process in item["processes"]:
                identity = Identity(_text(process["boot_id"]), _u64(process["pid"]), _u64(process["start_time"]))
                if not 0 < identity.pid < 1 << 63:
                    raise ValueError(identity.pid)
                cursor._is_of(registration, _text(process["node"]), identity)
        return cursor


def _u64(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < _U64:
        raise ValueError(value)
    return value


def _text(value: Any) -> str:
    text = str(value)
    text.encode()  # half a surrogate pair is a ValueError here, and not when it is sent
    return text
