# SPDX-License-Identifier: Apache-2.0
"""A broker that is killed and started again on its log, with very many agents and monitors: how long until all is as it was, and what
the monitors are told meanwhile that is not so.

    python -m tests.robustness.restart [--agents 300] [--monitors 60] [--registrations 100] [--down 1s] [--linger 10s] [--times 1]

Agents are the agent's own connection code with a ring in memory, all in one process (`fleet.py`), monitors the client library's, in
another one (`crowd.py`). One in ten of the registered processes ends while there is no broker, the others when all are back: each of these
ends is to be told once. Exit status 1 if one is not, or a gap was told, or a monitor refused, or a node was UNREACHABLE though its agent
was not held up itself. Seconds are from the start of the second broker.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmonitor.wire.durations import parse_duration
from tests.lab.process import Running
from tests.lab.services import Lab

LIMIT_S = 300.0
"""Until all are there, or are back: when nothing is wrong any more."""
HELD_UP_S = 1.5
"""An agent says something every second, and its lease is 3 s: held up for longer than this it may rightly be taken for unreachable."""
_ENDED_MEANWHILE = 10
"""One in so many."""


@dataclass(frozen=True)
class Restarted:
    """What a restart was like. Seconds since the broker's start."""

    listening_s: float
    up_s: float
    """Until all agents were connected."""
    back_s: float
    """Until all monitors had answers to all that they had registered."""
    done_s: float
    """Until all ends were told."""
    connections: int
    """Of agents, until all had one."""
    unreachable: int
    """Such notices, to all monitors."""
    nodes_unreachable: int
    """Times that the broker took a node for unreachable."""
    gaps: int
    """Such notices, to all monitors."""
    monitors_with_gaps: int
    lost: dict[str, int]
    """Why monitors lost their streams: how many did, those that the kill ended among them."""
    refused: int
    """Monitors whose stream the broker ended for good."""
    ends: int
    missing: int
    twice: int
    cpu_s: float
    """The broker's."""
    fleet_late_s: float
    """For so long the process of all agents was held up at most: beyond the lease, nodes are unreachable."""
    said: tuple[str, ...]
    """What agents and monitors said went wrong."""

    @property
    def summary(self) -> str:
        """For people."""
        return (
            f"listening after {self.listening_s:.1f} s, all agents up after {self.up_s:.1f} s ({self.connections} connections), all "
            f"monitors back after {self.back_s:.1f} s ({sum(self.lost.values())} streams lost: {self.lost}), all ends told after "
            f"{self.done_s:.1f} s; UNREACHABLE {self.unreachable} ({self.nodes_unreachable} times a node), gaps {self.gaps} (of "
            f"{self.monitors_with_gaps} monitors), refused {self.refused}; ends {self.ends}, missing {self.missing}, twice {self.twice}; "
            f"broker's CPU {self.cpu_s:.1f} s; agents held up for {self.fleet_late_s:.1f} s at most"
        )

    @property
    def wrong(self) -> list[str]:
        """What should not be, if anything."""
        heard = self.fleet_late_s < HELD_UP_S
        counts = {
            "nodes taken for unreachable": heard and self.nodes_unreachable,
            "told UNREACHABLE": heard and self.unreachable,
            "gaps": self.gaps,
            "monitors refused": self.refused,
            "ends missing": self.missing,
            "ends told twice": self.twice,
        }
        return [f"{what}: {count}" for what, count in counts.items() if count] + list(self.said)


def restart(folder: Path, *, agents: int, monitors: int, each: int, down_s: float, options: Sequence[str] = ()) -> Restarted:
    """One restart, with `each` registrations of each monitor. `options` are the broker's. Raises LabError if it is not over in time."""
    lab = Lab(folder)
    try:
        return _restart(lab, folder / "log.db", agents, monitors, each, down_s, options)
    finally:
        lab.close()


def _restart(lab: Lab, log: Path, agents: int, monitors: int, each: int, down_s: float, options: Sequence[str]) -> Restarted:
    registrations = monitors * each
    log_options = ("--log", f"sqlite:{log}", *options)
    first = lab.broker(*log_options)
    fleet = _module(lab, "fleet", first.address, agents, registrations)
    _line(fleet, "connected")
    crowd = _module(lab, "crowd", first.address, monitors, each, agents)
    _line(crowd, "answered")
    time.sleep(1.5)  # what was registered is in the log, and a heartbeat was told
    told_before = _ask(crowd, "count", "twice")
    before = len(fleet.lines), len(crowd.lines)
    lab.kill(first)
    lab.stop(first)
    fleet.say("again")
    fleet.say(f"end 0 {_ENDED_MEANWHILE}")
    _line(fleet, "ended", before[0])
    time.sleep(down_s)
    began = time.monotonic()
    second = lab.broker(*log_options, listen=first.address)
    listening = time.monotonic()
    up = _line(fleet, "connected", before[0])
    back = _line(crowd, "answered", before[1])
    for start in range(1, _ENDED_MEANWHILE):
        fleet.say(f"end {start} {_ENDED_MEANWHILE}")
    told = _until_told(crowd, registrations)
    done = time.monotonic()
    cpu_s = _cpu_s(second.pid)
    said = [json.loads(line) for line in (*fleet.lines[before[0] :], *crowd.lines[before[1] :])]
    return Restarted(
        listening_s=listening - began,
        up_s=up["connected"] - began,
        back_s=back["answered"] - began,
        done_s=done - began,
        connections=up["connections"],
        unreachable=told["unreachable"] - told_before["unreachable"],
        nodes_unreachable=second.stderr_text().count(": unreachable: "),
        gaps=told["gaps"] - told_before["gaps"],
        monitors_with_gaps=told["monitors_with_gaps"],
        lost=told["lost"],
        refused=told["refused"],
        ends=told["ends"],
        missing=registrations - told["ends"],
        twice=told["twice"],
        cpu_s=cpu_s,
        fleet_late_s=_ask(fleet, "late", "late_s")["late_s"],
        said=tuple(line[key] for line in said for key in ("wrong", "refused") if isinstance(line.get(key), str)),
    )


def _module(lab: Lab, name: str, *arguments: object) -> Running:
    return lab.command(sys.executable, "-m", f"tests.robustness.{name}", *map(str, arguments), env={"GRPC_VERBOSITY": "NONE"})


def _line(process: Running, key: str, start: int = 0) -> dict[str, Any]:
    """The first line from `start` on that says this."""
    at = process.wait_line(lambda line: f'"{key}":'.encode() in line, f"a line with {key!r}", limit=LIMIT_S, start=start)
    found: dict[str, Any] = json.loads(process.lines[at])
    return found


def _ask(process: Running, word: str, key: str) -> dict[str, Any]:
    start = len(process.lines)
    process.say(word)
    return _line(process, key, start)


def _until_told(crowd: Running, ends: int) -> dict[str, Any]:
    """What the monitors were told, once they were told of so many ends, or of no more for a while."""
    seen, since = -1, time.monotonic()
    while True:
        told = _ask(crowd, "count", "twice")
        if told["ends"] != seen:
            seen, since = told["ends"], time.monotonic()
        if seen == ends or time.monotonic() - since > 10.0:
            return told
        time.sleep(0.1)  # it is told of by nobody


def _cpu_s(pid: int) -> float:
    """User and system time of a process, which is this one's child."""
    return time.clock_gettime_ns(~pid << 3 | 2) / 1e9  # clock_getcpuclockid(3): CPUCLOCK_SCHED


def main(argv: Sequence[str]) -> int:
    """Exit status 0 if nothing was told that is not so."""
    parser = argparse.ArgumentParser(prog="restart")
    parser.add_argument("--agents", type=int, default=300, metavar="N")
    parser.add_argument("--monitors", type=int, default=60, metavar="N")
    parser.add_argument("--registrations", type=int, default=100, metavar="N", help="of each monitor")
    parser.add_argument("--down", default="1s", metavar="TIME", help="so long there is no broker")
    parser.add_argument("--linger", default="10s", metavar="TIME", help="the broker's")
    parser.add_argument("--times", type=int, default=1, metavar="N")
    options = parser.parse_args(argv)
    wrong = 0
    for _ in range(options.times):
        with tempfile.TemporaryDirectory(prefix="kmonitor-restart-") as folder:
            done = restart(
                Path(folder),
                agents=options.agents,
                monitors=options.monitors,
                each=options.registrations,
                down_s=parse_duration(options.down),
                options=("--linger", options.linger),
            )
        print(done.summary, flush=True)
        for text in done.wrong:
            print(f"    WRONG: {text}", flush=True)
        wrong += bool(done.wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
