# SPDX-License-Identifier: Apache-2.0
"""Source "bcc" beyond what it captures, which tests/capture shows: where it takes things from, and what it says when they are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kmonitor.agent.errors import CaptureError
from kmonitor.agent.pins import PinFolder
from kmonitor.agent.probe import Probe, ProbeOptions
from kmonitor.agent.sources import bcc, open_source
from tests.agent import kernel_headers
from tests.lab.requires import capture_lack, need

pytestmark = pytest.mark.capture

SMALL = ProbeOptions(ring_bytes=1 << 20)

CAPTURE_ONE = """
import asyncio, json, os, signal, subprocess, sys, time
from kmonitor.agent.interest import InterestTable
from kmonitor.agent.probe import ProbeOptions
from kmonitor.agent.sources import start
from kmonitor.v1 import agent_pb2
from kmonitor.wire.record import check_records, slots_of
source = start("bcc", ProbeOptions(ring_bytes=1 << 20), None)
child = subprocess.Popen(["sh", "-c", "echo; read line; exec sleep 1000"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()  # its own exec is over
want = agent_pb2.Interest.ProcessInterest(pid=child.pid, event_mask=0x7F, look_up=True)
answer = asyncio.run(InterestTable(source).apply(agent_pb2.Interest(version=1, processes=[want])))
child.stdin.close()
while source.ring.producer == 0:  # the exec, on another CPU
    time.sleep(0.001)
child.send_signal(signal.SIGTERM)
child.wait()
slots = slots_of(source.ring.read(1 << 20))
rows = slots[check_records(slots)]
fields = ["type", "tgid", "ppid", "uid", "gid", "cgroup_id", "start_boottime_ns", "status", "killer_tgid"]
print(json.dumps({
    "pid": child.pid, "agent": os.getpid(), "started": answer.processes[0].process.start_time,
    "rows": [
        dict(zip(fields, row[fields].tolist()), comm=row["comm"].decode(), killer=row["killer_comm"].decode(errors="replace"))
        for row in rows
    ],
}))
source.close()
"""


@pytest.fixture(autouse=True)
def _needs_capture() -> None:
    need(capture_lack)


def without_btf(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it where the kernel's BTF is hidden."""
    hide = 'mount -t tmpfs none /sys/kernel/btf && exec "$@"'
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", hide, "sh", sys.executable, "-c", script],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip


def test_a_kernel_without_btf_but_with_headers(tmp_path: Path) -> None:
    kernel_headers.make(tmp_path)
    done = without_btf(CAPTURE_ONE, BCC_KERNEL_SOURCE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    rows = told["rows"]
    assert [row["type"] for row in rows] == [0x20, 0x10, 0x40]
    for row in rows:
        own = {"tgid": told["pid"], "ppid": told["agent"], "uid": os.getuid(), "gid": os.getgid(), "start_boottime_ns": told["started"]}
        assert {name: row[name] for name in own} == own
        assert row["comm"] == "sleep"
        assert row["cgroup_id"] > 0
    assert [row["status"] for row in rows] == [0, 15, 15]
    assert rows[-1]["killer_tgid"] == told["agent"]
    assert rows[-1]["killer"].startswith("python")


def test_a_kernel_with_neither_btf_nor_headers() -> None:
    script = "from kmonitor.agent.sources import start; from kmonitor.agent.probe import ProbeOptions; start('bcc', ProbeOptions(), None)"
    done = without_btf(script)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "kmonitor.agent.errors.CaptureError: the kernel has no BTF, and its headers are not installed"
    )


def test_where_there_is_btf_headers_do_not_matter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "include/linux").mkdir(parents=True)
    (tmp_path / "include/linux/kconfig.h").write_text("#error not these", encoding="ascii")
    monkeypatch.setenv("BCC_KERNEL_SOURCE", str(tmp_path))
    open_source("bcc", SMALL, None).close()


def test_it_says_which_version_it_found() -> None:
    assert bcc.version()[0].isdigit()


def test_no_bcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bcc, "INTERPRETERS", (sys.executable,))  # the virtual environment has none
    with pytest.raises(CaptureError, match=r"^bcc is not installed: apt install python3-bpfcc"):
        open_source("bcc", SMALL, None)


def test_the_bcc_of_another_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impostor = tmp_path / "bcc.py"
    impostor.write_text("", encoding="ascii")
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\nshift\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n', encoding="ascii")
    interpreter.chmod(0o755)
    monkeypatch.setattr(bcc, "INTERPRETERS", (str(interpreter),))
    with pytest.raises(CaptureError, match="is not the BPF Compiler Collection"):
        open_source("bcc", SMALL, None)


def test_pins_keep_it_and_say_what_they_are(pins: Path) -> None:
    folder = PinFolder(pins, "bcc-node", "host")
    folder.open()
    try:
        first = open_source("bcc", SMALL, folder)
        epoch = first.epoch
        first.close()
        with pytest.raises(CaptureError, match="the pinned probe is one of source bcc: go on with --source bcc"):
            open_source("core", SMALL, folder)
        again = open_source("auto", SMALL, folder)
        assert isinstance(again, Probe)
        assert (again.name, again.adopted, again.epoch) == ("bcc", True, epoch)
        assert again.processes.look_up([os.getpid()])[os.getpid()].start_boottime_ns % 10_000_000 == 0
        again.close()
    finally:
        folder.remove()
        folder.close()


def test_no_descriptor_is_left_behind() -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    open_source("bcc", SMALL, None).close()
    assert descriptors() == before
