# SPDX-License-Identifier: Apache-2.0
"""The ways to capture, and which one is taken."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from kmonitor.agent.errors import CaptureError
from kmonitor.agent.pins import PinFolder
from kmonitor.agent.probe import ProbeOptions, adopt
from kmonitor.agent.source import Source
from kmonitor.wire.errors import KmonitorError

log = logging.getLogger("kmonitor-agent")

SourceName = Literal["core", "bcc", "netlink"]
SOURCES: tuple[SourceName, ...] = get_args(SourceName)
"""In the order in which `auto` tries them: the least cost for the most knowledge first."""


def open_source(choice: SourceName | Literal["auto"], options: ProbeOptions, pins: PinFolder | None) -> Source:
    """Take over the probe that is pinned, or start a source; `auto` is the first that works.

    Raises what the chosen source raises; for `auto`, if none works, an error that says why of each.
    """
    _check_clocks()
    if pins is not None:
        adopted = adopt(options, pins)
        if adopted is not None:
            if choice in ("auto", adopted.name):
                return adopted
            adopted.close()
            raise CaptureError(
                f"the pinned probe is one of source {adopted.name}: go on with --source {adopted.name}, or remove it with --unpin first"
            )
    if choice != "auto":
        return start(choice, options, pins)
    refusals: list[tuple[SourceName, KmonitorError]] = []
    for name in SOURCES:
        try:
            source = start(name, options, pins)
        except KmonitorError as error:
            refusals.append((name, error))
            continue
        why = "; ".join(f"not {other}: {error}" for other, error in refusals)
        log.log(logging.WARNING if refusals else logging.INFO, "source %s%s", name, f" ({why})" if why else "")
        return source
    # What is wrong with the best is what is best mended; its type says with which status to end.
    raise type(refusals[0][1])("; ".join(f"source {name}: {error}" for name, error in refusals))


def start(name: SourceName, options: ProbeOptions, pins: PinFolder | None) -> Source:
    """Start one source. Raises CaptureError, MissingCapabilityError, PinError, BpfError."""
    _check_clocks()
    return _loader(name)(options, pins)


def _check_clocks() -> None:
    """Raises CaptureError if this process's clocks are not the machine's, by which the kernel times events: time_namespaces(7)."""
    try:
        lines = Path("/proc/self/timens_offsets").read_text(encoding="ascii").splitlines()
    except OSError:
        return  # a kernel without such namespaces
    for line in lines:
        clock, *offset = line.split()
        if any(map(int, offset)):
            raise CaptureError(
                f"this agent's {clock} clock is {offset[0]} s off the machine's, as it is in a time namespace: all times would be wrong;"
                " start it outside, or by nsenter --time=/proc/1/ns/time"
            )


def _loader(name: SourceName) -> Callable[[ProbeOptions, PinFolder | None], Source]:
    # Each brings its own libraries: only what is used is loaded.
    if name == "core":
        from kmonitor.agent.sources import core  # noqa: PLC0415

        return core.load
    if name == "bcc":
        from kmonitor.agent.sources import bcc  # noqa: PLC0415

        return bcc.load
    from kmonitor.agent.sources import netlink  # noqa: PLC0415

    return netlink.load
