# SPDX-License-Identifier: Apache-2.0
"""The command kmonitor-agent."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # C-core's own lines on stderr would be nobody's
# numpy's linear algebra, which nothing here uses, starts a thread for each CPU and gives it memory when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from kmonitor.agent.capabilities import missing
from kmonitor.agent.errors import BpfError
from kmonitor.agent.identity import Identity
from kmonitor.agent.pace import GATHER_S
from kmonitor.agent.pins import DEFAULT_ROOT, PinFolder, UnusableFolderError
from kmonitor.agent.probe import DEFAULT_RING_BYTES, DEFAULT_WATCHED_MAX, Probe, ProbeOptions, can_adopt
from kmonitor.agent.source import Source
from kmonitor.agent.sources import SOURCES, SourceName, open_source
from kmonitor.wire.durations import parse_duration
from kmonitor.wire.errors import KmonitorError, UsageError
from kmonitor.wire.labels import parse_labels
from kmonitor.wire.options import Parser, number
from kmonitor.wire.priority import DEFAULT_NICE, raise_priority
from kmonitor.wire.saying import outlive_stderr, outlive_stdout, say
from kmonitor.wire.selectors import DEFAULT_ADDRESS, check_address, check_agent_name, check_labels

if TYPE_CHECKING:
    from kmonitor.agent.predecessor import Predecessor

log = logging.getLogger("kmonitor-agent")

PROGRAM = "kmonitor-agent"
_DESCRIPTION = """\
Capture this node's process events and stream them to the broker.

SIGTERM ends it and leaves the pinned probe at work, for the next agent to
carry on where this one stopped. SIGINT (Ctrl-C) ends it and removes the pins.

Exit status: 0 stopped, 2 usage or something missing on this machine, 4 not
allowed to. Of --check: 0 if a source works, else 2."""
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_GATHER_MOST_S = 1.0
_SCOPES = ("host", "pidns")
_RING_LEAST = 64 << 10
_RING_MOST = 1 << 30


def parse_ring_size(text: str) -> int:
    """Bytes from "16M"; a power of two, as the kernel wants it. Raises UsageError."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text.upper())
    size = int(match[1]) * _UNITS[match[2]] if match else 0
    if not _RING_LEAST <= size <= _RING_MOST or size & (size - 1):
        raise UsageError(f"ring size {text!r}: give a power of two from 64K to 1G, such as 16M")
    return size


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


def parser() -> Parser:
    """The options of `agent`, by the same names."""
    made = Parser(PROGRAM, _DESCRIPTION)
    made.add_argument(
        "--broker",
        metavar="HOST:PORT",
        default=os.environ.get("KMONITOR_BROKER") or DEFAULT_ADDRESS,
        help=f"Where the broker listens.  [env var: KMONITOR_BROKER]  [default: {DEFAULT_ADDRESS}]",
    )
    made.add_argument("--node", metavar="NAME", default=None, help="This node's name in the cluster.  [default: the host's name]")
    made.add_argument("--source", metavar="NAME", default="auto", help="What captures: auto, core, bcc or netlink.  [default: %(default)s]")
    made.add_argument(
        "--scope",
        metavar="NAME",
        default="",
        help="host: all processes. pidns: those of this pid namespace and below.  [default: host]",
    )
    made.add_argument("--label", metavar="NAME=VALUE", action="append", default=[], help="For selecting nodes; repeatable.")
    made.add_argument(
        "--pin-root",
        metavar="FOLDER",
        type=Path,
        default=DEFAULT_ROOT,
        help="Folder in a bpffs that keeps the ring alive while no agent runs.  [default: %(default)s]",
    )
    made.add_argument("--no-pin", action="store_true", help="Pin nothing: what happens while no agent runs is not captured.")
    made.add_argument(
        "--unpin", action="store_true", help="Remove this node's pins (of --scope, or of both), which detaches the probe, and end."
    )
    made.add_argument(
        "--ring-size",
        metavar="SIZE",
        default=f"{DEFAULT_RING_BYTES >> 20}M",
        help="The kernel's ring: a power of two; 128 bytes an event.  [default: %(default)s]",
    )
    made.add_argument(
        "--watched-max",
        metavar="NUMBER",
        type=number(16, 4_194_304),
        default=DEFAULT_WATCHED_MAX,
        help="Most processes watched at once, 16 to 4194304.  [default: %(default)s]",
    )
    made.add_argument(
        "--gather",
        metavar="TIME",
        default=f"{GATHER_S * 1000:g}ms",
        help="So long, at most, events wait for each other while many come; exits of watched processes do not wait. 0s: "
        "nothing does.  [default: %(default)s]",
    )
    made.add_nice(DEFAULT_NICE)
    made.add_argument("--check", action="store_true", help="Try each source on this machine, say what works and why not, and end.")
    made.add_argument("--json", action="store_true", help="With --check: one JSON object a line.")
    made.add_argument("--verbose", "-v", action="store_true", help="Say more on stderr.")
    return made


def agent(
    *,
    broker: str,
    node: str | None,
    source: str,
    scope: str,
    label: list[str],
    pin_root: Path,
    no_pin: bool,
    unpin: bool,
    ring_size: str,
    watched_max: int,
    gather: str,
    nice: int,
    check: bool,
    json: bool,
    verbose: bool,
) -> int:
    """Run it with the options of `parser`: the exit status. Raises KmonitorError."""
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, format="kmonitor-agent: %(message)s", stream=sys.stderr)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    raise_priority(nice)
    name = check_agent_name(socket.gethostname() if node is None else node)
    choice = check_source(source)
    given = check_scope(scope)
    if check:
        from kmonitor.agent.doctor import report  # noqa: PLC0415  # an agent that runs has no use for it

        return _print_all(lambda: report(given, pin_root, json=json))
    outlive_stdout()
    scope = given or "host"
    pins = None if no_pin else PinFolder(pin_root, name, scope)
    options = ProbeOptions(scope=scope, ring_bytes=parse_ring_size(ring_size), watched_max=watched_max)
    labels = parse_labels(label)
    check_labels(labels)
    gather_s = parse_duration(gather)
    if gather_s > _GATHER_MOST_S:
        raise UsageError(f"--gather {gather}: give 0s to {_GATHER_MOST_S:g}s")
    address = check_address(broker)
    if unpin:
        _unpin([] if no_pin else [PinFolder(pin_root, name, each) for each in ([given] if given else _SCOPES)])
        return 0
    with contextlib.ExitStack() as stack:
        folders: list[PinFolder] = []
        cannot_pin: UnusableFolderError | None = None
        if pins is not None:
            try:
                for folder in (pins, *pins.others()):
                    folder.open()
                    stack.callback(folder.close)
                    stack.callback(folder.remove_if_empty)
                    folders.append(folder)
            except UnusableFolderError as error:
                if choice not in ("auto", "netlink") or (choice == "auto" and not missing("CAP_BPF", "CAP_PERFMON")):
                    raise  # the probe would work, and needs them
                cannot_pin, pins = error, None
        stack.callback(_remove_if_interrupted, folders)
        opened: Source | None = None
        if folders and (found := _predecessors(folders, choice)):
            opened = open_source(choice, options, None)  # before: a version that cannot capture here must not end one that does
            stack.callback(opened.close)
            identity = Identity(name, scope, labels)
            from kmonitor.agent import service  # noqa: PLC0415

            if signalled := service.succeed(found, folders, address, identity):
                if signalled == "int":
                    _remove(folders)
                return 0
            if isinstance(opened, Probe):
                opened.pin(folders[0])
        if opened is None:
            # The kernel verifies the probe on one CPU, and imports take another: neither holds Python's lock for long.
            # What asyncio starts threads with is imported here: when the first is wanted there may be no descriptor left, and while the
            # interpreter ends that thread could not.
            import concurrent.futures.thread  # noqa: F401, PLC0415

            threading.Thread(target=_import_service, name="import").start()
            opened = _open(choice, options, pins)
            stack.callback(opened.close)
            if cannot_pin is not None and isinstance(opened, Probe):
                raise cannot_pin  # a source without a ring in the kernel has nothing to pin
        from kmonitor.agent import service  # noqa: PLC0415  # waits for the import, if it has yet to end

        def give_up() -> None:
            # Nobody has a use for what this one made: a probe that was there before may hold what is still to be delivered.
            if pins is not None and not opened.adopted:
                pins.remove()

        if _ending:
            raise SystemExit(128 + _ending[0])
        signalled = service.run(address, Identity(name, scope, labels), opened, gather_s, give_up)
        if pins is not None and (signalled == "int" or not isinstance(opened, Probe)):
            pins.remove()
    return 0


def _import_service() -> None:
    # asyncio takes ssl only if there is one, and it is 4 MB; this agent's transport is gRPC, which has its own.
    if without := "ssl" not in sys.modules:
        sys.modules["ssl"] = None  # type: ignore[assignment]  # as the import system has it: not to be found
    try:
        import asyncio  # noqa: F401, PLC0415
    finally:
        if without:
            del sys.modules["ssl"]
    import kmonitor.agent.service  # noqa: F401, PLC0415


def _unpin(scopes: list[PinFolder]) -> None:
    """Remove a node's pins of all versions, and print what was there."""
    removed = 0
    for folder in (each for pins in scopes for each in (pins, *pins.others())):
        if folder.open_to_remove():
            folder.remove()
            folder.close()
            removed += 1
            say(f"{PROGRAM}: removed {folder.path}")
    if not removed:
        say(f"{PROGRAM}: there are no such pins: nothing to remove")


def _remove_if_interrupted(folders: list[PinFolder]) -> None:
    """SIGINT removes the pins, also of a start that has just made them."""
    if signal.SIGINT in _ending:
        _remove(folders)


def _remove(folders: list[PinFolder]) -> None:
    for folder in folders:
        if folder.path.exists():
            folder.remove()


def _predecessors(folders: list[PinFolder], choice: str) -> list[Predecessor]:
    """What other versions and other sources have left. `folders` are open; the first is this version's."""
    own, *others = folders
    if not others and (not own.names() or can_adopt(own, choice)):
        return []
    from kmonitor.agent.predecessor import find  # noqa: PLC0415  # with grpc; and rarely there is one

    return find(own, others, choice)


def _open(choice: SourceName | Literal["auto"], options: ProbeOptions, pins: PinFolder | None) -> Source:
    source = open_source(choice, options, pins)
    if source.adopted and isinstance(source, Probe):
        log.info(
            "carrying on with the pinned probe of source %s, %d bytes waiting", source.name, source.ring.producer - source.ring.consumer
        )
    return source


def _print_all(work: Callable[[], int]) -> int:
    """Return what `work` returns, which is done for what it prints. Raises KmonitorError if that cannot be written."""
    try:
        status = work()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has had enough
        status = 0
    except OSError as error:
        outlive_stdout()
        raise KmonitorError(f"cannot write to standard output: {error.strerror}") from None
    outlive_stdout()  # the interpreter's last flush
    return status


_ending: list[int] = []
"""The signals that came before there was an event loop to take them."""


def _end(number: int, _: FrameType | None) -> None:
    _ending.append(number)
    raise SystemExit(128 + number)  # which a callback of libbpf's swallows: see `agent`


def main() -> None:
    """Entry point: errors are one line and an exit status."""
    outlive_stderr()
    for each in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, _end)  # what it has made so far is removed
    try:
        raise SystemExit(agent(**parser().parse()))
    except KmonitorError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        if isinstance(error, BpfError) and error.log and logging.getLogger().isEnabledFor(logging.DEBUG):
            print(error.log, file=sys.stderr)
        raise SystemExit(error.exit_status) from None


if __name__ == "__main__":
    main()
