# SPDX-License-Identifier: Apache-2.0
"""A broker that is asked to end: what it has taken is in the log, monitors have what it has routed, and it does not take for ever."""

from __future__ import annotations

import signal
import time

from tests.lab.services import Lab
from tests.robustness.rig import Rig

MIDST = 300
RATE = 300
IN_TIME_S = 8.0
"""For a broker under load, on a busy machine."""


def test_terminated_under_load(on_disk: Rig, lab: Lab) -> None:
    """Three times: exit status 0, and the next one goes on where it stopped."""
    pace = on_disk.pace(lab, "a", rate=RATE)
    tree, dying = on_disk.listener(lab, pace.tree), on_disk.listener(lab, pace.tree)
    pace.go()
    for _ in range(3):
        tree.wait_more(MIDST)
        began = time.monotonic()
        assert on_disk.end_broker() == 0
        print(f"\nended in {time.monotonic() - began:.2f} s")
        dying.kill()
        on_disk.start_broker()
        dying.again()
    tree.wait_more(MIDST)
    truth = pace.stop()
    for listener in (tree, dying):
        listener.wait_counted(truth.total)
        assert listener.account.read().differences({"a": truth}, whole=True) == []


def test_a_monitor_that_does_not_read(on_disk: Rig, lab: Lab) -> None:
    """It is waited for a moment, and no longer. It gets the rest from the next broker."""
    pace = on_disk.pace(lab, "a", rate=3_000, mix="ttttf")
    tree, silent = on_disk.listener(lab, pace.tree), on_disk.listener(lab, pace.tree)
    pace.go()
    with silent.stopped():
        tree.wait_more(15_000)
        began = time.monotonic()
        assert on_disk.end_broker() == 0
        took = time.monotonic() - began
        print(f"\nended in {took:.2f} s")
        assert took < IN_TIME_S
        on_disk.start_broker()
    tree.wait_more(MIDST)
    truth = pace.stop()
    for listener in (tree, silent):
        listener.wait_counted(truth.total)
        assert listener.account.read().differences({"a": truth}, whole=True) == []


def test_a_second_signal_forces(on_disk: Rig, lab: Lab) -> None:
    """It ends at once; what was acknowledged is in the log all the same."""
    pace = on_disk.pace(lab, "a", rate=RATE)
    tree, silent = on_disk.listener(lab, pace.tree), on_disk.listener(lab, pace.tree)
    pace.go()
    tree.wait_more(MIDST)
    with silent.stopped():
        tree.wait_more(MIDST)
        on_disk.broker.send(signal.SIGTERM)
        on_disk.broker.wait_line(lambda line: b"stopping" in line, "that it is stopping")
        began = time.monotonic()
        on_disk.broker.send(signal.SIGTERM)
        code = on_disk.broker.wait()
        print(f"\nended with {code} in {time.monotonic() - began:.2f} s")
        assert code == 130, "it was waiting for the monitor that does not read"
        on_disk.lab.expect(on_disk.broker, code)
        on_disk.lab.stop(on_disk.broker)
        on_disk.start_broker()
    tree.wait_more(MIDST)
    truth = pace.stop()
    for listener in (tree, silent):
        listener.wait_counted(truth.total)
        assert listener.account.read().differences({"a": truth}, whole=True) == []
