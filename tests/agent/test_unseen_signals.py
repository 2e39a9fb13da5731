# SPDX-License-Identifier: Apache-2.0
"""Signals that were sent while the probe did not see it: a timer's is known all the same, and nothing is made up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from kmonitor.agent import maps
from kmonitor.agent.interest import InterestTable
from kmonitor.agent.probe import ProbeOptions
from kmonitor.agent.source import Source
from kmonitor.agent.sources import open_source
from kmonitor.v1 import agent_pb2
from kmonitor.wire.masks import EventType
from kmonitor.wire.record import F_KILLED_BY, Slots, check_records, slots_of
from tests.agent.interest import apply
from tests.lab.requires import capture_lack, need

pytestmark = pytest.mark.capture

ENDS = int(EventType.THREAD_ABORT | EventType.THREAD_EXIT | EventType.PROCESS_ABORT | EventType.PROCESS_EXIT)
ALARM = "signal.setitimer(signal.ITIMER_REAL, 0.001)"
KERNEL = (F_KILLED_BY, 0, 0, b"")
UNKNOWN = (0, 0, 0, b"")
RT_SIGQUEUEINFO = 129 if os.uname().machine == "x86_64" else 138


@pytest.fixture(scope="module", params=["core", "bcc"])
def source(request: pytest.FixtureRequest) -> Iterator[Source]:
    need(capture_lack)
    opened = open_source(request.param, ProbeOptions(ring_bytes=1 << 20), None)
    yield opened
    opened.close()


def ends(source: Source, script: str, *, unseen: bool = True) -> list[tuple[int, int, tuple[int, int, int, bytes]]]:
    """(type, signal, who sent it) of each end that a Python script comes to when it is let go, and signals are `unseen`."""
    text = f"import os, signal, threading, time\nprint(flush=True)\ninput()\n{script}\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-S", "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        want = agent_pb2.Interest.ProcessInterest(pid=child.pid, event_mask=ENDS, look_up=True)
        apply(InterestTable(source), agent_pb2.Interest(version=1, processes=[want]))
        if unseen:
            # Ends are told for the process's own entry; but nothing is written down of signals.
            source.control["any_mask"] = maps.ANY_WATCHED
        child.stdin.write(b"\n")
        child.stdin.flush()
        child.wait(20)
    data = source.ring.read(1 << 20)
    slots = slots_of(data or b"")
    rows: Slots = slots[check_records(slots)].copy()
    del data, slots
    source.ring.release(source.ring.position)
    assert set(rows["tgid"].tolist()) == {child.pid}
    who = [(int(row["flags"]) & F_KILLED_BY, int(row["killer_tgid"]), int(row["killer_uid"]), bytes(row["killer_comm"])) for row in rows]
    return list(zip(rows["type"].tolist(), (rows["status"] & 0x7F).tolist(), who, strict=True))


def process(number: int, by: tuple[int, int, int, bytes]) -> list[tuple[int, int, tuple[int, int, int, bytes]]]:
    return [(int(kind), number, by) for kind in (EventType.PROCESS_ABORT, EventType.PROCESS_EXIT)]


def test_an_alarm_is_the_kernels(source: Source) -> None:
    assert ends(source, ALARM) == process(signal.SIGALRM, KERNEL)


def test_a_timer_is_the_kernels(source: Source) -> None:
    """Of timer_create(2), which Python has not."""
    script = """
import ctypes
libc = ctypes.CDLL(None)
event = (ctypes.c_int * 16)(0, 0, signal.SIGUSR1, 0)
timer = ctypes.c_void_p()
assert libc.timer_create(1, event, ctypes.byref(timer)) == 0
assert libc.timer_settime(timer, 0, (ctypes.c_long * 4)(0, 0, 0, 1000000), None) == 0
"""
    assert ends(source, script) == process(signal.SIGUSR1, KERNEL)


@pytest.mark.parametrize(("number", "code"), [(14, 0x80), (14, -2), (15, 0x80), (10, -2), (11, 1), (11, 0x80)])
def test_what_a_process_makes_look_like_the_kernels_is_not_believed(source: Source, number: int, code: int) -> None:
    """An alarm's siginfo, a timer's, a fault's: of itself the kernel lets it write any."""
    script = f"""
import ctypes
info = (ctypes.c_int * 32)({number}, 0, {code})
assert ctypes.CDLL(None).syscall({RT_SIGQUEUEINFO}, os.getpid(), {number}, info) == 0
"""
    assert ends(source, script) == process(signal.Signals(number), UNKNOWN)


def test_behind_signals_that_wait(source: Source) -> None:
    numbers = "signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM"
    script = f"signal.pthread_sigmask(signal.SIG_BLOCK, [{numbers}])\nfor number in ({numbers}): os.kill(os.getpid(), number)\n{ALARM}"
    assert ends(source, script) == process(signal.SIGALRM, KERNEL)


def test_of_every_thread(source: Source) -> None:
    script = f"for _ in range(3): threading.Thread(target=time.sleep, args=[60], daemon=True).start()\n{ALARM}"
    told = ends(source, script)
    assert len(told) == 2 + 2 * 3
    assert {(number, by) for _, number, by in told} == {(int(signal.SIGALRM), KERNEL)}


@pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_sent_one_is_not_taken_for_the_kernel(source: Source, number: signal.Signals) -> None:
    assert ends(source, f"os.kill(os.getpid(), {int(number)})") == process(number, UNKNOWN)


def test_another_signal_of_the_kernels_that_waits(source: Source) -> None:
    """It did not kill."""
    script = f"signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\n{ALARM}\nwhile signal.SIGALRM not in signal.sigpending(): pass\n"
    assert ends(source, f"{script}os.kill(os.getpid(), signal.SIGTERM)") == process(signal.SIGTERM, UNKNOWN)
    assert ends(source, f"{script}os._exit(signal.SIGALRM)") == [(int(EventType.PROCESS_EXIT), 0, UNKNOWN)]


def test_one_that_was_seen_is_the_senders(source: Source) -> None:
    """Also if the kernel's is in the queue: that was blocked when somebody sent another, to the thread alone, which comes first."""
    script = f"signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\n{ALARM}\nwhile signal.SIGALRM not in signal.sigpending(): pass"
    script += "\nsignal.pthread_kill(threading.get_ident(), signal.SIGALRM)\nsignal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])"
    ((_, number, abort), (_, _, exit_)) = ends(source, script, unseen=False)
    assert (number, abort) == (signal.SIGALRM, exit_)
    assert abort[0] == F_KILLED_BY
    assert abort[1] not in (0, os.getpid())
