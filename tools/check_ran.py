# SPDX-License-Identifier: Apache-2.0
"""Fail when the capture tests did not run: a test run that skipped them has shown nothing of what the kernel does.

    check_ran.py build/junit.xml

A capture test is one below tests/capture, or one with the marker `capture` (conftest.py writes that into the report).
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET


def problems(report: str) -> list[str]:
    """What is wrong with the report, one line each; empty if every capture test ran."""
    ran = 0
    lines = []
    for case in ET.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        marked = any(item.get("name") == "capture" for item in case.iter("property"))
        if not marked and "capture" not in name.split("::", maxsplit=1)[0].split("."):
            continue
        skipped = case.find("skipped")
        if skipped is None:
            ran += 1
        else:
            lines.append(f"{name} was skipped: {skipped.get('message')}")
    if ran == 0:
        lines.append("no capture test ran")
    return lines


def main() -> int:
    """Exit status 1 with the reasons, or 0."""
    lines = problems(sys.argv[1])
    for line in lines:
        print(line, file=sys.stderr)
    if lines:
        print("kmonitor: the capture tests must run here, as root and on a kernel with BTF", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
