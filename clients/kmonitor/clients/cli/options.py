# SPDX-License-Identifier: Apache-2.0
"""What the commands' options have in common: durations, the broker's address, and how a command runs and ends."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import Coroutine
from typing import Annotated, Any

import typer

from kmonitor.wire.errors import UsageError

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|)")
_SECONDS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}

Broker = Annotated[
    str,
    typer.Option("--broker", metavar="HOST:PORT", envvar="KMONITOR_BROKER", help="Where the broker listens."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line, for jq and for programs.")]


def parse_duration(text: str) -> float:
    """Seconds of "10s", "500ms", "2m", "1h" or "10". Raises UsageError unless it is more than zero."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or (seconds := float(match[1]) * _SECONDS[match[2]]) <= 0:
        raise UsageError(f"{text!r} is no duration: write 10s, 500ms, 2m, 1h, or seconds")
    return seconds


def duration_or_none(text: str) -> float:
    """As `parse_duration`, where 0 means not at all."""
    return 0.0 if text.strip() in ("0", "0s") else parse_duration(text)


def duration(text: str | None) -> float | None:
    """As `parse_duration`, for an option that may be left out."""
    return None if text is None else parse_duration(text)


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
