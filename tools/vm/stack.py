# SPDX-License-Identifier: Apache-2.0
"""In a guest: a broker, an agent and a watch of everything, and what the watch was told."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ADDRESS = "127.0.0.1:7400"
NODE = "guest"
LIMIT_S = 240.0
"""For one step without anything new: a guest is slow."""


class Told:
    """What `kmon watch` was told, in a file that it writes."""

    def __init__(self, path: Path, watch: subprocess.Popen[bytes]) -> None:
        self._path = path
        self._watch = watch

    def lines(self) -> list[dict[str, Any]]:
        """All that are whole."""
        text = self._path.read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.startswith("{") and line.endswith("}\n")]

    def exits(self) -> dict[int, dict[str, Any]]:
        """The exits of processes, by their ids."""
        return {line["pid"]: line for line in self.lines() if line["kind"] == "event" and line["type"] == "PROCESS_EXIT"}

    def await_all(self) -> None:
        """Until it was told all that has happened so far."""
        with subprocess.Popen(["sh", "-c", "exit 77"]) as fence:
            pass
        await_that(lambda: fence.pid in self.exits(), "the last exit does not come", self._watch, self._path)


@contextlib.contextmanager
def watched(source: str) -> Iterator[Told]:
    """A watch of everything on this machine, by an agent of this source, with a broker of its own."""
    told, said = Path(f"/tmp/told-{source}"), Path(f"/tmp/said-{source}")
    agent_command = ["kmonitor-agent", "--broker", ADDRESS, "--node", NODE]
    started: list[subprocess.Popen[bytes]] = []
    try:
        # A guest that is starved for a while must not lose its place: that would be a gap of another reason than what is looked for.
        command = ["kmonitor-broker", "--listen", ADDRESS, "--log", "memory", "--linger", "10m"]
        started.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        with said.open("wb") as stream:
            agent = subprocess.Popen([*agent_command, "--source", source], stdout=stream, stderr=stream)
        started.append(agent)
        await_that(lambda: "is connected" in said.read_text(), f"source {source}: the agent does not connect", agent, said)
        with told.open("wb") as stream:
            watch = subprocess.Popen(
                ["kmon", "watch", "--broker", ADDRESS, "--node", NODE, "--events", "all", "--json"], stdout=stream, stderr=stream
            )
        started.append(watch)
        await_that(lambda: '"registered"' in told.read_text(), "kmon watch does not register", watch, told)
        yield Told(told, watch)
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait()
        subprocess.run([*agent_command, "--unpin"], check=False)


def await_that(done: Callable[[], bool], otherwise: str, process: subprocess.Popen[bytes], said: Path | None = None) -> None:
    """Wait while the process lives, and while what it says grows."""
    ends, size = time.monotonic() + LIMIT_S, 0
    while not done():
        if said and (now := said.stat().st_size) != size:
            ends, size = time.monotonic() + LIMIT_S, now
        if process.poll() is not None or time.monotonic() > ends:
            last = said.read_text(errors="replace")[-2000:] if said else ""
            raise SystemExit(f"{otherwise} (status {process.poll()}) {last}")
        time.sleep(0.2)
