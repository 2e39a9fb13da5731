# SPDX-License-Identifier: Apache-2.0
"""The check that capture tests were not skipped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).resolve().parents[2] / "tools" / "check_ran.py"

RAN = '<testcase classname="tests.capture.test_exit" name="test_a"/>'
SKIPPED = '<testcase classname="tests.capture.test_exit" name="test_b"><skipped message="needs CAP_BPF"/></testcase>'
MARKED = """<testcase classname="tests.cluster.test_kill" name="test_c"><properties><property name="capture" value="yes"/></properties>
<skipped message="needs CAP_BPF"/></testcase>"""
OTHER = '<testcase classname="tests.wire.test_masks" name="test_d"><skipped message="no such thing"/></testcase>'


@pytest.mark.parametrize(
    ("cases", "status", "word"),
    [
        (RAN, 0, ""),
        (RAN + OTHER, 0, ""),
        (RAN + SKIPPED, 1, "test_b was skipped: needs CAP_BPF"),
        (RAN + MARKED, 1, "test_c was skipped"),
        (OTHER, 1, "no capture test ran"),
    ],
)
def test_check_ran(tmp_path: Path, cases: str, status: int, word: str) -> None:
    report = tmp_path / "junit.xml"
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>", encoding="utf-8")
    done = subprocess.run([sys.executable, CHECK, report], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == status
    assert word in done.stdout


def test_pytest_writes_the_marker_into_the_report(tmp_path: Path) -> None:
    root = CHECK.parents[1]
    (tmp_path / "test_x.py").write_text(
        "import pytest\n@pytest.mark.capture\ndef test_x() -> None:\n    pytest.skip('why')\n", encoding="utf-8"
    )
    (tmp_path / "conftest.py").write_text((root / "conftest.py").read_text(encoding="utf-8"), encoding="utf-8")
    report = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "markers=capture", f"--rootdir={tmp_path}"]
    subprocess.run([*command, f"--junitxml={report}", str(tmp_path)], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    done = subprocess.run([sys.executable, CHECK, report], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert "test_x was skipped: why" in done.stdout
