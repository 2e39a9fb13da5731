# SPDX-License-Identifier: Apache-2.0
"""The command kmonitor-broker."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import re
import signal
import sys
from typing import Annotated

import typer

from kmonitor.broker.broker import DEFAULT_LEASE, DEFAULT_PROGRESS_INTERVAL, Broker
from kmonitor.broker.log import DEFAULT_LOG_BYTES
from kmonitor.broker.log.memory import MemoryLog
from kmonitor.wire.errors import KmonitorError, UsageError
from kmonitor.wire.priority import DEFAULT_NICE, raise_priority

PROGRAM = "kmonitor-broker"
STOP_GRACE = 1.0  # seconds

logger = logging.getLogger(PROGRAM)

_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "": 1.0}
_UNITS_BYTES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def parse_duration(text: str) -> float:
    """Seconds, from "250ms", "3s", "1.5" or "2m". Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|)", text.strip())
    if found is None:
        raise UsageError(f"{text!r} is no duration: write 250ms, 3s or 2m")
    return float(found[1]) * _UNITS_S[found[2]]


def parse_bytes(text: str) -> int:
    """Bytes, from "256M", "64KiB" or "1000000". Raises UsageError."""
    found = re.fullmatch(r"(\d+)([kmg]?)(i?b)?", text.strip().lower())
    if found is None:
        raise UsageError(f"{text!r} is no size: write 256M, 64K or a number of bytes")
    return int(found[1]) * _UNITS_BYTES[found[2]]


def split_address(text: str) -> tuple[str, int]:
    """Host and port, from "127.0.0.1:7221", "[::1]:0" or "localhost:7221". Raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not re.fullmatch(r"\d{1,5}", port) or int(port) > 65535:
        raise UsageError(f"{text!r} is no address to listen on: write HOST:PORT, such as 127.0.0.1:7221")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to it."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


async def serve(listen: str, *, log_bytes: int, lease: float, progress_interval: float) -> None:
    """Run a broker until SIGTERM or SIGINT. Raises UsageError if it cannot listen."""
    # Not before `main` has set its environment, which gRPC reads when it is imported.
    from kmonitor.broker.server import Server  # noqa: PLC0415

    host, _ = split_address(listen)
    broker = Broker(MemoryLog(log_bytes), lease=lease, progress_interval=progress_interval)
    server = Server(broker)
    port = await server.start(listen)
    if not is_loopback(host):
        logger.warning("listening on %s without TLS: whoever reaches this port can watch every node", host)
    stopping = asyncio.Event()

    def stop() -> None:
        if stopping.is_set():
            os._exit(130)  # asked twice: at once
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    print(f"{PROGRAM}: listening on {host}:{port}", flush=True)
    await stopping.wait()
    logger.info("stopping")
    await server.stop(STOP_GRACE)


def run(
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where to listen; port 0 takes a free one.")] = "127.0.0.1:7221",
    log: Annotated[str, typer.Option(metavar="memory", help="Where events are kept for monitors that fall behind.")] = "memory",
    log_bytes: Annotated[str, typer.Option(metavar="SIZE", help="How much of them: 256M, 64K.")] = f"{DEFAULT_LOG_BYTES >> 20}M",
    lease: Annotated[
        str, typer.Option(metavar="TIME", help="A node is unreachable when its agent says nothing for so long.")
    ] = f"{DEFAULT_LEASE:g}s",
    progress_interval: Annotated[
        str, typer.Option(metavar="TIME", help="How often monitors are told how far the stream is complete.")
    ] = f"{DEFAULT_PROGRESS_INTERVAL:g}s",
    nice: Annotated[int, typer.Option(min=-20, max=19, help="Priority for the CPU; a raise needs root or CAP_SYS_NICE.")] = DEFAULT_NICE,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say on stderr what happens.")] = False,
) -> None:
    """Take process events from agents, and give them to the monitors that registered for them."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO if verbose else logging.WARNING, format=f"{PROGRAM}: %(levelname)s: %(message)s"
    )
    raise_priority(nice)
    try:
        if log != "memory":
            if log.startswith(("sqlite:", "nats:")):
                raise UsageError(f"--log {log}: not in this version; use --log memory")
            raise UsageError(f"--log {log}: unknown; use --log memory")
        seconds, interval, size = parse_duration(lease), parse_duration(progress_interval), parse_bytes(log_bytes)
        if not 0.25 <= seconds <= 3600:
            raise UsageError(f"--lease {lease}: give 250ms to 60m")
        if not 0.01 <= interval <= 3600:
            raise UsageError(f"--progress-interval {progress_interval}: give 10ms to 60m")
        if size < 1 << 20:
            raise UsageError(f"--log-bytes {log_bytes}: give at least 1M")
        asyncio.run(serve(listen, log_bytes=size, lease=seconds, progress_interval=interval))
    except KmonitorError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_status) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def main() -> None:
    """Entry point."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's core has its own lines for what we say in ours
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(run)
    app(prog_name=PROGRAM)


if __name__ == "__main__":
    main()
