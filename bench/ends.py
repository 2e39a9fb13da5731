# SPDX-License-Identifier: Apache-2.0
"""Where events arrive: a monitor, and for comparison a listener on the proc connector. Each is a process of its own.

    python -m bench.ends monitor HOST:PORT
    python -m bench.ends connector

Both take a command a line and first say "armed" when what it asks for is; all latencies are in nanoseconds, from the kernel's
time in the event to the Python code that has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import socket
import struct
import sys
import time
from typing import Any

from bench.stack import NODE
from bench.worker import Commands, say
from kmonitor.agent.sources.proc_messages import EXIT, IGNORE, LISTEN, command
from kmonitor.clients import Event, Gap, Monitor, connect
from kmonitor.clients.events import Batch

_SETTLE_NS = 200_000_000
"""So much of a stream's beginning under load is not measured."""
_NETLINK_CONNECTOR = 11
_SO_RCVBUFFORCE = 33
_EVENT = struct.Struct("=IIQII")
"""Of a datagram's proc_event: what, CPU, monotonic nanoseconds, tid, tgid (include/uapi/linux/cn_proc.h)."""
_EVENT_AT = 36


async def _exits(monitor: Monitor, asked: Any) -> list[int]:
    """For {"exits": pids, "node_wide"}: latencies of their exits."""
    pids = set(asked["exits"])
    wanted: list[Any] = [{"node": NODE, "events": "exit"}]
    if not asked["node_wide"]:
        wanted = [{"node": NODE, "pid": pid, "events": "exit"} for pid in pids]
    registered = await monitor.register_all(wanted)
    say("armed")
    taken: list[int] = []
    async for notification in monitor:
        now = time.time_ns()
        if isinstance(notification, Event) and notification.pid in pids:
            taken.append(now - notification.time)
            pids.remove(notification.pid)
            if not pids:
                break
    if asked["node_wide"]:
        await monitor.deregister(registered[0])
    return taken


class _All:
    """Of {"all": true, "batches"}, until the next line: every event of the node, taken one by one or in batches."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.events = 0
        self.batches = 0
        self.lost = 0

    async def take(self, monitor: Monitor) -> None:
        after = time.time_ns() + _SETTLE_NS
        async for notification in monitor:
            now = time.time_ns()
            if isinstance(notification, Event):
                if notification.time > after:
                    self.taken.append(now - notification.time)
            elif isinstance(notification, Gap):
                self.lost += sum(count.count for count in notification.lost)

    async def take_batches(self, monitor: Monitor) -> None:
        after = time.time_ns() + _SETTLE_NS
        async for item in monitor.batches():
            if isinstance(item, Batch):
                if item.events[0].time > after:
                    self.events += len(item.events)
                    self.batches += 1
            elif isinstance(item, Gap):
                self.lost += sum(count.count for count in item.lost)

    async def run(self, monitor: Monitor, commands: Commands, *, batches: bool) -> dict[str, Any]:
        registration = await monitor.register(node=NODE, events="all")
        began = time.monotonic()
        taking = asyncio.create_task(self.take_batches(monitor) if batches else self.take(monitor))
        say("armed")
        await commands.next()
        seconds = time.monotonic() - began - _SETTLE_NS / 1e9
        taking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await taking
        await monitor.deregister(registration)
        return {
            "taken": self.taken,
            "events": self.events or len(self.taken),
            "batches": self.batches,
            "seconds": seconds,
            "lost": self.lost,
        }


async def _monitor(address: str) -> None:
    commands = await Commands.open()
    async with connect(address) as monitor:
        say("ready")
        while (asked := await commands.next()) is not None:
            if "exits" in asked:
                say(await _exits(monitor, asked))
            else:
                say(await _All().run(monitor, commands, batches=asked["batches"]))


def _connector() -> None:
    """For {"exits": pids}: latencies of their exits. It listens only meanwhile, and blocks in recv: nothing in Python is quicker."""
    say("ready")
    for line in sys.stdin:
        pids = set(json.loads(line)["exits"])
        with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_CONNECTOR) as listener:
            listener.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 4 << 20)
            listener.bind((0, 1))
            listener.send(command(LISTEN, 1))
            say("armed")
            taken: list[int] = []
            while pids:
                try:
                    message = listener.recv(4096)
                except OSError as error:
                    if error.errno == errno.ENOBUFS:
                        continue
                    raise
                now = time.monotonic_ns()
                what, _, at, _, tgid = _EVENT.unpack_from(message, _EVENT_AT)
                if what == EXIT and tgid in pids:
                    taken.append(now - at)
                    pids.remove(tgid)
            listener.send(command(IGNORE, 1))
        say(taken)


def main() -> None:
    """One of the two."""
    if sys.argv[1] == "monitor":
        asyncio.run(_monitor(sys.argv[2]))
    else:
        _connector()


if __name__ == "__main__":
    main()
