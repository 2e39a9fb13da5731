# SPDX-License-Identifier: Apache-2.0
"""What the commands' options have in common: durations, the broker's address, and how a command runs and ends."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kmonitor.wire import masks
from kmonitor.wire.durations import parse_duration
from kmonitor.wire.errors import UsageError
from kmonitor.wire.labels import parse_labels

if TYPE_CHECKING:
    from kmonitor.clients.selection import Selection

_WHO, _WHAT = "Which processes", "Which events"

Broker = Annotated[
    str,
    typer.Option("--broker", metavar="HOST:PORT", envvar="KMONITOR_BROKER", help="Where the broker listens."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line, for jq and for programs.")]


Nodes = Annotated[
    list[str] | None,
    typer.Option(
        "--node",
        metavar="NAME|GLOB,...",
        help="Only these nodes. Default: every node, including those that join later.",
        rich_help_panel=_WHO,
    ),
]
Labels = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="NAME=VALUE,...", help="Only nodes that have all these labels.", rich_help_panel=_WHO),
]

Events = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="fork, exec, exit, abort, thread-create, thread-exit, thread-abort; process is the first four, thread the last three, "
        "all is all; or a mask such as 0x60. Default: process, or exit with --failed.",
        rich_help_panel=_WHAT,
    ),
]
Comms = Annotated[list[str] | None, typer.Option("--comm", metavar="GLOB", help="Only processes of this name.", rich_help_panel=_WHAT)]
Uids = Annotated[list[int] | None, typer.Option("--uid", metavar="N", help="Only processes of this user.", rich_help_panel=_WHAT)]
Failed = Annotated[
    bool,
    typer.Option("--failed", help="Only ends that failed: with an exit code other than 0, or by a signal.", rich_help_panel=_WHAT),
]


def event_filters(events: str | None, comms: list[str] | None, uids: list[int] | None, failed: bool) -> Selection:
    """Return the registration's part that says which events. Raises BadMaskError.

    --failed alone asks for exits: a process that died makes one event, and not an ABORT and an EXIT.
    """
    mask = masks.parse_mask(events if events is not None else "exit" if failed else "process")
    return {"events": mask, "comms": comms or [], "uids": uids or [], "failures_only": failed}


def split_names(given: list[str] | None) -> list[str]:
    """Return the names of an option that may be repeated, and may list several with commas; those within [...] are a glob's."""
    return [name for text in given or () for name in re.split(r",(?![^\[]*\])", text)]


def labels_of(given: list[str] | None) -> dict[str, str]:
    """Return the labels of an option that may be repeated, and may list several with commas. Raises UsageError."""
    return parse_labels([text for option in given or () for text in option.split(",")])


def one_of(option: str, value: str | None, known: tuple[str, ...]) -> str:
    """Return the value of an option that is one of some words; empty if it was left out. Raises UsageError."""
    if value is not None and value not in known:
        raise UsageError(f"{option} {value}: give one of {', '.join(known)}")
    return value or ""


def positive_duration(text: str) -> float:
    """Return the seconds of a duration that is more than zero. Raises UsageError."""
    seconds = parse_duration(text)
    if seconds <= 0:
        raise UsageError(f"{text!r}: give more than zero")
    return seconds


def duration(text: str | None) -> float | None:
    """Return the seconds of an option that may be left out, and must be more than zero. Raises UsageError."""
    return None if text is None else positive_duration(text)


def run(work: Coroutine[Any, Any, int], *, on_interrupt: int = 0) -> None:
    """Run a command to its exit status. Ctrl-C ends it in order, with `on_interrupt`; SIGTERM, and a terminal that is closed, with 143."""
    raise typer.Exit(asyncio.run(_guarded(work, on_interrupt)))


async def _guarded(work: Coroutine[Any, Any, int], on_interrupt: int) -> int:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    came: list[int] = []

    def interrupt(number: int) -> None:
        came.append(number)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as nohup(1) has it
            loop.add_signal_handler(number, interrupt, number)
    try:
        return await task
    except asyncio.CancelledError:
        if not came:
            raise
        return on_interrupt if came[0] == signal.SIGINT else 128 + signal.SIGTERM


def wants_colour() -> bool:
    """On a terminal, unless NO_COLOR (no-color.org) is set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
