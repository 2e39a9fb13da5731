# SPDX-License-Identifier: Apache-2.0
"""`kmon doctor`: whether this machine can capture events, and what to do if not."""

from __future__ import annotations

import json as json_module
import platform
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from kmonitor.clients.cli.options import Broker, Json, silence_closed_stdout

if TYPE_CHECKING:
    from kmonitor.clients.cli.checks import Check

_STYLE = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    *,
    json: Json = False,
    broker: Broker = "127.0.0.1:7221",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Advice for the checks that passed, too.")] = False,
) -> None:
    """Check what it takes to capture events on this machine.

    Exit status: 0 if the agent's `core` source would work here, as this user; else 2. A broker that does not answer is a warning:
    this machine may be a node of another one's broker.
    """
    from kmonitor.clients.cli import checks  # noqa: PLC0415 - only for this command

    found = checks.all_checks(broker)
    works = not any(check.status == "fail" for check in found)
    if json:
        for check in found:
            print(json_module.dumps(asdict(check), separators=(",", ":")))
    else:
        _show(found, works, verbose)
    silence_closed_stdout()
    raise typer.Exit(0 if works else 2)


def _show(found: list[Check], works: bool, verbose: bool) -> None:
    from rich import box  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in ("", "check", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for check in found:
        advice = check.advice if verbose or check.status != "ok" else ""
        table.add_row(f"[{_STYLE[check.status]}]{check.status}[/]", check.name, check.found, advice)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table)
    verdict = "[green]the core source works here[/]" if works else "[bold red]the core source would not work here, as this user[/]"
    console.print(f"{platform.node()}: {verdict}")
