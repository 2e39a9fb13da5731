# SPDX-License-Identifier: Apache-2.0
"""The process whose loops are timed (loops.c): compiled, started once, driven over its standard input."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Loop = Literal["fork", "spawn", "threads"]
LOOPS: tuple[Loop, ...] = ("fork", "spawn", "threads")
EVENTS: dict[Loop, int] = {"fork": 2, "spawn": 3, "threads": 2}
"""Of one round of each loop: fork and exit; fork, exec and exit; create and exit."""
_HERE = Path(__file__).parent
_SOURCES = {"loops": ("loops.c", "-pthread"), "loops_child": ("loops_child.c", "-static")}


class Loops:
    """Owned by one caller: a request is answered before the next one."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid

    def run(self, loop: Loop, count: int) -> int:
        """Nanoseconds that `count` rounds took. Raises SystemExit if the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{loop} {count}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("bench: the process that is timed has ended; see above")
        return int(answer)

    def count_for(self, loop: Loop, seconds: float) -> int:
        """How many rounds take about so long; warms the process up on the way."""
        count = 10
        while (taken := self.run(loop, count) / 1e9) < seconds / 2:
            count *= 2
        return max(int(count * seconds / taken), 1)


@contextlib.contextmanager
def loops(build: Path, cpu: int | None) -> Iterator[Loops]:
    """On that processor alone, or where the scheduler puts it. Raises SystemExit if there is no C compiler."""
    for program, (source, option) in _SOURCES.items():
        _compile(build / program, _HERE / source, option)
    argv = [str(build / "loops"), str(build / "loops_child"), *([] if cpu is None else [str(cpu)])]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Loops(process)
        finally:
            process.terminate()


def _compile(program: Path, source: Path, option: str) -> None:
    if program.exists() and program.stat().st_mtime > source.stat().st_mtime:
        return
    try:
        subprocess.run(["cc", "-O2", option, "-o", program, source], check=True)
    except FileNotFoundError:
        raise SystemExit("bench: there is no cc: install gcc") from None
    except subprocess.CalledProcessError:
        raise SystemExit(f"bench: cc does not compile {source.name}; see above") from None
