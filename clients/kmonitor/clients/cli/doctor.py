# SPDX-License-Identifier: Apache-2.0
"""`kmon doctor`: whether this machine can capture events, with which source, and what to do if not.

What the machine can do, its agent finds out: it is asked with `kmonitor-agent --check --json`.
"""

from __future__ import annotations

import json as json_module
import socket
import subprocess
import sys
from typing import Annotated, Any

import typer

from kmonitor.clients.cli.beside import program
from kmonitor.clients.cli.options import Broker, Json
from kmonitor.wire.errors import KmonitorError, UsageError
from kmonitor.wire.plain import plain_text

Line = dict[str, Any]
"""status, name, found, advice; more for the sources and the verdict, as docs/operation.md has it."""

_STYLE = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_LIMIT_S = 30.0


def doctor(
    *,
    json: Json = False,
    broker: Broker = "127.0.0.1:7221",
    scope: Annotated[
        str, typer.Option(metavar="host|pidns", help="As of kmonitor-agent.  [default: what is possible]", show_default=False)
    ] = "",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="What a source needs, for those that work, too.")] = False,
) -> None:
    """Try each source of events on this machine, as this user, and say what is in the way of those that do not work.

    Exit status: 0 if a source works, else 2. A broker that does not answer is a warning: this machine may be a node of another
    one's broker.
    """
    lines = _ask_agent(scope)
    verdict = lines.pop()
    lines.append(_reachable(broker))
    if json:
        for line in (*lines, verdict):
            print(json_module.dumps(line, separators=(",", ":")))
    else:
        _show(lines, verdict, verbose)
    raise typer.Exit(0 if verdict["works"] else 2)


def _ask_agent(scope: str) -> list[Line]:
    """Its lines, the last of which is the verdict. Raises UsageError, with its own words if it ended without one."""
    agent = program("kmonitor-agent")
    options = ["--check", "--json", *(["--scope", scope] if scope else [])]
    try:
        done = subprocess.run([agent, *options], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except OSError as error:
        raise UsageError(f"cannot run {agent}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise KmonitorError(f"{agent} --check gave no answer in {_LIMIT_S:.0f} s") from None
    lines: list[Line] = [json_module.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if lines and lines[-1]["name"] == "auto":
        return lines
    said = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
    raise UsageError(f"{agent} --check gave no answer: {said[-1]}")


def _reachable(broker: str) -> Line:
    """Only that the port answers; gRPC takes longer to import than all other checks take together."""
    try:
        host, port = _host_and_port(broker)
        with socket.create_connection((host, port), timeout=2):
            return _line("ok", f"answers at {broker}")
    except (OSError, KmonitorError) as error:
        reason = str(error) if isinstance(error, KmonitorError) else (error.strerror or str(error))
        return _line("warn", f"{broker}: {reason}", "start kmonitor-broker, or set --broker / KMONITOR_BROKER")


def _line(status: str, found: str, advice: str = "") -> Line:
    return {"status": status, "name": "broker", "found": found, "advice": advice}


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise KmonitorError("no address: write HOST:PORT")
    return host.strip("[]"), int(port)


def _show(lines: list[Line], verdict: Line, verbose: bool) -> None:
    from rich import box  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in ("", "check", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for line in sorted(lines, key=lambda line: "source" in line):  # the sources last, above the verdict
        advice = f"it needs {line['needs']}" if verbose and "needs" in line else line["advice"]
        # Text: square brackets of a namespace or an address are no markup.
        row = (plain_text(word) for word in (line["name"], line["found"], advice))
        table.add_row(Text(line["status"], _STYLE[line["status"]]), *map(Text, row))
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table)
    said = f"--source auto {verdict['found']}" if verdict["works"] else verdict["found"]
    advice = f"; {verdict['advice']}" if verdict["advice"] else ""
    console.print(Text(plain_text(f"{verdict['host']}: {said}{advice}"), _STYLE[verdict["status"]]))
