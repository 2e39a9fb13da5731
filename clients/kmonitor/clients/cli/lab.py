# SPDX-License-Identifier: Apache-2.0
"""`kmon lab`: a cluster on one machine, without Docker."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kmonitor.clients.cli.beside import program
from kmonitor.clients.cli.help import CONTEXT, Command, Group
from kmonitor.clients.cli.options import Json, positive_duration
from kmonitor.clients.cli.output import say
from kmonitor.wire.plain import plain_text

if TYPE_CHECKING:
    from types import FrameType

    from kmonitor.clients.lab.lab import Lab, NodeStatus
    from kmonitor.clients.lab.starting import Programs
    from kmonitor.clients.lab.state import State

app = typer.Typer(
    name="lab",
    cls=Group,
    rich_markup_mode=None,
    context_settings=CONTEXT,
    help="Run a cluster on this machine, of network and pid namespaces (root).",
)

_DEFAULT = "lab"
Name = Annotated[str, typer.Option("--name", metavar="NAME", envvar="KMONITOR_LAB", help="Which lab, if there are several.")]
Nodes = Annotated[list[str], typer.Argument(metavar="NODE...", help="Of the lab's nodes.")]
Parts = Annotated[list[str], typer.Argument(metavar="NODE...", help='Of the lab\'s nodes; "broker" is its broker.')]


@app.command(cls=Command, context_settings=CONTEXT)
def up(
    *,
    nodes: Annotated[int, typer.Option(metavar="N", help="How many nodes: a, b, c ...")] = 3,
    workload: Annotated[bool, typer.Option("--workload", help="A few processes a second on each node, some of which fail.")] = False,
    lease: Annotated[
        str, typer.Option(metavar="TIME", help="A node is unreachable when nothing came from it for so long (kmonitor-broker --lease).")
    ] = "3s",
    name: Name = _DEFAULT,
) -> None:
    """Make a lab: a broker, and nodes that are connected to it. It runs until `kmon lab down`.

    It prints where the broker is, for the shell: eval "$(kmon lab up)".

    Exit status: 0 done, 2 usage, or what it takes is missing here, 4 not root. What was made until then is removed again, also on Ctrl-C.
    """
    positive_duration(lease)
    lab = _lab(name)
    with _ending_in_order(), _alone():
        state = lab.up(nodes, _programs(), lease=lease, workload=workload)
    say(f"lab {name} is up, with nodes {' '.join(state.addresses)}")
    print(f"export KMONITOR_BROKER={state.broker}")


@app.command(cls=Command, context_settings=CONTEXT)
def down(*, name: Name = _DEFAULT) -> None:
    """End a lab, with all that runs in it, and remove what it was made of. Nothing there is fine too."""
    lab = _lab(name)
    with _alone():
        lab.down()


@app.command(cls=Command, context_settings=CONTEXT)
def cut(*, nodes: Nodes, name: Name = _DEFAULT) -> None:
    """Take the links of nodes down: they run on, and nobody reaches them."""
    _each(name, nodes, lambda lab, node: lab.cut(node))


@app.command(cls=Command, context_settings=CONTEXT)
def heal(*, nodes: Nodes, name: Name = _DEFAULT) -> None:
    """Bring the links of nodes up again."""
    _each(name, nodes, lambda lab, node: lab.heal(node))


@app.command(cls=Command, context_settings=CONTEXT)
def kill(
    *,
    nodes: Parts,
    agent: Annotated[bool, typer.Option("--agent", help="Only the agent (kill -9): the node's processes go on.")] = False,
    name: Name = _DEFAULT,
) -> None:
    """Kill nodes as a power cut does: all of their processes end at once, and nothing says good-bye. Of the broker: kill -9."""
    _each(name, nodes, lambda lab, node: lab.kill(node, agent=agent))


@app.command(cls=Command, context_settings=CONTEXT)
def start(*, nodes: Parts, name: Name = _DEFAULT) -> None:
    """Bring back what was killed, until it is connected: a node (in another boot, as one that had no power), its agent, the broker."""
    programs = _programs()
    _each(name, nodes, lambda lab, node: lab.start(node, programs))


@app.command(cls=Command, context_settings=CONTEXT)
def pause(*, nodes: Parts, name: Name = _DEFAULT) -> None:
    """Stop the agents of nodes, or the broker (SIGSTOP), as a machine that hangs."""
    _each(name, nodes, lambda lab, node: lab.pause(node))


@app.command(cls=Command, context_settings=CONTEXT)
def resume(*, nodes: Parts, name: Name = _DEFAULT) -> None:
    """Let those that were paused go on."""
    _each(name, nodes, lambda lab, node: lab.resume(node))


@app.command(name="exec", cls=Command, context_settings=CONTEXT | {"ignore_unknown_options": True, "allow_interspersed_args": False})
def exec_(
    *,
    node: Annotated[str, typer.Argument(metavar="NODE", help="One of the lab's nodes.")],
    command: Annotated[list[str], typer.Argument(metavar="[--] COMMAND...", help="With its arguments.")],
    name: Name = _DEFAULT,
) -> None:
    """Run a command in a node. Exit status: that of the command, 2 if there is no such node."""
    lab = _lab(name)
    machine = lab.machine(node)
    folder = Path.cwd()
    there = folder if (machine.root / folder.relative_to("/")).is_dir() else Path("/")
    words = [os.fspath(word) for word in machine.within(command[command[0] == "--" :], there)]
    os.execvpe(words[0], words, {**os.environ, "KMONITOR_BROKER": lab.broker_inside})


@app.command(cls=Command, context_settings=CONTEXT)
def status(*, json: Json = False, name: Name = _DEFAULT) -> None:
    """How the nodes are, as this machine sees it. What the broker makes of that: kmon nodes."""
    lab = _lab(name)
    found, state = lab.status(), lab.state()
    if json:
        import dataclasses  # noqa: PLC0415 - not for --help
        import json as json_module  # noqa: PLC0415

        for node in found:
            print(json_module.dumps({**dataclasses.asdict(node), "lab": name, "broker": state.broker}, separators=(",", ":")))
        return
    rows = [("node", "state", "address", "init", "agent"), *map(_row, found), _broker_row(state)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())


@app.command(cls=Command, context_settings=CONTEXT)
def logs(*, node: Annotated[str, typer.Argument(metavar="NODE", help='A node, or "broker".')], name: Name = _DEFAULT) -> None:
    """What the agent of a node, or the broker, said."""
    with _lab(name).log(node).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            print(plain_text(line.rstrip("\n")))


def _row(node: NodeStatus) -> tuple[str, ...]:
    return (node.node, node.state, node.address, *(str(pid or "") for pid in (node.init_pid, node.agent_pid)))


def _broker_row(state: State) -> tuple[str, ...]:
    broker = state.alive("broker")
    how = "KILLED" if broker is None else "PAUSED" if broker.state == "T" else "UP"
    return ("broker", how, state.broker, "", str(broker.pid) if broker else "")


def _lab(name: str) -> Lab:
    from kmonitor.clients.lab.lab import Lab  # noqa: PLC0415 - not for --help

    return Lab(name, say)


def _programs() -> Programs:
    from kmonitor.clients.lab.starting import Programs  # noqa: PLC0415

    return Programs(program("kmonitor-broker"), program("kmonitor-agent"))


def _each(name: str, nodes: list[str], deed: Callable[[Lab, str], None]) -> None:
    lab = _lab(name)
    with _alone():
        for node in dict.fromkeys(nodes):
            deed(lab, node)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Within, no other command changes a lab."""
    from kmonitor.clients.lab import state, tools  # noqa: PLC0415

    tools.check()
    with state.locked(say):
        yield


@contextlib.contextmanager
def _ending_in_order() -> Iterator[None]:
    """Within, Ctrl-C and the like are exceptions that undo what was done."""

    def end(number: int, _: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)  # what is undone now is not to be disturbed
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
