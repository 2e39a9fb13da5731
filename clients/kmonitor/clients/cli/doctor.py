# SPDX-License-Identifier: Apache-2.0
"""`kmon doctor`: whether this machine can capture events, with which source, and what to do if not.

What the machine can do, its agent finds out: it is asked with `kmonitor-agent --check --json`.
"""

from __future__ import annotations

import json as json_module
import subprocess
import sys
from typing import Annotated, Any

import typer

from kmonitor.clients import reach
from kmonitor.clients.cli.beside import program
from kmonitor.clients.cli.options import Broker, Json
from kmonitor.clients.cli.output import say
from kmonitor.clients.reach import Reach
from kmonitor.wire.errors import UsageError
from kmonitor.wire.plain import plain_text
from kmonitor.wire.selectors import check_address

Line = dict[str, Any]
"""status, name, found, advice; more for the sources and the verdict, as docs/operation.md has it."""

_STYLE = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_PATIENCE_S = 10.0
"""After so long it is said what is waited for."""
_LOOK_S = 5.0
"""For a broker that takes connections to answer."""


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
    out, err, status = _run([agent, *options])
    lines: list[Line] = [json_module.loads(line) for line in out.splitlines() if line.startswith("{")]
    if lines and lines[-1]["name"] == "auto":
        return lines
    said = err.strip().splitlines() or [f"it ended with status {status}"]
    raise UsageError(f"{agent} --check gave no answer: {said[-1]}")


def _run(words: list[str]) -> tuple[str, str, int]:
    """For as long as it takes: on a slow machine a source's compiler alone may work for a minute."""
    pipe = subprocess.PIPE
    try:
        child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, errors="replace")
    except OSError as error:
        raise UsageError(f"cannot run {words[0]}: {error.strerror}") from None
    with child:
        patience = _PATIENCE_S
        while True:
            try:
                out, err = child.communicate(timeout=patience)
            except subprocess.TimeoutExpired:
                say(f"still waiting for {words[0]} --check, which tries each source (Ctrl-C ends it)")
                patience *= 2
            except BaseException:
                child.kill()
                raise
            else:
                return out, err, child.returncode


def _reachable(broker: str) -> Line:
    """Whether it answers as gRPC does, which takes longer to import than all other checks take together."""
    try:
        found, reason = reach.look(check_address(broker), _LOOK_S)
    except UsageError as error:
        return _line("warn", str(error), "set --broker / KMONITOR_BROKER")
    if found is Reach.SERVED:
        return _line("ok", f"answers at {broker}")
    if found is Reach.SILENT:
        return _line("warn", f"{broker}: takes connections, and does not answer", "see its log: stopped, overloaded, or out of open files")
    return _line("warn", f"{broker}: {reason}", "start kmonitor-broker, or set --broker / KMONITOR_BROKER")


def _line(status: str, found: str, advice: str = "") -> Line:
    return {"status": status, "name": "broker", "found": found, "advice": advice}


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
