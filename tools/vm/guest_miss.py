# SPDX-License-Identifier: Apache-2.0
"""In a guest: forks by several workers at once, under a watch of everything. What is missing must be told as a gap.

A kernel skips a BPF program that is at work on the CPU already: it was preempted there, or interrupted. Only the kernel's own count tells.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from kmonitor.agent import libbpf
from kmonitor.agent.maps import CONTROL_DTYPE, KEY_SIZE
from kmonitor.agent.misses import SKIPPED
from kmonitor.agent.pins import DEFAULT_ROOT
from tools.vm.stack import NODE, Told, watched


def main() -> int:
    """0 if nothing is missing that no gap has room for, and nothing came twice."""
    parser = argparse.ArgumentParser(description="Forks by several workers at once, and what was told of them.")
    parser.add_argument("sources", nargs="*", default=["core", "bcc"])
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--forks", type=int, default=400)
    given = parser.parse_args()
    return max([under(source, given.workers, given.forks) for source in given.sources])


def under(source: str, workers: int, forks: int) -> int:
    """With an agent of this source."""
    with watched(source) as told:
        began = time.monotonic()
        roots = [subprocess.Popen([sys.executable, "-S", "-c", LOAD, str(forks)], stdout=subprocess.PIPE) for _ in range(workers)]
        children = Counter((root.pid, int(child)) for root in roots for child in root.communicate()[0].split())
        took = time.monotonic() - began
        told.await_all()
        return account(source, children, told, misses(), took)


def account(source: str, children: Counter[tuple[int, int]], told: Told, skipped: dict[str, int], took: float) -> int:
    """Print what was told of each child beside what was; 0 if the gaps have room for what is missing, and none came twice.

    A child is its parent's id and its own. A gap without numbers has room for nothing here.
    """
    roots = {root for root, _ in children}
    events: dict[str, Counter[tuple[int, int]]] = {"PROCESS_FORK": Counter(), "PROCESS_EXIT": Counter()}
    lost: Counter[str] = Counter()
    gaps: Counter[str] = Counter()
    inferred = 0
    for line in told.lines():
        if line["kind"] not in ("event", "stale", "fresh"):
            print("  ", json.dumps(line))
        if line["kind"] == "gap":
            gaps[line["reason"]] += 1
            for each in line["lost"]:
                lost[each["type"].removeprefix("EVENT_TYPE_")] += int(each["count"])
        elif line["kind"] == "event":
            if line["type"] == "PROCESS_FORK" and line["pid"] in roots:
                events["PROCESS_FORK"][line["pid"], line["child_pid"]] += 1
            elif line["type"] == "PROCESS_EXIT" and line["ppid"] in roots and line["pid"] not in roots:
                events["PROCESS_EXIT"][line["ppid"], line["pid"]] += 1
            inferred += bool(line.get("inferred"))
    generated, balanced, parts = children.total(), True, []
    for kind, seen in events.items():
        missing, surplus = (children - seen).total(), (seen - children).total()
        balanced &= missing <= lost[kind] and not surplus
        parts.append(f"{kind} {seen.total()} of {generated}, missing {missing}, in gaps {lost[kind]}, surplus {surplus}")
    print(
        f"{platform.release()}: {source}: {'; '.join(parts)}; in {took:.0f} s; gaps {dict(gaps)} {dict(lost)}, inferred {inferred};"
        f" skipped by the kernel {skipped}, not made good {open_at_last()}; preemption {preemption()}:"
        f" {'balanced' if generated and balanced else 'MISSING'}",
        flush=True,
    )
    return 0 if generated and balanced else 1


def misses() -> dict[str, int]:
    """By program: how often the kernel skipped it."""
    shown = subprocess.run(["bpftool", "prog", "show"], capture_output=True, text=True, check=False).stdout
    found: Counter[str] = Counter()
    for name, count in re.findall(r"name (kmonitor_\w+) .*recursion_misses (\d+)", shown):
        found[name] += int(count)
    return dict(found)


def open_at_last() -> dict[str, int]:
    """By program: runs that no copy has made good, as the agent has found them last. It may have told of more: of those made good since."""
    pinned = next(DEFAULT_ROOT.glob(f"{NODE}@*")) / "map_control"
    value = libbpf.Map(libbpf.open_pinned(pinned), "control").lookup(bytes(KEY_SIZE), CONTROL_DTYPE.itemsize)
    assert value is not None
    return dict(zip(SKIPPED, np.frombuffer(value, CONTROL_DTYPE)["skipped"][0].tolist(), strict=True))


def preemption() -> str:
    """The kernel's model, if it tells."""
    try:
        return Path("/sys/kernel/debug/sched/preempt").read_text().strip()
    except OSError:
        return "not told"


LOAD = """
import os, sys
children = []
for _ in range(int(sys.argv[1])):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    children.append(pid)
print(*children)
"""

if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    raise SystemExit(main())
