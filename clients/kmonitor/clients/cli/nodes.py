# SPDX-License-Identifier: Apache-2.0
"""`kmon nodes` and `kmon ps`: what the broker knows, as tables."""

from __future__ import annotations

import dataclasses
import json as json_module
import os
import shlex
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kmonitor.clients.cli.options import Broker, Json, labels_of, one_of, run, split_names
from kmonitor.clients.cli.output import say
from kmonitor.clients.cli.table import Cell, print_table
from kmonitor.wire.errors import UsageError
from kmonitor.wire.plain import plain_text

if TYPE_CHECKING:
    from kmonitor.clients.monitor import Monitor
    from kmonitor.clients.notifications import Process
    from kmonitor.v1 import monitor_pb2

_STATE_STYLE = {"UP": "32", "UNREACHABLE": "1;31", "REBOOTED": "33", "GONE": "2"}
_FORMATS = ("wide", "json", "name")
_WORD_MOST = 32
_NONE_FOUND = 1
"""Exit status of a question that was answered with nothing."""

Output = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="wide|json|name", help="More columns, one JSON object a line, or names only."),
]


def nodes(
    *,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME|GLOB]...", help="Only these nodes.")] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="NAME=VALUE,...", help="Only nodes that have all these labels.")
    ] = None,
    remove: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Remove a node that is not connected and will not come back. Monitors are notified that it is GONE, and what was "
            "registered there ends.",
        ),
    ] = None,
    output: Output = None,
    json: Json = False,
    broker: Broker = "127.0.0.1:7221",
) -> None:
    """List the nodes that the broker knows.

    Exit status: 0 done, 1 no such node, 2 usage, or with --remove if the node is connected or not known, 3 no broker, 4 not authorised.

    \b
    Examples:
      kmon nodes -o wide
      kmon nodes 'web*' --label zone=west
    """
    if remove is None:
        run(_nodes(broker, split_names(names), labels_of(label), _format(output, json)))
    if names or label:
        raise UsageError("--remove NAME takes no other names")
    run(_remove(broker, str(remove)))


def _format(output: str | None, json: bool) -> str:
    return "json" if json and output is None else one_of("--output", output, _FORMATS)


async def _remove(broker: str, name: str) -> int:
    from kmonitor.clients.monitor import connect  # noqa: PLC0415 - gRPC is not for --help

    async with connect(broker) as monitor:
        await monitor.remove_node(name)
    say(f"node {name} is removed")
    return 0


async def _nodes(broker: str, names: list[str], labels: dict[str, str], form: str) -> int:
    from kmonitor.clients.monitor import connect  # noqa: PLC0415 - gRPC is not for --help

    async with connect(broker) as monitor:
        found = await monitor.list_nodes(*names, labels=labels)
    if not found:
        chosen = bool(names or labels)
        say("the broker knows no such node" if chosen else "no node has connected yet: start kmonitor-agent on one")
        return _NONE_FOUND if chosen else 0
    if form == "json":
        for node in found:
            print(json_module.dumps(node_object(node), separators=(",", ":")))
    elif form == "name":
        for node in found:
            print(plain_text(node.name))
    elif form == "wide":
        columns = ("node", "state", "since", "source", "scope", "kernel", "agent", ">watched", ">received", ">lost", "labels")
        print_table(columns, map(_wide_row, found))
    else:
        print_table(("node", "state", "since", "source", ">watched", ">lost"), map(_row, found))
    return 0


def _row(node: monitor_pb2.Node) -> list[Cell]:
    state = node_state(node)
    return [
        node.name,
        (state, _STATE_STYLE.get(state, "")),
        since(node.since_unix_nano),
        _word(node.source),
        "all" if node.node_mask else str(node.watched_processes),
        (str(node.lost), "1;33" if node.lost else ""),
    ]


def _wide_row(node: monitor_pb2.Node) -> list[Cell]:
    name, state, for_, source, watched, lost = _row(node)
    labels = ",".join(f"{key}={value}" for key, value in sorted(node.labels.items()))
    agent = map(_word, (node.scope, node.kernel_release, node.agent_version))
    return [
        name,
        state,
        for_,
        source,
        *agent,
        watched,
        size(node.received_bytes),
        lost,
        labels,
    ]


def _word(text: str) -> str:
    """Cut what an agent says of itself: the line stays one that can be read, and --json has all of it."""
    return text if len(text) <= _WORD_MOST else f"{text[: _WORD_MOST - 1]}…"


_SORTS: dict[str, Callable[[Process], Any]] = {
    "pid": lambda process: process.pid,
    "ppid": lambda process: process.ppid,
    "uid": lambda process: process.uid,
    "age": lambda process: process.start_time,
    "comm": lambda process: process.comm,
    "threads": lambda process: -process.threads,
}


def ps(
    *,
    node: Annotated[str | None, typer.Option(metavar="NAME", help="The node; not needed where the broker knows only one.")] = None,
    comm: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Only processes of this name.")] = None,
    uid: Annotated[list[int] | None, typer.Option(metavar="N", help="Only processes of this user.")] = None,
    sort: Annotated[str, typer.Option(metavar="|".join(_SORTS), help="Order: by age the oldest first, by threads the most first.")] = "pid",
    output: Output = None,
    json: Json = False,
    broker: Broker = "127.0.0.1:7221",
) -> None:
    """List the processes that run on a node now.

    Exit status: 0 done, 1 no such process, 2 usage, 3 no broker, 4 not authorised.

    \b
    Examples:
      kmon ps --node web1 --comm 'nginx*'
      kmon ps --sort age -o wide
    """
    order = one_of("--sort", sort, tuple(_SORTS))
    run(_ps(broker, node, comm or [], uid or [], _SORTS[order], _format(output, json)))


async def _ps(broker: str, node: str | None, comms: list[str], uids: list[int], order: Callable[[Process], Any], form: str) -> int:
    from kmonitor.clients.monitor import connect  # noqa: PLC0415

    async with connect(broker) as monitor:
        name = node if node is not None else await _only_node(monitor)
        found = sorted(await monitor.list_processes(name, comms=comms, uids=uids, with_args=True), key=order)
    if not found:
        say(f"no such process on {name}")
        return _NONE_FOUND
    if form == "json":
        for process in found:
            print(json_module.dumps(dataclasses.asdict(process), separators=(",", ":")))
    elif form == "name":
        for process in found:
            print(process.pid)
    elif form == "wide":
        columns = (">pid", ">ppid", ">uid", ">gid", ">threads", ">age", ">start time (ns)", "comm", "command")
        print_table(columns, map(_wide_process, found))
    else:
        width = os.get_terminal_size().columns if sys.stdout.isatty() else None
        print_table((">pid", ">ppid", ">uid", ">age", "command"), (_process(each, width) for each in found))
    return 0


async def _only_node(monitor: Monitor) -> str:
    found = [node.name for node in await monitor.list_nodes()]
    if len(found) != 1:
        names = ", ".join(found[:20]) + (", ..." if len(found) > 20 else "")
        raise UsageError(f"give --node: one of {names}" if found else "no node has connected yet: start kmonitor-agent on one")
    return str(found[0])


_BESIDE_COMMAND = 40
"""Columns that the numbers before a command take, at most, on a terminal."""


def _process(process: Process, width: int | None) -> list[Cell]:
    command = plain_text(command_of(process))
    most = None if width is None else max(width - _BESIDE_COMMAND, 20)
    shown = command if most is None or len(command) <= most else f"{command[: most - 1]}…"
    return [str(process.pid), str(process.ppid), str(process.uid), _age(process), shown]


def _wide_process(process: Process) -> list[Cell]:
    numbers = map(str, (process.pid, process.ppid, process.uid, process.gid, process.threads))
    return [*numbers, _age(process), str(process.start_time), process.comm, command_of(process)]


def command_of(process: Process) -> str:
    """Return the command line as a shell takes it; as ps(1) a name in brackets where there is none."""
    if not process.threads:
        return f"[{process.comm}] <defunct>"
    if not process.args:
        return f"[{process.comm}]"
    return shlex.join(process.args) + (" …" if process.args_truncated else "")


def _age(process: Process) -> str:
    from kmonitor.clients.cli.screen import lived  # noqa: PLC0415

    return "" if process.age_ns is None else lived(process.age_ns)


def node_state(node: monitor_pb2.Node) -> str:
    """ "UP"."""
    from kmonitor.clients.notifications import NodeState  # noqa: PLC0415

    return NodeState(node.state).name


def node_object(node: monitor_pb2.Node) -> dict[str, Any]:
    """The fields of kmonitor.v1.Node, all of them, by their names there."""
    found: dict[str, Any] = {field.name: getattr(node, field.name) for field in node.DESCRIPTOR.fields}
    return found | {"state": node_state(node), "labels": dict(node.labels)}


def since(unix_nano: int) -> str:
    """ "3m07s", from a time to now."""
    from kmonitor.clients.cli.screen import lived  # noqa: PLC0415

    return lived(time.time_ns() - unix_nano) if unix_nano else ""


def size(count: int) -> str:
    """Bytes, in steps of 1024: "3.4 MiB"."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"
