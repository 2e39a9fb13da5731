# SPDX-License-Identifier: Apache-2.0
"""What each source of events can know: where the same scene looks different through another one, it is said here and nowhere else.

docs/events.md tells users the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.lab.compare import Line

TICK_NS = 10_000_000

EVERYTHING = frozenset({"killers", "out of memory", "control groups", "arguments", "names"})
"""Words for the marker `knows`: a test that has it is made for those sources that know all it names."""


@dataclass(frozen=True)
class Knowledge:
    """Of one source."""

    source: str
    knows: frozenset[str] = EVERYTHING
    unknown_fields: frozenset[str] = frozenset()
    """Keys of the truth that it leaves empty, or may."""
    start_step_ns: int = 1
    creators: bool = True
    """Which thread made a thread, and which process a child that is another's (CLONE_PARENT)."""
    race_codes: bool = True
    """Which status the kernel takes when two threads end in the same moment, each with one of its own."""
    thread_rate: int = 45_000
    """Threads in a second that it keeps up with on two cores beside the storm itself."""
    share: float = 0.4
    """Of the rounds and numbers of the longest tests: what follows the source in agent, broker and client is the same for all."""

    def sees(self, truth: list[Line], scene: str, root: int, arguments: tuple[str, ...] = ()) -> list[Line]:
        """What it makes of a scene's truth."""
        if not self.creators and scene == "clone_parent":
            truth = _after_its_maker(truth)
        return [self._line(line, scene, root, arguments) for line in truth]

    def _line(self, line: Line, scene: str, root: int, arguments: tuple[str, ...]) -> Line:
        seen = {name: value for name, value in line.items() if name not in self.unknown_fields}
        if not self.creators:
            if line["type"] == "THREAD_CREATE":
                seen["tid"] = 0
            elif line["type"] == "PROCESS_FORK" and scene == "clone_parent":
                seen["pid"] = seen["tid"] = root
        if not self.race_codes and scene == "together" and arguments[1:] == ("0",):
            seen.pop("exit_code", None) if line["type"] == "PROCESS_EXIT" and line["pid"] != root else None
        return seen


def _after_its_maker(truth: list[Line]) -> list[Line]:
    """With each fork behind that of the process that made it: told of one parent, they have an order that two processes did not."""
    made = {line["child_pid"]: at for at, line in enumerate(truth) if line["type"] == "PROCESS_FORK"}
    behind = [max(at, made.get(line["pid"], at)) if line["type"] == "PROCESS_FORK" else at for at, line in enumerate(truth)]
    return [truth[at] for at in sorted(range(len(truth)), key=lambda at: (behind[at], at != behind[at]))]


_OF = {
    "core": Knowledge("core", share=1.0),
    "bcc": Knowledge("bcc", start_step_ns=TICK_NS),
    "netlink": Knowledge(
        "netlink",
        knows=frozenset(),
        unknown_fields=frozenset({"killed_by", "oom_killed", "filename", "args"}),
        start_step_ns=TICK_NS,
        creators=False,
        race_codes=False,
        thread_rate=10_000,
    ),
}
SOURCES: tuple[str, ...] = tuple(_OF)
"""Those that the capture tests run with."""


def of(source: str) -> Knowledge:
    """By its name."""
    return _OF[source]
