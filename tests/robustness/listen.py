# SPDX-License-Identifier: Apache-2.0
"""A monitor as one writes it that must not lose or repeat anything though it may be killed at any moment: a program.

    python -m tests.robustness.listen BROKER JOURNAL REGISTRATIONS [--pace N] [--window N] [--linger S]

It appends what it takes to the file JOURNAL, one JSON line for each batch or notice, each with the cursor behind it: what was done
with the events, and how far it came, are one write. Started again with the same journal it carries on there. REGISTRATIONS is a
JSON list of the arguments of `Monitor.register`.

On standard output it says a line for each line of the journal: notices as a whole, of events how many, and which processes ended;
`taken` events in all, and `counted` with those in gaps. `--pace` takes so many events a second, until a line comes on standard input;
`--window` is how many events the client library may read ahead; `--linger`, for how many seconds its place is kept when it was killed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from kmonitor.clients import Batch, BrokerUnreachableError, Cursor, Monitor, Notice, connect
from kmonitor.clients.cli.jsonlines import notice_line
from kmonitor.clients.stream import QUEUE_EVENTS
from kmonitor.v1 import events_pb2
from kmonitor.wire.masks import TYPE_NAMES, EventType

COLUMNS = ("position", "type", "pid", "code", "inferred", "time", "child")
"""Of a row of a batch's line: `code` is an exit code, or a signal's number, negative; null if neither is known."""

EXIT = int(EventType.PROCESS_EXIT)


class Journal:
    """What was taken so far."""

    def __init__(self, path: Path) -> None:
        self.cursor = Cursor()
        self.taken = 0
        self.lost = 0
        content = path.read_bytes() if path.exists() else b""
        # The last line may be half written: then it was not taken, and comes again.
        whole = content[: content.rfind(b"\n") + 1]
        for text in whole.splitlines():
            self._count(json.loads(text))
        if whole:
            self.cursor = Cursor.from_json(json.loads(whole.splitlines()[-1])["cursor"])
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._file, len(whole))
        os.lseek(self._file, 0, os.SEEK_END)

    def add(self, line: dict[str, Any]) -> None:
        """Take one line: from here on its content is done."""
        line["at"] = time.time_ns()
        line["cursor"] = self.cursor.to_json()
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        while data:
            data = data[os.write(self._file, data) :]
        self._count(line)

    def _count(self, line: dict[str, Any]) -> None:
        if line["kind"] == "events":
            # An end that was found was lost before, and is in a gap already.
            self.taken += sum(not row[4] for row in line["rows"])
        elif line["kind"] == "gap":
            self.lost += sum(each["count"] for each in line["lost"])

    def close(self) -> None:
        """Give the file back."""
        os.close(self._file)


def row(event: events_pb2.Event) -> tuple[object, ...]:
    """Of an event what an account needs."""
    code: int | None = None
    if event.HasField("exit_code"):
        code = event.exit_code
    elif event.HasField("exit_signal"):
        code = -event.exit_signal
    return event.position, TYPE_NAMES.get(event.type, "?"), event.pid, code, event.inferred, event.time, event.child_pid


class Listener:
    """Takes what comes."""

    def __init__(self, journal: Journal, pace: float) -> None:
        self._journal = journal
        self._pace = pace
        self._hurry = asyncio.Event()
        if not pace:
            self._hurry.set()

    def hurry(self) -> None:
        """There is a line, or the end, on standard input."""
        asyncio.get_running_loop().remove_reader(0)
        self._hurry.set()

    async def take(self, item: Batch | Notice) -> None:
        """Journal it, and say so."""
        cursor = self._journal.cursor
        if isinstance(item, Batch):
            for events in self._parts(item):
                if not self._hurry.is_set():
                    await self._rest(len(events))
                part = Batch(item.node, item.epoch, events, item.boot_id)
                cursor.take(part)
                self._journal.add(
                    {
                        "kind": "events",
                        "node": item.node,
                        "epoch": item.epoch,
                        "boot": item.boot_id,
                        "rows": [row(event) for event in events],
                    }
                )
                self._say(
                    {
                        "kind": "events",
                        "count": len(events),
                        "ends": [event.pid for event in events if event.type == EXIT],
                    }
                )
            return
        cursor.take(item)
        line: dict[str, Any] = json.loads(notice_line(item))
        self._journal.add(line)
        self._say(line)

    def _parts(self, batch: Batch) -> list[list[events_pb2.Event]]:
        """One by one if there is a pace: each is a thing of its own to such a monitor."""
        events = list(batch.events)
        return [events] if self._hurry.is_set() else [[event] for event in events]

    async def _rest(self, events: int) -> None:
        try:
            async with asyncio.timeout(events / self._pace):
                await self._hurry.wait()
        except TimeoutError:
            pass

    def _say(self, line: dict[str, Any]) -> None:
        print(json.dumps({**line, "taken": self._journal.taken, "counted": self._journal.taken + self._journal.lost}), flush=True)


async def connected(address: str, cursor: Cursor, window: int, linger: float) -> Monitor:
    """As soon as there is a broker."""
    while True:
        try:
            return await connect(address, cursor=cursor, linger=linger, queue_events=window).open()
        except BrokerUnreachableError:
            print(json.dumps({"kind": "unreachable"}), flush=True)


async def main(argv: list[str]) -> None:
    """Until it is killed, or terminated: then its registrations are given back."""
    parser = argparse.ArgumentParser()
    parser.add_argument("broker")
    parser.add_argument("journal", type=Path)
    parser.add_argument("registrations", type=json.loads)
    parser.add_argument("--pace", type=float, default=0)
    parser.add_argument("--window", type=int, default=QUEUE_EVENTS)
    parser.add_argument("--linger", type=float, default=60)
    options = parser.parse_args(argv)
    journal = Journal(options.journal)
    listener = Listener(journal, options.pace)
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    if options.pace:
        loop.add_reader(0, listener.hurry)
    try:
        async with await connected(options.broker, journal.cursor.copy(), options.window, options.linger) as monitor:
            asking = asyncio.ensure_future(monitor.register_all(options.registrations))
            asking.add_done_callback(lambda done: task.cancel() if not done.cancelled() and done.exception() else None)
            try:
                async for item in monitor.batches():
                    await listener.take(item)
            finally:
                if asking.done():
                    asking.result()  # a refusal is what ended it
    except asyncio.CancelledError:
        journal.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
