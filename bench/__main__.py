# SPDX-License-Identifier: Apache-2.0
"""All measurements, one table: `make bench`, or

    .venv/bin/python -m bench [--quick] [--only overhead,latency] [--out build/bench]

Needs root. Leaves results.json, results.md and plots/ in the folder named by --out.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from bench.figure import Plan, Result
from bench.mounts import mounted
from bench.report import line, write

GROUPS = ("overhead", "latency", "throughput", "growth", "memory", "arming", "start")
"""Each is a module of this package with a function `measure(plan: Plan) -> Result`."""


def main() -> None:
    """Print a line a figure while it measures, then write the report."""
    parser = argparse.ArgumentParser(prog="bench", description="Measure kmonitor beside its peers.")
    parser.add_argument("--quick", action="store_true", help="a smoke test of all of it, in less than a minute")
    parser.add_argument("--only", default=",".join(GROUPS), help=f"some of: {', '.join(GROUPS)}")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder of the report")
    asked = parser.parse_args()
    groups = [name.strip() for name in asked.only.split(",")]
    if unknown := [name for name in groups if name not in GROUPS]:
        sys.exit(f"bench: there is no measurement {unknown[0]!r}: choose from {', '.join(GROUPS)}")
    if os.geteuid() != 0:
        sys.exit("bench: this needs root, for BPF: run it with sudo")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: what was started is ended, pins are removed
    build: Path = asked.out / "programs"
    build.mkdir(parents=True, exist_ok=True)
    results: dict[str, Result] = {}
    seconds: dict[str, float] = {}
    for name in groups:
        print(f"{name} ...", flush=True)
        began = time.monotonic()
        with mounted("bpf", "/sys/fs/bpf"), tempfile.TemporaryDirectory(prefix="kmonitor-bench-") as scratch:
            result: Result = importlib.import_module(f"bench.{name}").measure(Plan(asked.quick, build.resolve(), Path(scratch)))
        seconds[name] = time.monotonic() - began
        results[name] = result
        for figure in result.figures:
            print(f"  {line(figure)}", flush=True)
        for note in result.notes:
            print(f"  note: {note}", flush=True)
    write(asked.out, results, seconds, quick=asked.quick)
    missed = [figure for result in results.values() for figure in result.figures if figure.met is False]
    print(f"{sum(seconds.values()):.0f} s; {len(missed)} targets missed; the report is in {asked.out}/results.md")


if __name__ == "__main__":
    main()
