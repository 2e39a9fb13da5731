# SPDX-License-Identifier: Apache-2.0
"""The programs of tests/workload: how they are built, and how one is played and watched at the same time."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.lab.compare import Line
from tests.lab.knowledge import Knowledge, of
from tests.lab.process import Running
from tests.lab.services import Lab
from tests.lab.watch import Watch

SOURCES = Path(__file__).resolve().parent.parent / "workload"


@dataclass(frozen=True)
class Programs:
    """Where the built workloads are."""

    truth: Path
    storm: Path
    brief: Path
    pace: Path
    blame: Path


def build(folder: Path) -> Programs:
    """Compile all of them into `folder`."""
    programs = Programs(folder / "truth", folder / "storm", folder / "brief", folder / "pace", folder / "blame")
    jobs = {
        programs.truth: sorted(SOURCES.glob("truth*.c")),
        programs.storm: [SOURCES / "storm.c"],
        programs.brief: [SOURCES / "brief.c"],
        programs.pace: [SOURCES / "pace.c"],
        programs.blame: [SOURCES / "blame.c"],
    }
    for program, sources in jobs.items():
        subprocess.run(["cc", "-O2", "-pthread", "-Wall", "-Wextra", "-Werror", "-o", program, *sources], check=True)
    return programs


class Root(Running):
    """A workload's first process. It waits for the word before it does anything."""

    root_pid = 0
    """As the workload sees itself: not `pid` if it runs in a namespace of its own."""

    def __init__(self, argv: Sequence[str | Path], cwd: Path, prefix: Sequence[str] = ()) -> None:
        super().__init__(" ".join(["workload", *(str(word) for word in argv[1:])]), [*prefix, *argv], cwd=cwd, own_group=True)

    def wait_ready(self) -> None:
        """Until it waits for the word."""
        self.root_pid = self.wait_said("ready")

    def wait_said(self, key: str, limit: float = 20.0) -> int:
        """Until it says `key` of some process."""
        at = self.wait_line(lambda text: key in json.loads(text), key, limit=limit)
        value: int = json.loads(self.lines[at])[key]
        return value

    def truth(self) -> list[Line]:
        """What it says that it did, and its own end."""
        self.wait_closed()
        code = self.wait()
        told = [line for line in map(_parse, self.lines) if "type" in line]
        end: Line = {"type": "PROCESS_EXIT", "pid": self.root_pid, "tid": self.root_pid, "exit_code": code}
        return [*told, end]


def _parse(text: bytes) -> Line:
    # Names and arguments need not be UTF-8: kmonitor replaces what is not, and so does this.
    line: Line = json.loads(text.decode(errors="replace"))
    return line


@dataclass
class Performance:
    """A scene, as it says it was and as kmonitor saw it."""

    root: int
    truth: list[Line]
    events: list[Line]
    watch: Watch
    began_ns: int
    ended_ns: int
    knowledge: Knowledge


@dataclass
class Stage:
    """Where scenes are played: a broker, and an agent that watches."""

    lab: Lab
    broker: str
    node: str
    programs: Programs
    folder: Path
    knowledge: Knowledge = field(default_factory=lambda: of("core"))
    """Of the agent's source."""

    def fence(self) -> Running:
        """A process that ends when its input does. Watched beside another, its end says that all before was seen."""
        return self.lab.command("cat")

    def start(self, scene: str, *arguments: str) -> Root:
        """A scene of truth.c that waits for the word."""
        return self.prepare(self.programs.truth, scene, *arguments)

    def prepare(self, program: Path, *arguments: str) -> Root:
        """A workload that waits for the word."""
        root = self.lab.keep(Root([program, *arguments], self.folder))
        root.wait_ready()
        return root

    def watch(self, *of: int, options: Sequence[str] = ("--events", "all")) -> Watch:
        """Watch processes of the node, all of which run; returns when the kernel is armed."""
        pids = [word for pid in of for word in ("--pid", str(pid))]
        watch = self.lab.watch(self.broker, "--node", self.node, *pids, *options)
        watch.wait_registered(len(of), "RUNNING")
        return watch

    def play(self, scene: str, *arguments: str, dialogue: Callable[[Root, Watch], None] | None = None, code: int = 0) -> Performance:
        """Play a scene of truth.c under a watch of its root and all that comes from it, every event type."""
        root = self.start(scene, *arguments)
        fence = self.fence()
        watch = self.watch(root.root_pid, fence.pid, options=["--follow", "--events", "all"])
        began = time.time_ns()
        root.say("go")
        if dialogue is not None:
            dialogue(root, watch)
        truth = self.knowledge.sees(root.truth(), scene, root.root_pid, arguments)
        ended = time.time_ns()
        if root.process.returncode != code:
            raise root.failure(f"expected exit status {code}")
        self.lab.stop(root)
        self.end_fence(fence, watch)
        events = [line for line in watch.events() if line["pid"] != fence.pid]
        return Performance(root.root_pid, truth, events, watch, began, ended, self.knowledge)

    def end_fence(self, fence: Running, watch: Watch, limit: float = 20.0) -> None:
        """End the fence and wait until `watch` has seen it; then end the watch too."""
        fence.close_input()
        fence.wait()
        watch.wait_end_of(fence.pid, limit=limit)
        self.lab.stop(watch, fence)
