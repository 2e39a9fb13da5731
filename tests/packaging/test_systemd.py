# SPDX-License-Identifier: Apache-2.0
"""The units of deploy/systemd, as systemd's own checks see them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kmonitor.broker.cli import DRAIN, STOP_GRACE
from kmonitor.broker.log.sqlite import CLOSE_S

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
BIN = Path(sys.executable).parent
UNITS = ("kmonitor-agent", "kmonitor-broker", "kmonitor-keepalived")


def options(name: str) -> dict[str, str]:
    """NAME=VALUE of a file of systemd's, without its sections."""
    text = (DEPLOY / name).read_text(encoding="utf-8")
    return dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """systemd-analyze(1); skips where there is none."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze: apt-get install systemd")
    return subprocess.run(
        ["systemd-analyze", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=30
    )


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units as on a machine where kmonitor is installed: their programs must be there."""
    for name in UNITS:
        text = (DEPLOY / "systemd" / f"{name}.service").read_text(encoding="utf-8")
        (tmp_path / f"{name}.service").write_text(text.replace("/opt/kmonitor/bin", str(BIN)), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("drop_in", [False, True], ids=["", "with netlink"])
def test_systemd_finds_nothing_wrong(units: Path, drop_in: bool) -> None:
    if drop_in:
        folder = units / "kmonitor-agent.service.d"
        folder.mkdir()
        shutil.copy(DEPLOY / "systemd" / "netlink.conf", folder)
    done = analyze("verify", "--man=no", "--recursive-errors=no", *units.glob("*.service"))
    assert (done.returncode, done.stdout) == (0, "")


def test_an_error_would_be_found(units: Path) -> None:
    with (units / "kmonitor-agent.service").open("a", encoding="utf-8") as unit:
        unit.write("[Service]\nSystemCallFilter=moon\n")
    done = analyze("verify", "--man=no", "--recursive-errors=no", units / "kmonitor-agent.service")
    assert done.returncode != 0
    assert "moon" in done.stdout


@pytest.mark.parametrize("name", UNITS)
def test_exposure(units: Path, name: str) -> None:
    """At most "OK" on systemd's scale from 0 (safe) to 10: below 2.0. Offline, which takes systemd 250."""
    done = analyze("security", "--offline=yes", "--threshold=20", "--no-pager", units / f"{name}.service")
    if "--offline" in done.stdout:
        pytest.skip("needs systemd 250 or later")
    assert done.returncode == 0, done.stdout


def test_the_agents_capabilities() -> None:
    agent, netlink = options("systemd/kmonitor-agent.service"), options("systemd/netlink.conf")
    assert agent["AmbientCapabilities"] == agent["CapabilityBoundingSet"] == "CAP_BPF CAP_PERFMON"
    assert netlink["AmbientCapabilities"] == netlink["CapabilityBoundingSet"] == "CAP_NET_ADMIN"
    assert options("systemd/kmonitor-broker.service")["CapabilityBoundingSet"] == ""


def test_the_brokers_log() -> None:
    """For itself alone, where the broker looks for it, and with time to be closed."""
    broker = options("systemd/kmonitor-broker.service")
    assert (broker["StateDirectory"], broker["StateDirectoryMode"], broker["UMask"]) == ("kmonitor", "0700", "0077")
    at_most = DRAIN + STOP_GRACE + 2 * CLOSE_S  # the log waits for its batch, and then for its thread
    assert at_most < float(broker["TimeoutStopSec"].removesuffix("s"))


@pytest.mark.parametrize(("unit", "made_by"), [("kmonitor-agent", "kmonitor"), ("kmonitor-keepalived", "kmonitor-keepalived")])
def test_the_user_is_the_one_that_is_made(unit: str, made_by: str) -> None:
    user = options(f"systemd/{unit}.service")["User"]
    assert re.search(rf"^u {user} ", (DEPLOY / "sysusers.d" / f"{made_by}.conf").read_text(encoding="utf-8"), re.MULTILINE)


def test_keepaliveds_files_stay() -> None:
    """A file that vanishes means to keepalived that all is well; and what is to be said after a kill -9 is said."""
    unit = options("systemd/kmonitor-keepalived.service")
    assert unit["RuntimeDirectoryPreserve"] == "yes"
    assert unit["ExecStopPost"] == unit["ExecStartPre"] == unit["ExecStart"] + " --write-blind"
