# SPDX-License-Identifier: Apache-2.0
"""What the tool says: a line for each thing that an operator wants to know afterwards, for people or as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from kmonitor.clients.notifications import Process
from kmonitor.clients.verdict import Death
from kmonitor.wire.plain import plain_text


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one end of a process. `action`: "failed", "would-fail", "left", "given-up"."""

    resource: str
    node: str
    end: Death | Process | None
    """A process: it is not known to have ended, and its node is not heard. None: it was never seen alive."""
    action: str
    reason: str
    seconds: float
    """From when it was told here."""


class Report(Protocol):
    """Where to say it."""

    def outcome(self, outcome: Outcome) -> None:
        """A death was dealt with."""

    def guarding(self, resource: str, node: str, subject: str, pid: int | None, comm: str) -> None:
        """A resource's process is watched from here on."""

    def note(self, text: str, **what: Any) -> None:
        """Anything else: one line, and the same for programs."""


class Lines:
    """For people, and for the journal."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """`say` shows a line, whatever is in it."""
        self._say = say

    def outcome(self, outcome: Outcome) -> None:
        done = {
            "failed": "told Pacemaker that it has failed",
            "would-fail": "would tell Pacemaker that it has failed (--dry-run)",
            "left": "not failed, since",
            "given-up": "not failed, and given up:",
        }[outcome.action]
        why = f" {outcome.reason}" if outcome.action in ("left", "given-up") else ""
        what = cause(outcome.end)
        if not why and isinstance(outcome.end, Process):
            what = f"{what}: {outcome.reason}"
        took = f" ({outcome.seconds * 1000:.0f} ms)" if outcome.action in ("failed", "would-fail") else ""
        self._say(f"{outcome.resource} on {outcome.node}: {what}: {done}{why}{took}")

    def guarding(self, resource: str, node: str, subject: str, pid: int | None, comm: str) -> None:
        if pid is None:
            self._say(f"{resource} on {node}: guarded by {subject}, nothing runs there now")
        else:
            self._say(f"{resource} on {node}: guarded by {subject}: {comm} ({pid})")

    def note(self, text: str, **_: Any) -> None:
        self._say(text)


class JsonLines:
    """For programs: stdout. `kind` is "outcome", "guarding" or "note"."""

    def outcome(self, outcome: Outcome) -> None:
        death = outcome.end
        told: dict[str, Any] = {}
        if isinstance(death, Process):
            told = {"pid": death.pid, "start_time": death.start_time, "boot_id": death.boot_id, "comm": death.comm}
        elif death is not None:
            by = death.killed_by
            told = {
                "pid": death.process.pid,
                "start_time": death.process.start_time,
                "boot_id": death.process.boot_id,
                "comm": death.comm,
                "died": death.time_unix_nano,
                "exit_code": death.exit_code,
                "exit_signal": death.exit_signal,
                "core_dumped": death.core_dumped,
                "oom_killed": death.oom_killed,
                "killed_by": None if by is None else {"pid": by.pid, "comm": by.comm, "uid": by.uid},
                "inferred": death.inferred,
            }
        self._print(
            "outcome",
            resource=outcome.resource,
            node=outcome.node,
            action=outcome.action,
            reason=outcome.reason,
            cause=cause(death),
            seconds=round(outcome.seconds, 4),
            **told,
        )

    def guarding(self, resource: str, node: str, subject: str, pid: int | None, comm: str) -> None:
        self._print("guarding", resource=resource, node=node, subject=subject, pid=pid, comm=comm)

    def note(self, text: str, **what: Any) -> None:
        self._print("note", text=text, **what)

    @staticmethod
    def _print(kind: str, **fields: Any) -> None:
        print(json.dumps({"kind": kind, "time": time.time_ns(), **fields}), flush=True)


def cause(end: Death | Process | None) -> str:
    """Which process, and how it ended: "sleep (4711) killed by SIGKILL from pid 17 (bash), uid 0"."""
    if isinstance(end, Process):
        return f"{plain_text(end.comm)} ({end.pid}) is not seen"
    return "its process has ended" if end is None else f"{plain_text(end.comm)} ({end.process.pid}) {end}"
