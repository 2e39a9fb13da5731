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

from tools.vm.stack import Told, watched


def main() -> int:
    """0 if nothing is missing that no gap covers."""
    parser = argparse.ArgumentParser(description="Forks by several workers at once, and what was told of them.")
    parser.add_argument("sources", nargs="*", default=["core"])
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--forks", type=int, default=400)
    given = parser.parse_args()
    return max([under(source, given.workers, given.forks) for source in given.sources])


def under(source: str, workers: int, forks: int) -> int:
    """With an agent of this source."""
    with watched(source) as told:
        began = time.monotonic()
        roots = [subprocess.Popen([sys.executable, "-S", "-c", LOAD, str(forks)]) for _ in range(workers)]
        for root in roots:
            root.wait()
        took = time.monotonic() - began
        told.await_all()
        return account(source, {root.pid for root in roots}, workers * forks, told, misses(), took)


def account(source: str, roots: set[int], total: int, told: Told, skipped: dict[str, int], took: float) -> int:
    """Print what was told beside what was; 0 if the gaps cover the rest. One without numbers is shown, and covers nothing here."""
    seen: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    gaps: Counter[str] = Counter()
    inferred = 0
    for line in told.lines():
        if line["kind"] != "event":
            print("  ", json.dumps(line))
        if line["kind"] == "gap":
            gaps[line["reason"]] += 1
            for each in line["lost"]:
                lost[each["type"].removeprefix("EVENT_TYPE_")] += int(each["count"])
        elif line["kind"] == "event":
            seen["forks"] += line["type"] == "PROCESS_FORK" and line["pid"] in roots
            seen["exits"] += line["type"] == "PROCESS_EXIT" and line["ppid"] in roots and line["pid"] not in roots
            inferred += bool(line.get("inferred"))
    covered = seen["forks"] + lost["PROCESS_FORK"] >= total and seen["exits"] + lost["PROCESS_EXIT"] >= total
    print(
        f"{platform.release()}: {source}: forks {seen['forks']} and exits {seen['exits']} of {total} in {took:.0f} s,"
        f" gaps {dict(gaps)} {dict(lost)}, inferred {inferred}; skipped by the kernel {skipped};"
        f" preemption {preemption()}: {'covered' if covered else 'MISSING'}",
        flush=True,
    )
    return 0 if covered else 1


def misses() -> dict[str, int]:
    """By program: how often the kernel skipped it."""
    shown = subprocess.run(["bpftool", "prog", "show"], capture_output=True, text=True, check=False).stdout
    found: Counter[str] = Counter()
    for name, count in re.findall(r"name (kmonitor_\w+) .*recursion_misses (\d+)", shown):
        found[name] += int(count)
    return dict(found)


def preemption() -> str:
    """The kernel's model, if it tells."""
    try:
        return Path("/sys/kernel/debug/sched/preempt").read_text().strip()
    except OSError:
        return "not told"


LOAD = """
import os, sys
for _ in range(int(sys.argv[1])):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
"""

if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    raise SystemExit(main())
