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
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's core has its own lines for what we say in ours
# numpy's linear algebra, which nothing here uses, starts a thread for each CPU and gives it memory when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from kmonitor.broker.broker import DEFAULT_LEASE, DEFAULT_LINGER, DEFAULT_PROGRESS_INTERVAL, LINGER_MOST, PROGRESS_MOST, Broker
from kmonitor.broker.file_limit import watch_file_limit
from kmonitor.broker.idle import IdleLoop
from kmonitor.broker.log import DEFAULT_LOG_BYTES, EventLog
from kmonitor.broker.log.memory import MemoryLog
from kmonitor.broker.log.sqlite import DEFAULT_FILE_BYTES, SqliteLog
from kmonitor.wire.descriptors import raise_file_limit
from kmonitor.wire.durations import parse_duration
from kmonitor.wire.errors import KmonitorError, UsageError
from kmonitor.wire.options import Parser
from kmonitor.wire.priority import DEFAULT_NICE, raise_priority
from kmonitor.wire.saying import outlive_stderr, outlive_stdout, say

PROGRAM = "kmonitor-broker"
STOP_GRACE = 1.0  # seconds
DRAIN = 4.0
"""Seconds, at most, for what is under way when the broker is asked to stop."""
_FILE = "broker.sqlite"
_AGE_MOST = 3650 * 86400  # seconds

logger = logging.getLogger(PROGRAM)

_UNITS_BYTES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_bytes(text: str) -> int:
    """Bytes, from "256M", "64KiB" or "1000000". Raises UsageError."""
    found = re.fullmatch(r"(\d+)([kmgt]?)(i?b)?", text.strip().lower())
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


def state_path() -> Path:
    """Where the log lies if nothing else is said: in the folder that systemd gives, that of the system's services, or the user's own."""
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0], _FILE)
    if os.geteuid() == 0:
        return Path("/var/lib/kmonitor", _FILE)
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state", "kmonitor", _FILE)


@dataclass(frozen=True, slots=True)
class LogOptions:
    """Which log, and how much it keeps."""

    path: Path | None
    """None is memory."""
    max_bytes: int
    max_age_s: float | None

    @classmethod
    def parse(cls, log: str, size: str | None, age: str | None) -> LogOptions:
        """From the command line. Raises UsageError."""
        kind, _, where = log.partition(":")
        if kind == "nats":
            raise UsageError(f"--log {log}: not in this version; use --log sqlite:PATH or --log memory")
        if kind not in {"sqlite", "memory"} or (kind == "memory" and where):
            raise UsageError(f"--log {log}: unknown; use --log sqlite, --log sqlite:PATH or --log memory")
        if age is not None and kind == "memory":
            raise UsageError("--log-age: the log in memory is bounded by --log-bytes alone")
        path = None if kind == "memory" else Path(where) if where else state_path()
        most = (DEFAULT_LOG_BYTES if path is None else DEFAULT_FILE_BYTES) if size is None else parse_bytes(size)
        if most < 1 << 20:
            raise UsageError(f"--log-bytes {size}: give at least 1M")
        seconds = None if age is None else parse_duration(age)
        if seconds is not None and not 1 <= seconds <= _AGE_MOST:
            raise UsageError(f"--log-age {age}: give 1s to {_AGE_MOST // 86400}d")
        return cls(path, most, seconds)

    def open(self) -> EventLog:
        """On a running event loop. Raises UsageError."""
        if self.path is None:
            return MemoryLog(self.max_bytes)
        return SqliteLog(self.path, max_bytes=self.max_bytes, max_age_s=self.max_age_s)


async def serve(listen: str, options: LogOptions, *, lease: float, progress_interval: float, linger: float) -> None:
    """Run a broker until SIGTERM or SIGINT. Raises UsageError if it cannot listen, or use its log."""
    # Not sooner: an option that is wrong is told at once.
    from kmonitor.broker.server import Server  # noqa: PLC0415

    host, _ = split_address(listen)
    stopping = asyncio.Event()

    def stop() -> None:
        if stopping.is_set():
            os._exit(130)  # asked twice: at once
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)  # first: a start that is cut off ends in order too
    files = raise_file_limit()
    log = options.open()
    try:
        broker = Broker(log, lease=lease, progress_interval=progress_interval, linger=linger)
        server = Server(broker)
        port = await server.start(listen)
        if not is_loopback(host):
            logger.warning("listening on %s without TLS: whoever reaches this port can watch every node", host)
        say(f"{PROGRAM}: listening on {host}:{port}")
        watching = asyncio.ensure_future(watch_file_limit(files))
        await stopping.wait()
        watching.cancel()
        say(f"{PROGRAM}: stopping; a second signal ends it at once")
        await server.stop(STOP_GRACE, drain=DRAIN)
    finally:
        await log.close()


def parser() -> Parser:
    """The options of `run`, by the same names."""
    made = Parser(PROGRAM, "Take process events from agents, and give them to the monitors that registered for them.")
    made.add_argument(
        "--listen", metavar="HOST:PORT", default="127.0.0.1:7221", help="Where to listen; port 0 takes a free one.  [default: %(default)s]"
    )
    made.add_argument(
        "--log",
        metavar="sqlite[:PATH]|memory",
        default="sqlite",
        help="Where events are kept for monitors that fall behind or come back. In a file they outlive the broker; without a path it "
        "lies in $STATE_DIRECTORY, /var/lib/kmonitor (root) or ~/.local/state/kmonitor.  [default: %(default)s]",
    )
    made.add_argument("--log-bytes", metavar="SIZE", help="How much of them: 256M, 2G.  [default: 1G in a file, 256M in memory]")
    made.add_argument("--log-age", metavar="TIME", help="For how long, in a file: 12h, 7d.  [default: as --log-bytes allows]")
    made.add_argument(
        "--lease",
        metavar="TIME",
        default=f"{DEFAULT_LEASE:g}s",
        help="A node is unreachable when its agent says nothing for so long.  [default: %(default)s]",
    )
    made.add_argument(
        "--progress-interval",
        metavar="TIME",
        default=f"{DEFAULT_PROGRESS_INTERVAL:g}s",
        help="How often monitors are told how far the stream is complete.  [default: %(default)s]",
    )
    made.add_argument(
        "--linger",
        metavar="TIME",
        default=f"{DEFAULT_LINGER:g}s",
        help="For so long a stream that broke can be taken up again, if its monitor asks for no other time; 0s is never.  "
        "[default: %(default)s]",
    )
    made.add_nice(DEFAULT_NICE)
    made.add_argument("--verbose", "-v", action="store_true", help="Say on stderr what happens.")
    return made


def run(
    *,
    listen: str,
    log: str,
    log_bytes: str | None,
    log_age: str | None,
    lease: str,
    progress_interval: str,
    linger: str,
    nice: int,
    verbose: bool,
) -> None:
    """Run it with the options of `parser`. Raises KmonitorError."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO if verbose else logging.WARNING, format=f"{PROGRAM}: %(levelname)s: %(message)s"
    )
    raise_priority(nice)
    options = LogOptions.parse(log, log_bytes, log_age)
    seconds, interval, lingering = parse_duration(lease), parse_duration(progress_interval), parse_duration(linger)
    if not 0.25 <= seconds <= 3600:
        raise UsageError(f"--lease {lease}: give 250ms to 60m")
    if not 0.01 <= interval <= PROGRESS_MOST:
        raise UsageError(f"--progress-interval {progress_interval}: give 10ms to {PROGRESS_MOST:g}s")
    if lingering > LINGER_MOST:
        raise UsageError(f"--linger {linger}: give 0s to {LINGER_MOST // 60}m")
    with asyncio.Runner(loop_factory=IdleLoop) as runner:
        runner.run(serve(listen, options, lease=seconds, progress_interval=interval, linger=lingering))


def main() -> None:
    """Entry point: errors are one line and an exit status."""
    outlive_stderr()
    outlive_stdout()
    try:
        run(**parser().parse())
    except KmonitorError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_status) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
