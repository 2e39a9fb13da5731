# SPDX-License-Identifier: Apache-2.0
"""Posts each death of some processes to a URL, as JSON.

    webhook.py --url https://hooks.example/deaths --watch web1 unit nginx.service --watch web2 pidfile /run/x.pid --watch db1 pid 4711

A receiver that is slow or away holds up nothing: what is to be posted waits in a queue, for `--queue` deaths, and each is tried `--tries`
times. What is dropped then is said, with what it was: never in silence.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from kmonitor.clients import Life, ProcessGuard, Subject, Verdict, connect
from kmonitor.wire.errors import KmonitorError, UsageError

KINDS = ("pid", "pidfile", "unit", "cgroup")
POST_LIMIT_S = 5.0
LAST_LIMIT_S = 10.0
"""For what still waits when it is ended."""


def say(text: str) -> None:
    """A line for the journal."""
    print(f"webhook: {text}", file=sys.stderr, flush=True)


def body(verdict: Verdict) -> dict[str, Any]:
    """What is posted. Times are Unix nanoseconds."""
    death = verdict.death
    assert death is not None
    by = death.killed_by
    return {
        "subject": verdict.subject.name,
        "node": verdict.subject.node,
        "boot_id": death.process.boot_id,
        "pid": death.process.pid,
        "start_time": death.process.start_time,
        "comm": death.comm,
        "time": death.time_unix_nano,
        "text": str(death),
        "failed": death.failed,
        "certainty": verdict.certainty.value,
        "exit_code": death.exit_code,
        "exit_signal": death.exit_signal,
        "core_dumped": death.core_dumped,
        "oom_killed": death.oom_killed,
        "killed_by": None if by is None else {"pid": by.pid, "comm": by.comm, "uid": by.uid},
    }


@dataclass(frozen=True, slots=True)
class Hook:
    """Where to, and how often to try. `pause`: seconds before the second try, twice as long before each further one."""

    url: str
    tries: int
    pause: float

    async def deliver(self, content: dict[str, Any]) -> str:
        """Post it; what went wrong at the last try, or nothing."""
        wrong = ""
        for turn in range(self.tries):
            if turn:
                await asyncio.sleep(self.pause * 2 ** (turn - 1))
            # In a thread: urllib waits.
            wrong = await asyncio.to_thread(self._post, json.dumps(content).encode())
            if not wrong:
                break
        return wrong

    def _post(self, content: bytes) -> str:
        request = urllib.request.Request(self.url, content, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=POST_LIMIT_S):
                return ""
        except urllib.error.HTTPError as error:
            with error:
                return f"status {error.code}"
        except (OSError, ValueError) as error:
            return str(getattr(error, "reason", error))


async def post_all(queue: asyncio.Queue[dict[str, Any]], hook: Hook) -> None:
    """One after the other, for ever: the receiver gets them in order."""
    while True:
        content = await queue.get()
        if wrong := await hook.deliver(content):
            drop(content, f"{hook.url}: {wrong}, {hook.tries} times")
        queue.task_done()


def drop(content: dict[str, Any], why: str) -> None:
    """Nobody will be told of this one."""
    say(f"dropped {content['subject']}, {content['comm']} ({content['pid']}), {content['text']}: {why}")


async def watch(guard: ProcessGuard, queue: asyncio.Queue[dict[str, Any]]) -> None:
    """Put each death into the queue."""
    told: dict[str, object] = {}
    async for verdict in guard:
        if verdict.blind is not None:
            say(f"{verdict.subject.name}: blind ({verdict.blind.value}): {verdict.reason}")
        if verdict.life is not Life.DEAD or verdict.death is None or told.get(verdict.subject.name) == verdict.death.process:
            continue
        told[verdict.subject.name] = verdict.death.process  # a verdict that changes in something else is no second death
        try:
            queue.put_nowait(body(verdict))
        except asyncio.QueueFull:
            drop(body(verdict), f"{queue.maxsize} wait already")


async def run(broker: str | None, subjects: list[Subject], hook: Hook, queue_size: int) -> int:
    """Connect, and go on until SIGTERM or Ctrl-C; what waits then has LAST_LIMIT_S to be posted."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(queue_size)
    posting = asyncio.create_task(post_all(queue, hook))
    try:
        async with connect(broker) as monitor, ProcessGuard(monitor) as guard:
            await guard.add(*subjects)
            say(f"watching {len(subjects)} subjects")
            await watch(guard, queue)
    except asyncio.CancelledError:
        task.uncancel()
    finally:
        try:
            async with asyncio.timeout(LAST_LIMIT_S):
                await queue.join()
        except TimeoutError:
            say(f"ended with a death that is not posted, and {queue.qsize()} more behind it")
            while not queue.empty():
                drop(queue.get_nowait(), "ended")
        posting.cancel()
        await asyncio.gather(posting, return_exceptions=True)
    return 0


def subject(node: str, kind: str, value: str) -> Subject:
    """Of one --watch. Raises UsageError."""
    if kind not in KINDS or (kind == "pid" and not value.isdecimal()):
        raise UsageError(f"--watch {node} {kind} {value}: give a node, one of {', '.join(KINDS)}, and which")
    which: dict[str, Any] = {kind: int(value) if kind == "pid" else value}
    return Subject(f"{kind} {value} on {node}", node, **which)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", help="HOST:PORT; else KMONITOR_BROKER")
    parser.add_argument("--url", required=True)
    parser.add_argument("--watch", nargs=3, action="append", required=True, metavar=("NODE", "KIND", "WHICH"))
    parser.add_argument("--tries", type=int, default=4, help="for each death (default %(default)s)")
    parser.add_argument("--pause", type=float, default=0.5, metavar="S", help="before the second try (default %(default)s)")
    parser.add_argument("--queue", type=int, default=1000, help="deaths that may wait (default %(default)s)")
    given = parser.parse_args()
    try:
        if not given.url.startswith(("http://", "https://")):
            raise UsageError(f"--url {given.url}: give one that begins with http:// or https://")
        subjects = [subject(*each) for each in given.watch]
        return asyncio.run(run(given.broker, subjects, Hook(given.url, max(1, given.tries), given.pause), max(1, given.queue)))
    except KmonitorError as error:
        say(str(error))
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
