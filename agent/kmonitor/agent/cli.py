# SPDX-License-Identifier: Apache-2.0
"""The command kmonitor-agent."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # C-core's own lines on stderr would be nobody's

import typer

from kmonitor.agent.errors import BpfError
from kmonitor.agent.identity import Identity
from kmonitor.agent.pins import DEFAULT_ROOT, PinFolder
from kmonitor.agent.probe import DEFAULT_RING_BYTES, DEFAULT_WATCHED_MAX, Probe, ProbeOptions, is_current
from kmonitor.agent.source import Source
from kmonitor.agent.sources import SOURCES, SourceName, open_source
from kmonitor.wire.errors import KmonitorError, UsageError
from kmonitor.wire.priority import DEFAULT_NICE, raise_priority
from kmonitor.wire.selectors import DEFAULT_ADDRESS, check_address, check_label_key, check_node_name

if TYPE_CHECKING:
    from kmonitor.agent.predecessor import Predecessor
    from kmonitor.agent.uplink import Uplink

log = logging.getLogger("kmonitor-agent")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Signalled = Literal["term", "int"]
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_RING_LEAST = 64 << 10
_RING_MOST = 1 << 30


def parse_ring_size(text: str) -> int:
    """Bytes from "16M"; a power of two, as the kernel wants it. Raises UsageError."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text.upper())
    size = int(match[1]) * _UNITS[match[2]] if match else 0
    if not _RING_LEAST <= size <= _RING_MOST or size & (size - 1):
        raise UsageError(f"ring size {text!r}: give a power of two from 64K to 1G, such as 16M")
    return size


def parse_labels(texts: list[str]) -> dict[str, str]:
    """{"zone": "a"} from ["zone=a"]. Raises UsageError."""
    labels: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"label {text!r}: write NAME=VALUE")
        if key in labels:
            raise UsageError(f"label {key} is given twice")
        labels[check_label_key(key)] = value
    return labels


def check_source(text: str) -> SourceName | Literal["auto"]:
    """Raises UsageError."""
    if text == "auto":
        return "auto"
    for name in SOURCES:
        if text == name:
            return name
    raise UsageError(f"source {text!r}: write auto, {', '.join(SOURCES[:-1])} or {SOURCES[-1]}")


def check_scope(text: str) -> Literal["host", "pidns"] | None:
    """None if it was not given. Raises UsageError."""
    if text in ("host", "pidns", ""):
        return "host" if text == "host" else "pidns" if text else None
    raise UsageError(f"scope {text!r}: write host or pidns")


@app.command()
def agent(
    broker: Annotated[str, typer.Option(envvar="KMONITOR_BROKER", help="HOST:PORT of the broker.")] = DEFAULT_ADDRESS,
    node: Annotated[str, typer.Option(help="This node's name in the cluster.  [default: the host's name]", show_default=False)] = "",
    source: Annotated[str, typer.Option(help="What captures: auto, core, bcc or netlink.")] = "auto",
    scope: Annotated[
        str, typer.Option(help="host: all processes. pidns: those of this pid namespace and below.  [default: host]", show_default=False)
    ] = "",
    label: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, for selecting nodes; repeatable.")] = None,
    pin_root: Annotated[
        Path, typer.Option(readable=False, help="Folder in a bpffs that keeps the ring alive while no agent runs.")
    ] = DEFAULT_ROOT,
    no_pin: Annotated[bool, typer.Option("--no-pin", help="Pin nothing: what happens while no agent runs is not captured.")] = False,
    unpin: Annotated[bool, typer.Option("--unpin", help="Remove this node's pins, which detaches the probe, and end.")] = False,
    ring_size: Annotated[str, typer.Option(help="The kernel's ring: a power of two; 128 bytes an event.")] = f"{DEFAULT_RING_BYTES >> 20}M",
    watched_max: Annotated[int, typer.Option(min=16, max=4_194_304, help="Most processes watched at once.")] = DEFAULT_WATCHED_MAX,
    nice: Annotated[int, typer.Option(min=-20, max=19, help="Priority for the CPU; a raise needs root or CAP_SYS_NICE.")] = DEFAULT_NICE,
    check: Annotated[bool, typer.Option("--check", help="Try each source on this machine, say what works and why not, and end.")] = False,
    json: Annotated[bool, typer.Option("--json", help="With --check: one JSON object a line.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")] = False,
) -> None:
    """Capture this node's process events and stream them to the broker.

    SIGTERM ends it and leaves the pinned probe at work, for the next agent to carry on where this one stopped. SIGINT
    (Ctrl-C) ends it and removes the pins.

    Exit status: 0 stopped, 2 usage or something missing on this machine, 4 not allowed to. Of --check: 0 if a source works, else 2.
    """
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, format="kmonitor-agent: %(message)s", stream=sys.stderr)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    raise_priority(nice)
    name = check_node_name(node or socket.gethostname())
    choice = check_source(source)
    given = check_scope(scope)
    if check:
        from kmonitor.agent.doctor import report  # noqa: PLC0415  # an agent that runs has no use for it

        raise typer.Exit(report(given, pin_root, json=json))
    scope = given or "host"
    pins = None if no_pin else PinFolder(pin_root, name, scope)
    options = ProbeOptions(scope=scope, ring_bytes=parse_ring_size(ring_size), watched_max=watched_max)
    labels = parse_labels(label or [])
    address = check_address(broker)
    with contextlib.ExitStack() as stack:
        folders: list[PinFolder] = []
        if pins is not None:
            for folder in (pins, *pins.others()):
                folder.open()
                stack.callback(folder.close)
                folders.append(folder)
            if unpin:
                _remove(folders)
                return
        opened: Source | None = None
        if folders and (found := _predecessors(folders)):
            opened = open_source(choice, options, None)  # before: a version that cannot capture here must not end one that does
            stack.callback(opened.close)
            identity = Identity(name, scope, labels)
            if signalled := _succeed(found, folders, address, identity):
                if signalled == "int":
                    _remove(folders)
                return
            if isinstance(opened, Probe):
                opened.pin(folders[0])
        if opened is None:
            opened = _open(choice, options, pins)
            stack.callback(opened.close)
        signalled = asyncio.run(_run(address, name, scope, labels, opened))
        if pins is not None and (signalled == "int" or not isinstance(opened, Probe)):
            pins.remove()


def _remove(folders: list[PinFolder]) -> None:
    for folder in folders:
        if folder.path.exists():
            folder.remove()


def _predecessors(folders: list[PinFolder]) -> list[Predecessor]:
    """What other versions have left. `folders` are open; the first is this version's."""
    own, *others = folders
    if not others and (not own.names() or is_current(own)):
        return []
    from kmonitor.agent.predecessor import find  # noqa: PLC0415  # with grpc; and rarely there is one

    return find(own, others)


def _succeed(found: list[Predecessor], folders: list[PinFolder], address: str, identity: Identity) -> Signalled | None:
    """Bring to the broker what they have recorded, and remove them; the signal that ended it, if one did."""
    from kmonitor.agent.predecessor import Draining, discard  # noqa: PLC0415

    try:
        for old in found:
            draining = Draining(address, identity, old)
            signalled = asyncio.run(_until_signal(draining))
            if not draining.drained:
                return signalled or "term"
            old.close()
            discard(old.pins, folders[0])
            log.info("the probe of the other version is replaced: all that it had recorded was delivered")
            if signalled is not None:
                return signalled
    finally:
        for old in found:
            old.close()
    return None


def _open(choice: SourceName | Literal["auto"], options: ProbeOptions, pins: PinFolder | None) -> Source:
    source = open_source(choice, options, pins)
    if source.adopted and isinstance(source, Probe):
        log.info(
            "carrying on with the pinned probe of source %s, %d bytes waiting", source.name, source.ring.producer - source.ring.consumer
        )
    return source


async def _run(address: str, node: str, scope: str, labels: dict[str, str], source: Source) -> Signalled:
    from kmonitor.agent.connection import Connection  # noqa: PLC0415  # grpc takes most of the start: the probe's errors come first

    return await _until_signal(Connection(address, Identity(node, scope, labels), source)) or "term"


async def _until_signal(uplink: Uplink) -> Signalled | None:
    """Run it; which signal ended it, if one did."""
    received: list[Signalled] = []

    def on_signal(which: Signalled) -> None:
        if received:  # a second one: do not wait for the broker
            os._exit(1)
        received.append(which)
        uplink.stop()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, on_signal, "term")
    loop.add_signal_handler(signal.SIGINT, on_signal, "int")
    await uplink.run()
    return received[0] if received else None


def main() -> None:
    """Entry point: errors are one line and an exit status."""
    try:
        app()
    except KmonitorError as error:
        print(f"kmonitor-agent: error: {error}", file=sys.stderr)
        if isinstance(error, BpfError) and error.log and logging.getLogger().isEnabledFor(logging.DEBUG):
            print(error.log, file=sys.stderr)
        raise SystemExit(error.exit_status) from None


if __name__ == "__main__":
    main()
