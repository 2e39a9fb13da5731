# SPDX-License-Identifier: Apache-2.0
"""A monitor that takes one event a second while 100,000 happen: it slows nobody down, costs bounded memory, and gets what there was."""

from __future__ import annotations

import numpy as np
import pytest

from tests.lab.services import Lab
from tests.robustness.conftest import Maker
from tests.robustness.listener import resident_bytes
from tests.robustness.rig import PATIENT, Rig

MIX = "fek" + "t" * 47
"""Mostly threads, which are soon made."""
DEEDS = {"256M": 50_000, "2M": 80_000}
"""By what the log holds: a little more than twice as many events. Of the second so many that what waits for a slow monitor elsewhere
(decision 5: up to 8 MB of records) is soon full too."""
RATE = 12_000
WARM_UP = 4_000
SLOW = ("--pace", "1", "--window", "1")
GROWTH = 96 << 20
"""What the broker may grow by, bytes: most of it is the log, of which those events take 15 MB as they came."""


@pytest.mark.timeout(150)
@pytest.mark.parametrize("log_bytes", ["256M", "2M"], ids=["the log holds all", "the log holds a part"])
def test_one_event_a_second(make_rig: Maker, lab: Lab, log_bytes: str) -> None:
    """In the end it is told of all, or of how many of which type are missing."""
    with make_rig(*PATIENT, "--log-bytes", log_bytes, nodes={"a": ()}) as rig:
        rig.narrow()
        before = rig.pace(lab, "a", rate=RATE, count=WARM_UP, mix=MIX)
        load = rig.pace(lab, "a", rate=RATE, count=DEEDS[log_bytes], mix=MIX, seed=2)
        steady = rig.listener(lab, before.tree, load.tree)
        before.go()
        truth = before.done()
        steady.wait_counted(truth.total)
        first = len(steady.account.read().delays_ns)
        alone = np.array(steady.account.delays_ns)
        small = resident_bytes(rig.broker.pid)

        slow = rig.listener(lab, load.tree, options=SLOW)
        load.go()
        of_load = load.done()
        truth += of_load
        steady.wait_counted(truth.total)
        beside = np.array(steady.account.read().delays_ns[first:])
        grown = resident_bytes(rig.broker.pid) - small
        taken = slow.account.read().delivered
        print(f"\n{of_load.total} events in {load.seconds:.1f} s, the slow one had taken {taken}; the broker grew by {grown >> 20} MB")
        print(f"the other one's delays: without it {words(alone)}, with it {words(beside)}")
        assert of_load.total > 2 * DEEDS[log_bytes]
        assert taken < 100
        assert grown < GROWTH
        # Far more than the difference of two quiet runs, and far less than if one waited for the other.
        assert np.median(beside) < np.median(alone) * 10 + 200e6
        assert steady.account.differences({"a": truth}, whole=True) == []

        slow.hurry()
        slow.wait_counted(of_load.total)
        print(f"the slow one: {slow.account.read().summary(of_load.total)}")
        assert {gap["reason"] for gap in slow.account.gaps} <= {"SUBSCRIBER"}
        assert bool(slow.account.gaps) == (log_bytes == "2M")
        assert slow.account.differences({"a": of_load}, whole=log_bytes == "256M") == []
        slow.stop()
        steady.stop()


def words(delays_ns: np.ndarray[tuple[int], np.dtype[np.int64]]) -> str:
    """For people."""
    return f"median {np.median(delays_ns) / 1e6:.1f} ms, 99 of 100 within {np.quantile(delays_ns, 0.99) / 1e6:.0f} ms"


def test_a_monitor_that_is_stopped(in_memory: Rig, lab: Lab) -> None:
    """SIGSTOP: it reads nothing at all for a while, and others do not wait for it."""
    pace = in_memory.pace(lab, "a", rate=1_500)
    stopped_one = in_memory.listener(lab, pace.tree)
    steady = in_memory.listener(lab, pace.tree)
    pace.go()
    with stopped_one.stopped():
        steady.wait_more(6_000)
    truth = pace.stop()
    for listener in (steady, stopped_one):
        listener.wait_counted(truth.total)
        assert listener.account.read().differences({"a": truth}, whole=True) == []
