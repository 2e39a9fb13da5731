# SPDX-License-Identifier: Apache-2.0
"""Real-time signals by the real kernel, to a C program in the manner of 2004."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kmonitor.clients.cli.notify import Notifier, SigInfo, parse_signal
from kmonitor.wire.errors import UsageError
from tests.clients.conftest import Kmon
from tests.clients.fake_broker import EXIT, FORK, FakeBroker, batch, event

Driver = subprocess.Popen[str]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver's program, compiled."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("notify") / "notify_driver"
    subprocess.run([compiler, "-Wall", "-Wextra", "-Werror", "-O2", "-o", path, Path(__file__).with_name("notify_driver.c")], check=True)
    return path


@pytest.fixture
def driver(program: Path) -> Iterator[Driver]:
    """Running, its handler installed; for three signals."""
    with subprocess.Popen([program, "3"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def rest(driver: Driver) -> list[str]:
    """What it printed until its end."""
    assert driver.stdout is not None
    lines = driver.stdout.read().splitlines()
    assert driver.wait() == 0
    return lines


def test_the_layout_is_the_kernels() -> None:
    assert ctypes.sizeof(SigInfo) == 128
    assert (SigInfo.si_pid.offset, SigInfo.si_uid.offset, SigInfo.si_value.offset) == (16, 20, 24)


def test_signals_carry_the_event_and_are_queued(driver: Driver) -> None:
    notifier = Notifier(driver.pid, parse_signal("SIGRTMIN"))
    assert notifier.send(0x08, 1234, 0)
    assert notifier.send(0x10, 4_000_000, 1000)
    assert notifier.send(0x40, 1234, 0)
    assert rest(driver) == [
        "event=0x08 pid=1234 uid=0 code=-1",
        "event=0x10 pid=4000000 uid=1000 code=-1",
        "event=0x40 pid=1234 uid=0 code=-1",
    ]
    with pytest.raises(UsageError, match="is gone"):
        notifier.send(0x40, 1, 0)


def test_a_full_queue_is_counted(driver: Driver) -> None:
    driver.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, driver.pid, os.WSTOPPED | os.WNOWAIT)
    resource.prlimit(driver.pid, resource.RLIMIT_SIGPENDING, (4, 4))
    notifier = Notifier(driver.pid, parse_signal("SIGRTMAX-1"))
    # The limit is compared with all that is queued for the user: at least some of so many are refused.
    sent = [notifier.send(0x40, 1, 0) for _ in range(10)]
    assert not all(sent)
    assert notifier.lost == sent.count(False)


@pytest.mark.parametrize(
    ("text", "number"), [("SIGRTMIN", 34), ("sigrtmin+3", 37), ("SIGRTMAX-1", 63), ("RTMAX", 64), ("34", 34), (" SIGRTMIN ", 34)]
)
def test_signal_names(text: str, number: int) -> None:
    assert int(signal.SIGRTMIN) == 34
    assert parse_signal(text) == number


@pytest.mark.parametrize("text", ["SIGKILL", "9", "SIGRTMAX+1", "SIGRTMIN-1", "", "65", "SIGRTMIN+", "0x22"])
def test_signals_that_would_not_be_queued(text: str) -> None:
    with pytest.raises(UsageError):
        parse_signal(text)


async def test_kmon_watch_notifies(broker: FakeBroker, kmon: Kmon, driver: Driver) -> None:
    watching = await kmon("watch", "--notify", str(driver.pid), "--signal", "SIGRTMIN", "--count", "3")
    session = await broker.session()
    session.send(batch("web1", event(128, FORK, 77, child_pid=78), event(256, EXIT, 78), event(384, EXIT, 77)))
    await watching.communicate()
    assert watching.returncode == 0
    assert rest(driver) == [
        "event=0x08 pid=77 uid=1000 code=-1",
        "event=0x40 pid=78 uid=1000 code=-1",
        "event=0x40 pid=77 uid=1000 code=-1",
    ]


async def test_kmon_watch_ends_if_the_receiver_is_gone(broker: FakeBroker, kmon: Kmon, driver: Driver) -> None:
    watching = await kmon("watch", "--notify", str(driver.pid))
    session = await broker.session()
    await session.asked(1)
    driver.kill()
    driver.wait()
    session.send(batch("web1", event(128, EXIT, 78)))
    _, stderr = await watching.communicate()
    assert watching.returncode == 2
    assert stderr.decode() == f"kmon: the process to notify, {driver.pid}, is gone\n"
