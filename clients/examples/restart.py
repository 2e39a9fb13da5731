# SPDX-License-Identifier: Apache-2.0
"""Starts a daemon again when it has died, wherever it runs.

    restart.py --node web1 --pidfile /run/x.pid -- ssh web1 systemctl restart x
    restart.py --node web1 --unit x.service --most 3 -- ssh web1 systemctl restart x

The command is to start it, and to end. It is run when the process has ended, or is not there at the start; after one second, then two,
four and so on, since who dies at once when it is started dies again. After `--most` times in a row it gives up, with status 1.

It does nothing while it cannot see: a node that is not heard may be well. For a program that fails over this is the place to fence.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from dataclasses import dataclass

from kmonitor.clients import Life, ProcessGuard, Subject, Verdict, connect
from kmonitor.wire.errors import KmonitorError

LONGEST_DELAY_S = 60.0


@dataclass(frozen=True, slots=True)
class Terms:
    """When to start it again, and when to give up. Times in seconds."""

    command: list[str]
    most: int
    delay: float
    """Before the first attempt; twice as long before each further one."""
    settled: float
    """Who has lived for so long has been started well."""
    limit: float
    """For the command, and then for the process to be there."""


def say(text: str) -> None:
    """A line for the journal."""
    print(f"restart: {text}", file=sys.stderr, flush=True)


def gone(verdict: Verdict) -> bool:
    """It is not there, and that is known."""
    return verdict.life in (Life.DEAD, Life.ABSENT)


def tell(verdict: Verdict) -> None:
    """What has become known."""
    what = verdict.life.value
    if verdict.process is not None:
        what += f", pid {verdict.process.pid}"
    if verdict.life is Life.DEAD:
        what += f": {verdict.death}"
    if verdict.reason:
        what += f" ({verdict.reason})"
    say(f"{verdict.subject.name} on {verdict.subject.node}: {what}")


class Supervisor:
    """Of one subject, which is all that its guard has."""

    def __init__(self, guard: ProcessGuard, name: str, terms: Terms) -> None:
        self._guard = guard
        self._name = name
        self._terms = terms
        self._alive_since = 0

    async def run(self) -> int:
        """Until it has to give up: the exit status."""
        in_a_row = 0
        while True:
            verdict = await self._next()
            if not gone(verdict) or verdict.blind is not None:
                continue
            if self._alive_since and verdict.since_unix_nano - self._alive_since > self._terms.settled * 1e9:
                in_a_row = 0
            while gone(self._guard.verdict(self._name)):
                in_a_row += 1
                if in_a_row > self._terms.most:
                    say(f"{self._name} was started {self._terms.most} times in a row: giving up")
                    return 1
                await asyncio.sleep(min(LONGEST_DELAY_S, self._terms.delay * 2 ** (in_a_row - 1)))
                if gone(self._guard.verdict(self._name)):  # else somebody else was faster
                    await self._start()

    async def _next(self) -> Verdict:
        verdict = await anext(self._guard)
        tell(verdict)
        if verdict.life is Life.ALIVE and verdict.blind is None:
            self._alive_since = verdict.since_unix_nano
        return verdict

    async def _start(self) -> None:
        """Run the command, and wait until it has worked, or does not seem to."""
        say(f"running {' '.join(self._terms.command)}")
        process = await asyncio.create_subprocess_exec(*self._terms.command, stdin=asyncio.subprocess.DEVNULL)
        try:
            async with asyncio.timeout(self._terms.limit):
                if status := await process.wait():
                    say(f"the command ended with status {status}")
                while (await self._next()).life is not Life.ALIVE:
                    pass
        except TimeoutError:
            say(f"{self._name} is not there after {self._terms.limit:g} s")
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()


async def run(broker: str | None, subject: Subject, terms: Terms) -> int:
    """Connect, and go on until SIGTERM or Ctrl-C."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        async with connect(broker) as monitor, ProcessGuard(monitor) as guard:
            await guard.add(subject)
            return await Supervisor(guard, subject.name, terms).run()
    except asyncio.CancelledError:
        return 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", help="HOST:PORT; else KMONITOR_BROKER")
    parser.add_argument("--node", required=True)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--pidfile")
    which.add_argument("--unit")
    parser.add_argument("--most", type=int, default=5, help="starts in a row (default %(default)s)")
    parser.add_argument("--delay", type=float, default=1.0, metavar="S", help="before the first one (default %(default)s)")
    parser.add_argument("--settled", type=float, default=60.0, metavar="S", help="who lives so long was started well (default %(default)s)")
    parser.add_argument("--limit", type=float, default=30.0, metavar="S", help="for a start (default %(default)s)")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()
    subject = Subject(given.pidfile or given.unit, given.node, pidfile=given.pidfile, unit=given.unit)
    terms = Terms(given.command, given.most, given.delay, given.settled, given.limit)
    try:
        return asyncio.run(run(given.broker, subject, terms))
    except KmonitorError as error:
        say(str(error))
        return error.exit_status
    except OSError as error:
        say(f"{given.command[0]}: {error.strerror}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
