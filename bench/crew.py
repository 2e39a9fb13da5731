# SPDX-License-Identifier: Apache-2.0
"""Processes that do a part of a measurement: each obeys lines of JSON, and answers each with one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, NoReturn

CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a connection for each, as if each were a process
]
_ROOT = Path(__file__).parent.parent


class Worker:
    """The side that says what to do."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid

    def do(self, **command: Any) -> dict[str, Any]:
        """Its answer. If it gives none it has said why on stderr: raises SystemExit."""
        self.tell(**command)
        return self.answer()

    def tell(self, **command: Any) -> None:
        """Without waiting for the answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()

    def hold(self) -> None:
        """Let it do nothing more, not even complain that the other ends of its connections go."""
        self._process.send_signal(signal.SIGSTOP)

    def answer(self) -> dict[str, Any]:
        """To what it was told."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("bench: a process of the measurement has ended; see above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def worker(module: str, *arguments: str) -> Iterator[Worker]:
    """`python -m module arguments` for the time of the context."""
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
        env={**os.environ, "GRPC_VERBOSITY": "NONE"},
    ) as process:
        try:
            yield Worker(process)
        finally:
            process.kill()  # it holds nothing but connections
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # what it was told last and did not read
                process.stdin.close()


async def obey(do: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]) -> None:
    """The other side: until the end of standard input."""
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await do(json.loads(line))), flush=True)


def spawn(job: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task that ends the process if it fails."""
    task = asyncio.create_task(job)
    task.add_done_callback(_look)
    return task


def give_up(why: str) -> NoReturn:
    """End this process with one line: a measurement that went wrong says nothing."""
    print(f"bench: {why}", file=sys.stderr, flush=True)
    os._exit(1)


def _look(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        give_up(f"{type(error).__name__}: {error}")


class Clock:
    """The CPU time of a process, all its threads, since this was made: nanoseconds exactly, not ticks."""

    def __init__(self, pid: int) -> None:
        self._clock = ~pid << 3 | 2  # clock_getcpuclockid(3): CPUCLOCK_SCHED
        self._began = time.clock_gettime_ns(self._clock)

    def ns(self) -> int:
        """So far."""
        return time.clock_gettime_ns(self._clock) - self._began
