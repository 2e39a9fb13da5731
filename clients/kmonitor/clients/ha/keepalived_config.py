# SPDX-License-Identifier: Apache-2.0
"""What is to be written where: from the command line, or from a file in TOML. All errors are UsageError, one line."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmonitor.clients.ha.keepalived import Policy, WhenBlind
from kmonitor.clients.verdict import Subject
from kmonitor.wire import selectors
from kmonitor.wire.durations import parse_duration
from kmonitor.wire.errors import UsageError

_LARGEST = 254
"""Of a value, either way: keepalived.conf(5), init_file."""
_SYNTAX = "write NODE:pidfile=PATH, NODE:unit=NAME, NODE:cgroup=PATH or NODE:pid=N, and behind it ,comm=GLOB"
_KEYS: dict[str, type | tuple[type, ...]] = {
    "file": str,
    "processes": list,
    "when-blind": str,
    "quorum": int,
    "blind-after": (str, int, float),
    "up-delay": (str, int, float),
    "down-delay": (str, int, float),
    "up-value": int,
    "down-value": int,
}
_NEEDED = ("file", "processes", "when-blind")


@dataclass(frozen=True, slots=True)
class TrackConfig:
    """One track file. The values are what the file says; what keepalived makes of them its weight decides."""

    file: Path
    subjects: tuple[Subject, ...]
    policy: Policy
    up_value: int = 0
    down_value: int = 1

    def value(self, up: bool) -> int:
        """What to write."""
        return self.up_value if up else self.down_value

    def said(self, value: int | None) -> bool | None:
        """What a file with this value says; None if it is neither of ours."""
        return {self.up_value: True, self.down_value: False}.get(value) if value is not None else None


def process(text: str) -> Subject:
    """NODE:KIND=VALUE[,comm=GLOB]... as a subject of that name."""
    node, colon, rest = text.partition(":")
    target, *more = rest.split(",comm=")
    kind, equals, value = target.partition("=")
    if not (node and colon and equals and value):
        raise UsageError(f"process {text!r}: {_SYNTAX}")
    node = selectors.check_node_name(node)
    comms = tuple(selectors.check_comm(glob) for glob in more)
    if comms and kind in ("pid", "pidfile"):
        raise UsageError(f"process {text!r}: comm= belongs to unit= and cgroup=, where there may be several processes")
    if kind == "pidfile":
        return Subject(text, node, pidfile=selectors.check_pidfile(value))
    if kind == "unit":
        return Subject(text, node, unit=selectors.check_unit_name(value), comms=comms)
    if kind == "cgroup":
        return Subject(text, node, cgroup=selectors.check_cgroup_path(value), comms=comms)
    if kind == "pid" and value.isdecimal():
        return Subject(text, node, pid=selectors.check_pid(int(value)))
    raise UsageError(f"process {text!r}: {_SYNTAX}")


def track(
    file: Path,
    processes: Iterable[str],
    when_blind: str,
    *,
    quorum: int | None = None,
    blind_after: float = 5.0,
    up_delay: float = 0.0,
    down_delay: float = 0.0,
    up_value: int = 0,
    down_value: int = 1,
) -> TrackConfig:
    """Checked."""
    subjects = tuple(process(text) for text in processes)
    names = [subject.name for subject in subjects]
    if not names:
        raise UsageError(f"{file}: no process is given to go by: {_SYNTAX}")
    if len(set(names)) < len(names):
        raise UsageError(f"{file}: process {max(names, key=names.count)!r} is given twice, and would count twice")
    wanted = len(names) if quorum is None else quorum
    if not 1 <= wanted <= len(names):
        raise UsageError(f"{file}: a quorum of {wanted} from {len(names)} processes: give a number from 1 to {len(names)}")
    if when_blind not in [each.value for each in WhenBlind]:
        raise UsageError(f"{file}: when-blind {when_blind!r}: say down, keep or up")
    for value in (up_value, down_value):
        if abs(value) > _LARGEST:
            raise UsageError(f"{file}: value {value} is more than keepalived takes: give -{_LARGEST} to {_LARGEST}")
    if up_value == down_value:
        raise UsageError(f"{file}: up-value and down-value are both {up_value}: keepalived could not tell them apart")
    policy = Policy(wanted, WhenBlind(when_blind), blind_after, up_delay, down_delay)
    return TrackConfig(file.absolute(), subjects, policy, up_value, down_value)


def load(path: Path) -> list[TrackConfig]:
    """All [[track]] of a file."""
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML: {error}") from None
    tables = content.pop("track", None)
    if content:
        raise UsageError(f"{path}: {next(iter(content))!r} is nothing that is known: all belongs into [[track]]")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{path}: there is no [[track]] in it")
    return distinct([_table(path, table) for table in tables])


def distinct(tracks: list[TrackConfig]) -> list[TrackConfig]:
    """Raises if two of them have the same file."""
    files = [each.file for each in tracks]
    if len(set(files)) < len(files):
        raise UsageError(f"{max(files, key=files.count)} is the file of two tracks: give each its own")
    return tracks


def _table(path: Path, table: dict[str, Any]) -> TrackConfig:
    for key, value in table.items():
        kind = _KEYS.get(key)
        if kind is None:
            raise UsageError(f"{path}: {key!r} is nothing that a [[track]] has: there are {', '.join(_KEYS)}")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UsageError(f"{path}: {key} = {value!r} is of the wrong type")
    for key in _NEEDED:
        if key not in table:
            raise UsageError(f"{path}: a [[track]] has no {key}")
    if not Path(table["file"]).is_absolute():
        raise UsageError(f"{path}: file = {table['file']!r}: give an absolute path")
    if not all(isinstance(each, str) for each in table["processes"]):
        raise UsageError(f"{path}: processes is a list of texts: {_SYNTAX}")
    times = {key: parse_duration(str(table[key])) for key in ("blind-after", "up-delay", "down-delay") if key in table}
    numbers = {key: table[key] for key in ("quorum", "up-value", "down-value") if key in table}
    arguments: dict[str, Any] = {key.replace("-", "_"): value for key, value in (times | numbers).items()}
    return track(Path(table["file"]), table["processes"], table["when-blind"], **arguments)
