# SPDX-License-Identifier: Apache-2.0
"""The user's word on which process is a resource's, and how a node is called where: a file in TOML."""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kmonitor.wire import selectors
from kmonitor.wire.errors import BadSelectorError, UsageError

_KINDS = {"pidfile": selectors.check_pidfile, "unit": selectors.check_unit_name, "cgroup": selectors.check_cgroup_path}
_TEXT: dict[str, type | tuple[type, ...]] = {
    "pidfile": str,
    "unit": str,
    "cgroup": str,
    "comm": (str, list),
    "grace": (str, int, float),
    "ignore": bool,
}


@dataclass(frozen=True, slots=True)
class Rule:
    """Of one resource. At most one of the three kinds."""

    pidfile: str | None = None
    unit: str | None = None
    cgroup: str | None = None
    comms: tuple[str, ...] = ()
    grace: float | None = None
    """Seconds."""
    ignore: bool = False

    @property
    def names_process(self) -> bool:
        """Whether it says which process it is."""
        return (self.pidfile or self.unit or self.cgroup) is not None


@dataclass(frozen=True, slots=True)
class Rules:
    """All of a file."""

    resources: dict[str, Rule] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)
    """The cluster's name of a node -> the name that its kmonitor agent has."""

    def of(self, resource: str, primitive: str) -> Rule:
        """Of an instance ("web:1"), else of its primitive."""
        return self.resources.get(resource) or self.resources.get(primitive) or Rule()

    def agent_of(self, node: str) -> str:
        """The name of the node's agent."""
        return self.nodes.get(node, node)


def load(path: Path, seconds: Any) -> Rules:
    """From a file; `seconds` reads a duration. Raises UsageError with the file's name."""
    try:
        with path.open("rb") as file:
            found = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from None
    unknown = set(found) - {"resource", "nodes"}
    if unknown:
        raise UsageError(f"{path}: {sorted(unknown)[0]!r} is not known: write [resource.NAME] and [nodes]")
    nodes = found.get("nodes", {})
    if not isinstance(nodes, dict) or not all(isinstance(name, str) for name in nodes.values()):
        raise UsageError(f'{path}: [nodes] has lines as: NAME = "NAME OF ITS AGENT"')
    with _naming(f"{path}: [nodes]"):
        for name in nodes.values():
            selectors.check_node_name(name)
    return Rules({name: _rule(f"{path}: [resource.{name}]", each, seconds) for name, each in _table(path, found).items()}, nodes)


def _table(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    resources = found.get("resource", {})
    if not isinstance(resources, dict) or not all(isinstance(each, dict) for each in resources.values()):
        raise UsageError(f"{path}: write [resource.NAME], and below it what its process is")
    return resources


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Within, what cannot match is an error that says where it stands."""
    try:
        yield
    except BadSelectorError as error:
        raise UsageError(f"{where}: {error}") from None


def _rule(where: str, table: dict[str, Any], seconds: Any) -> Rule:
    for name, value in table.items():
        if name not in _TEXT:
            raise UsageError(f"{where}: {name!r} is not known: {', '.join(_TEXT)} are")
        if not isinstance(value, _TEXT[name]):
            raise UsageError(f"{where}: {name} cannot be {value!r}")
    if sum(kind in table for kind in _KINDS) > 1:
        raise UsageError(f"{where}: give one of {', '.join(_KINDS)}")
    comms = table.get("comm", [])
    comms = [comms] if isinstance(comms, str) else comms
    if not all(isinstance(each, str) for each in comms):
        raise UsageError(f"{where}: comm is a text, or a list of texts")
    if "comm" in table and not ("unit" in table or "cgroup" in table):
        raise UsageError(f"{where}: comm belongs to unit or cgroup")
    grace = table.get("grace")
    with _naming(where):
        for glob in comms:
            selectors.check_comm(glob)
        for kind, check in _KINDS.items():
            if kind in table:
                check(table[kind])
    return Rule(
        pidfile=table.get("pidfile"),
        unit=table.get("unit"),
        cgroup=table.get("cgroup"),
        comms=tuple(comms),
        grace=None if grace is None else seconds(str(grace)),
        ignore=table.get("ignore", False),
    )
