# SPDX-License-Identifier: Apache-2.0
"""`kmon nodes` and `kmon ps`: what the broker knows, as tables."""

from __future__ import annotations

import dataclasses
import json as json_module
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kmonitor.clients.cli.options import Broker, Json, run
from kmonitor.clients.cli.output import say
from kmonitor.wire.plain import plain_text

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from kmonitor.clients.notifications import Process
    from kmonitor.v1 import monitor_pb2

_WORD_MOST = 32
"""Characters that an agent says of itself in one column: no node's words shall push another's state off the screen."""
_LABELS_MOST = 80
_WIDEST = 1 << 20
_STATE_STYLE = {"UP": "green", "UNREACHABLE": "bold red", "REBOOTED": "yellow", "GONE": "dim"}


def nodes(
    *,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME|GLOB]...", help="Only these.")] = None,
    remove: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Instead: this node is not connected and will not come back. Monitors are told that it is GONE, and what was registered "
            "there is over.",
        ),
    ] = None,
    json: Json = False,
    broker: Broker = "127.0.0.1:7221",
) -> None:
    """List the nodes that the broker knows.

    Exit status: 0 done, 2 usage, or with --remove if the node is connected or not known, 3 no broker, 4 not authorised.
    """
    if remove is None:
        run(_nodes(broker, names or [], json))
    if names:
        raise typer.BadParameter("--remove NAME takes no other names")
    run(_remove(broker, str(remove)))


async def _remove(broker: str, name: str) -> int:
    from kmonitor.clients.monitor import connect  # noqa: PLC0415 - gRPC is not for --help

    async with connect(broker) as monitor:
        await monitor.remove_node(name)
    say(f"node {name} is removed")
    return 0


async def _nodes(broker: str, names: list[str], json: bool) -> int:
    from kmonitor.clients.monitor import connect  # noqa: PLC0415 - gRPC is not for --help

    async with connect(broker) as monitor:
        found = await monitor.list_nodes(*names)
    if json:
        for node in found:
            print(json_module.dumps(node_object(node), separators=(",", ":")))
        return 0
    table = _table("node", "state", "since", "source", "scope", "kernel", "agent", ">watched", ">received", ">lost", "labels")
    labels_most = _LABELS_MOST if sys.stdout.isatty() else None
    for node in found:
        state = node_state(node)
        table.add_row(
            _cell(node.name),
            _cell(state, _STATE_STYLE.get(state, "")),
            since(node.since_unix_nano),
            *(_cell(word, most=_WORD_MOST) for word in (node.source, node.scope, node.kernel_release, node.agent_version)),
            "all" if node.node_mask else str(node.watched_processes),
            size(node.received_bytes),
            _cell(str(node.lost), "bold yellow" if node.lost else ""),
            _cell(" ".join(f"{key}={value}" for key, value in sorted(node.labels.items())), most=labels_most),
        )
    _print(table, "the broker knows no such node" if names else "no node has connected yet: start kmonitor-agent on one")
    return 0


def ps(
    *,
    node: Annotated[str, typer.Option(metavar="NAME", help="The node.")],
    comm: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Only processes of this name.")] = None,
    uid: Annotated[list[int] | None, typer.Option(metavar="N", help="Only processes of this user.")] = None,
    json: Json = False,
    broker: Broker = "127.0.0.1:7221",
) -> None:
    """List the processes that run on a node now."""
    run(_ps(broker, node, comm or [], uid or [], json))


async def _ps(broker: str, node: str, comms: list[str], uids: list[int], json: bool) -> int:
    from kmonitor.clients.monitor import connect  # noqa: PLC0415

    async with connect(broker) as monitor:
        found = await monitor.list_processes(node, comms=comms, uids=uids)
    if json:
        for process in found:
            print(json_module.dumps(_process_object(process), separators=(",", ":")))
        return 0
    table = _table(">pid", ">ppid", ">uid", ">threads", ">start time (ns)", "comm")
    for process in found:
        threads = _cell(str(process.threads)) if process.threads else _cell("ended", "dim")
        numbers = map(str, (process.pid, process.ppid, process.uid))
        table.add_row(*numbers, threads, str(process.start_time), _cell(process.comm))
    _print(table, f"no such process on {node}")
    return 0


def node_state(node: monitor_pb2.Node) -> str:
    """ "UP"."""
    from kmonitor.clients.notifications import NodeState  # noqa: PLC0415

    return NodeState(node.state).name


def node_object(node: monitor_pb2.Node) -> dict[str, Any]:
    """The fields of kmonitor.v1.Node, all of them, by their names there."""
    found: dict[str, Any] = {field.name: getattr(node, field.name) for field in node.DESCRIPTOR.fields}
    return found | {"state": node_state(node), "labels": dict(node.labels)}


def _process_object(process: Process) -> dict[str, Any]:
    return dataclasses.asdict(process)


def since(unix_nano: int) -> str:
    """ "for 3m07s", from a time to now."""
    from kmonitor.clients.cli.screen import lived  # noqa: PLC0415

    return f"for {lived(time.time_ns() - unix_nano)}" if unix_nano else ""


def size(count: int) -> str:
    """Bytes, in steps of 1024: "3.4 MiB"."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def _cell(text: str, style: str = "", most: int | None = None) -> Text:
    """Others' text, in which brackets and colons are no markup. Cut at `most` characters: --json has all of it."""
    from rich.text import Text  # noqa: PLC0415

    shown = plain_text(text if most is None else text[: most + 1])
    return Text(shown if most is None or len(shown) <= most else f"{shown[: most - 1]}…", style)


def _table(*columns: str) -> Table:
    from rich import box  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left", no_wrap=True)
    return table


def _print(table: Table, if_empty: str) -> None:
    from rich.console import Console  # noqa: PLC0415

    if not table.row_count:
        say(if_empty)
        return
    # A pipe has no width to keep to: whoever greps wants whole lines.
    Console(width=None if sys.stdout.isatty() else _WIDEST, highlight=False).print(table)
