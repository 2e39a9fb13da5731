# SPDX-License-Identifier: Apache-2.0
"""Processes of this package that take part in a measurement: one JSON value a line in, one a line out, until their input ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CHECKOUT = Path(__file__).parent.parent


class Worker:
    """The side of the one who measures."""

    def __init__(self, process: subprocess.Popen[bytes], name: str) -> None:
        self._process = process
        self._name = name
        self._read = b""

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def send(self, value: object) -> None:
        """One line to it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self, seconds: float = 20.0) -> Any:
        """One line of it. Ends the measurement if there is none for so long."""
        assert self._process.stdout is not None
        while b"\n" not in self._read:
            if not select.select([self._process.stdout], [], [], seconds)[0]:
                raise SystemExit(f"bench: {self._name} has not answered for {seconds:g} s")
            more = os.read(self._process.stdout.fileno(), 1 << 20)
            if not more:
                raise SystemExit(f"bench: {self._name} has ended; see above")
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        return json.loads(line)

    def ask(self, value: object) -> Any:
        """`send`, then `answer`."""
        self.send(value)
        return self.answer()


@contextlib.contextmanager
def worker(module: str, *arguments: str) -> Iterator[Worker]:
    """`python -m MODULE ARGUMENTS`. It ends when its input does: it outlives nobody, however this process ends."""
    argv = [sys.executable, "-m", module, *arguments]
    # Not of this process's group: Ctrl-C is for who measures.
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=_CHECKOUT, process_group=0) as process:
        assert process.stdin is not None
        try:
            yield Worker(process, " ".join((module, *arguments[:1])))
        finally:
            process.stdin.close()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()


class Commands:
    """The worker's side, in its event loop."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader

    @classmethod
    async def open(cls) -> Commands:
        """Of standard input."""
        reader = asyncio.StreamReader(limit=1 << 24)
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        return cls(reader)

    async def next(self) -> Any:
        """None at the end."""
        line = await self._reader.readline()
        return json.loads(line) if line else None


def say(value: object) -> None:
    """One line out."""
    print(json.dumps(value), flush=True)
