# SPDX-License-Identifier: Apache-2.0
"""An agent in a time namespace: the kernel times events by the machine's clocks, which are not this agent's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.requires import Lack, capture_lack, need, skip, tools_lack

pytestmark = pytest.mark.capture

START_AND_CLOSE = """
from kmonitor.agent.probe import ProbeOptions
from kmonitor.agent.sources import open_source
open_source({!r}, ProbeOptions(ring_bytes=65536), None).close()
"""


@pytest.fixture(autouse=True)
def _needs_time_namespaces() -> None:
    need(capture_lack, lambda: tools_lack(Lack.NAMESPACES, "unshare"))
    if not Path("/proc/self/timens_offsets").exists():
        skip(Lack.NAMESPACES, "this kernel has none of time")


def within(offset_s: int, *command: str) -> subprocess.CompletedProcess[str]:
    clocks = ["--boottime", str(offset_s), "--monotonic", str(offset_s)]
    return subprocess.run(["unshare", "--time", *clocks, *command], capture_output=True, text=True, timeout=50, check=False)


@pytest.mark.parametrize("source", ["auto", "core", "bcc", "netlink"])
def test_it_does_not_start(source: str) -> None:
    done = within(100_000, sys.executable, "-m", "kmonitor.agent.cli", "--node", "elsewhen", "--source", source, "--no-pin")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "100000 s off the machine's" in line
    assert "nsenter --time=/proc/1/ns/time" in line


def test_the_check_says_so() -> None:
    done = within(-10, sys.executable, "-m", "kmonitor.agent.cli", "--check")
    assert done.returncode == 2
    assert done.stdout.count("-10 s off the machine's") == 3


@pytest.mark.parametrize("source", ["core", "netlink"])
def test_a_namespace_with_the_machines_clocks_is_as_good_as_any(source: str) -> None:
    done = within(0, sys.executable, "-c", START_AND_CLOSE.format(source))
    assert done.returncode == 0, done.stderr
