# SPDX-License-Identifier: Apache-2.0
"""What is said of the guarding itself: each thing once, until it is another."""

from __future__ import annotations

from collections.abc import Iterable

from kmonitor.clients.ha.report import Report
from kmonitor.clients.verdict import Blindness, Subject, Verdict

Place = tuple[str, str]


class Says:
    """Into a report, of all resources."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._said: dict[object, str] = {}

    def ready(self, names: Iterable[str]) -> None:
        """The resources that are guarded at the start."""
        guarded = sorted(names)
        self._report.note(
            f"ready: {len(guarded)} {'resource is' if len(guarded) == 1 else 'resources are'} guarded", ready=True, guarded=guarded
        )

    def guarding(self, place: Place, subject: Subject, pid: int | None, comm: str) -> None:
        """Its process now; None: there is none."""
        if self.is_new(("alive", place), f"{pid} {comm}"):
            self._report.guarding(*place, means(subject), pid, comm)

    def blindness(self, place: Place, verdict: Verdict, *, before: Blindness | None) -> None:
        """It is another than `before`."""
        if verdict.blind in (None, Blindness.STARTING):
            if before not in (None, Blindness.STARTING):
                self._report.note(f"{place[0]} on {place[1]}: seen again", resource=place[0], node=place[1], blind=None)
        else:
            self._report.note(
                f"{place[0]} on {place[1]}: not seen: {verdict.blind.value}{f' ({verdict.reason})' if verdict.reason else ''}; "
                "until it is, Pacemaker's own monitor is all there is",
                resource=place[0],
                node=place[1],
                blind=verdict.blind.value,
            )

    def note(self, key: object, text: str, over: str = "") -> None:
        """Say it unless it was the last that was said of this; with an empty text, that it is over, if it was said."""
        if text:
            if self.is_new(key, text):
                self._report.note(text)
        elif self._said.pop(key, None) is not None:
            self._report.note(over)

    def is_new(self, key: object, what: str) -> bool:
        """Whether it is another than the last of this; it is the last from now on."""
        if self._said.get(key) == what:
            return False
        self._said[key] = what
        return True

    def forget(self, key: object) -> None:
        """It may be said again."""
        self._said.pop(key, None)


def means(subject: Subject) -> str:
    """What it is guarded by, for people."""
    if subject.pidfile is not None:
        return f"pidfile {subject.pidfile}"
    return f"unit {subject.unit}" if subject.unit is not None else f"control group {subject.cgroup}"
