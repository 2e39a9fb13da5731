# SPDX-License-Identifier: Apache-2.0
"""A workload's own truth against what kmonitor said: one for one, nothing missing, nothing extra, in order."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

Line = dict[str, Any]
Key = tuple[str, int, int]

THREAD_ENDS = {"THREAD_ABORT", "THREAD_EXIT"}
ENDS = {"PROCESS_ABORT", "PROCESS_EXIT", *THREAD_ENDS}
CLOCK_SLACK_NS = 50_000_000
"""How far the node's boot-time clock, taken to wall clock, may be from the test's own reading."""


def _key(line: Line) -> Key:
    """Whose order an event has a place in. Two threads of a process are in none with each other."""
    if line["type"] in THREAD_ENDS:
        return ("thread", line["pid"], line["tid"])
    if line["type"] == "THREAD_CREATE":
        return ("creator", line["pid"], line["tid"])
    return ("process", line["pid"], 0)


def _by_key(lines: list[Line]) -> dict[Key, list[Line]]:
    groups: dict[Key, list[Line]] = defaultdict(list)
    for line in lines:
        groups[_key(line)].append(line)
    return groups


def differences(truth: list[Line], events: list[Line]) -> list[str]:
    """What is not as it was, one line each. Of an event those keys count that the truth has."""
    told, seen = _by_key(truth), _by_key(events)
    wrong: list[str] = []
    for key in sorted(told.keys() | seen.keys()):
        expected, found = told.get(key, []), seen.get(key, [])
        for number in range(max(len(expected), len(found))):
            if number >= len(found):
                wrong.append(f"missing: {expected[number]}")
            elif number >= len(expected):
                wrong.append(f"extra: {found[number]}")
            else:
                wrong.extend(_fields(expected[number], found[number]))
    return wrong


def _fields(expected: Line, found: Line) -> list[str]:
    wrong: list[str] = []
    for name, value in expected.items():
        if name == "args":
            wrong.extend(_arguments(value, found))
        elif name == "filename":
            if found.get(name) != value and not (found.get("args_truncated") and value.startswith(found.get(name) or "?")):
                wrong.append(f"filename is {found.get(name)!r}, was {value!r}")
        elif name == "killed_by":
            by = found.get(name) or {}
            if {part: by.get(part) for part in value} != value:
                wrong.append(f"killed_by is {by}, was {value}, in {found}")
        elif found.get(name, False if value is False else None) != value:
            wrong.append(f"{name} is {found.get(name)!r}, was {value!r}: expected {expected}, found {found}")
    return wrong


def _arguments(expected: list[str], found: Line) -> list[str]:
    """All of them; or, if it says that they were too long, a beginning of them that is more than nothing."""
    args = found.get("args")
    if not found.get("args_truncated"):
        return [] if args == expected else [f"args are {args}, were {expected}"]
    if args == expected:
        return []  # then it was the file name, which is compared on its own
    if not args or len(args) > len(expected):
        return [f"said to be truncated: {args}, were {expected}"]
    *whole, last = args
    # The last may be cut, in the middle of a character too.
    if whole != expected[: len(whole)] or not expected[len(whole)].startswith(last.rstrip("\ufffd")):
        return [f"args are not the beginning of what they were: {args}"]
    return []


def inconsistencies(events: list[Line], node: str, *, uid: int = 0, named: bool = True) -> list[str]:
    """What cannot be in any stream of one node, whatever happened. `named`: every process's name is known."""
    wrong: list[str] = []
    position = -1
    born: dict[int, int] = {}
    last: dict[tuple[int, int], Line] = {}
    gone: set[int] = set()
    epochs = {line["epoch"] for line in events}
    if len(epochs) > 1:
        wrong.append(f"several epochs: {epochs}")
    for line in events:
        kind, pid, tid = line["type"], line["pid"], line["tid"]
        if line["position"] <= position:
            wrong.append(f"position goes back to {line['position']} from {position}")
        position = line["position"]
        if line["node"] != node or line["uid"] != uid or (named and not line["comm"]) or line["start_time"] <= 0 or line.get("inferred"):
            wrong.append(f"node, uid, comm, start time or inferred: {line}")
        if pid in born and line["start_time"] != born[pid]:
            wrong.append(f"start time is not what the fork said, {born[pid]}: {line}")
        if pid in gone and kind not in THREAD_ENDS:
            wrong.append(f"after the end of its process: {line}")
        wrong.extend(_ending(line, last.get((pid, tid))))
        last[pid, tid] = line
        if kind == "PROCESS_FORK":
            gone.discard(line["child_pid"])
            if line.get("child_start_time"):
                born[line["child_pid"]] = line["child_start_time"]
        if kind == "PROCESS_EXIT":
            gone.add(pid)
            born.pop(pid, None)
    return wrong


def _ending(line: Line, before: Line | None) -> list[str]:
    """Ends have a code or a signal; an end by signal has its abort right before it, with the same status."""
    kind = line["type"]
    code, number = line.get("exit_code"), line.get("exit_signal")
    if kind not in ENDS:
        return [] if code is None and number is None else [f"no end, and a status: {line}"]
    if (code is None) == (number is None) or (kind.endswith("ABORT") and number is None):
        return [f"neither or both of code and signal: {line}"]
    abort = before is not None and before["type"] == kind.replace("EXIT", "ABORT")
    if kind.endswith("EXIT") and number is not None:
        same = ("exit_signal", "core_dumped", "oom_killed", "killed_by")
        if before is None or not abort or [line.get(name) for name in same] != [before.get(name) for name in same]:
            return [f"not right behind its abort: {line}, behind {before}"]
    elif kind.endswith("EXIT") and abort:
        return [f"an abort, and then an exit with a code: {line}"]
    return []
