# SPDX-License-Identifier: Apache-2.0
"""Monitors that come back with their cursor, to the same broker or to another one on its log: each event once, with no seam."""

from __future__ import annotations

import contextlib
import json
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.control_groups import control_group, hierarchy_lack
from tests.lab.requires import need
from tests.lab.services import Lab
from tests.lab.watch import Line, Watch
from tests.robustness.account import PROCESS, ended
from tests.robustness.conftest import Maker
from tests.robustness.listener import Listener
from tests.robustness.rig import PATIENT, SQLITE, Rig

MIDST = 300
RATE = 300
Fault = Callable[[Rig, list[Listener]], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def monitors_killed(rig: Rig, monitors: list[Listener]) -> Iterator[None]:
    for monitor in monitors:
        monitor.kill()
    yield
    for monitor in monitors:
        monitor.again()


@contextlib.contextmanager
def broker_killed(rig: Rig, monitors: list[Listener]) -> Iterator[None]:
    rig.kill_broker()
    yield
    rig.start_broker()


@contextlib.contextmanager
def both_killed(rig: Rig, monitors: list[Listener]) -> Iterator[None]:
    """The monitors come first, and wait for the broker."""
    with broker_killed(rig, monitors), monitors_killed(rig, monitors):
        yield


@contextlib.contextmanager
def all_killed(rig: Rig, monitors: list[Listener]) -> Iterator[None]:
    with both_killed(rig, monitors):
        rig.kill_agent("a")
        yield
        rig.restart_agent("a", wait=False)


@pytest.mark.parametrize("fault", [monitors_killed, broker_killed, all_killed])
def test_every_kind_of_registration(on_disk: Rig, lab: Lab, fault: Fault) -> None:
    """A tree, a node, a control group; a process that ends meanwhile, and one that ends later. While events go on."""
    need(hierarchy_lack)
    rig = on_disk
    pace, span = rig.pace(lab, "a", rate=RATE), rig.pace(lab, "a", rate=RATE, count=RATE)
    goes, stays = rig.idler(lab, "a"), rig.idler(lab, "a")
    with control_group() as group:
        group.take(pace.root.host_pid)
        tree = rig.listener(lab, pace.tree)
        wide = rig.listener(lab, {"node": "a", "events": "process"})
        within = rig.listener(lab, {"node": "a", "cgroup": group.path, "events": "all"})
        single = rig.listener(lab, {"node": "a", "pid": goes.pid, "events": "exit"}, {"node": "a", "pid": stays.pid, "events": "exit"})
        rig.agents_did("a")
        pace.go()
        tree.wait_more(MIDST)
        with fault(rig, [tree, wide, within, single]):
            span.go()
            goes.end(3)
            of_span = span.done()
        tree.wait_more(MIDST)
        stays.end(4)
        truth = pace.stop()
    lab.stop(goes, stays)
    idlers = ended(goes.pid, 3) + ended(stays.pid, 4)
    all_there_was = (truth + of_span + idlers + rig.agents_did("a")).of_types(PROCESS)
    for listener, due in ((tree, truth), (wide, all_there_was), (within, truth), (single, idlers)):
        listener.wait_counted(due.total)
        assert listener.account.read().differences({"a": due}, whole=True) == []
    assert single.account.inferred == {}
    print(f"\n{wide.account.summary(all_there_was.total)}")


def test_again_and_again(on_disk: Rig, lab: Lab) -> None:
    """A monitor that never lives for long, two lives of which may be cut off before anything was answered."""
    pace = on_disk.pace(lab, "a", rate=RATE)
    tree = on_disk.listener(lab, pace.tree)
    pace.go()
    for number in range(6):
        if number % 3:
            tree.wait_more(20)
        tree.kill()
        tree.again()
    tree.wait_more(MIDST)
    truth = pace.stop()
    tree.wait_counted(truth.total)
    assert tree.account.read().differences({"a": truth}, whole=True) == []


def test_away_for_longer_than_its_registrations_linger(make_rig: Maker, lab: Lab) -> None:
    """What came between is a gap. What was told before and comes behind is right."""
    with make_rig(*PATIENT, nodes={"a": ()}, log=SQLITE) as rig:
        pace = rig.pace(lab, "a", rate=RATE)
        tree = rig.listener(lab, pace.tree, options=("--linger", "0.5"))
        pace.go()
        tree.wait_more(MIDST)
        tree.kill()
        # The kernel's interest in the tree ends with the registration.
        rig.wait_node("a", lambda node: node["watched_processes"] == 0)
        tree.again()
        tree.wait_more(MIDST)
        truth = pace.stop()
        tree.wait_end_of(pace.pid)
        account = tree.account.read()
        assert account.wrong == []
        assert [gap["node"] for gap in account.gaps] == ["a"]
        assert account.told["a"] <= truth.counts
        assert account.ends["a"] <= truth.ends
        tree.stop()


def test_the_log_no_longer_reaches(make_rig: Maker, lab: Lab) -> None:
    """Retention took what it had not: a gap, and all that is still there."""
    with make_rig(*PATIENT, "--log-bytes", "1M", nodes={"a": ()}, log=SQLITE) as rig:
        pace = rig.pace(lab, "a", rate=3_000, mix="ttttf")
        tree, steady = rig.listener(lab, pace.tree), rig.listener(lab, pace.tree)
        pace.go()
        tree.wait_more(MIDST)
        tree.kill()
        steady.wait_more(20_000)
        tree.again()
        tree.wait_more(MIDST)
        truth = pace.stop()
        steady.wait_counted(truth.total)
        assert steady.account.read().differences({"a": truth}, whole=True) == []
        tree.wait_end_of(pace.pid)
        account = tree.account.read()
        print(f"\n{account.summary(truth.total)}")
        assert account.wrong == []
        assert account.gaps
        assert account.told["a"] <= truth.counts
        tree.stop()
        steady.stop()


def told(watches: list[Watch]) -> list[Line]:
    """Events of several runs of `kmon watch`, one after the other."""
    return [line for watch in watches for line in watch.events()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["terminated", "killed"])
def test_kmon_watch_with_a_file(on_disk: Rig, lab: Lab, tmp_path: Path, number: signal.Signals) -> None:
    """Ended in order, it goes on behind the last event that it has printed; killed, behind the last that its file has."""
    file = tmp_path / "cursor"
    pace = on_disk.pace(lab, "a", rate=RATE)
    options = ("--node", "a", "--pid", str(pace.pid), "--follow", "--events", "all", "--resume", str(file))

    def watch() -> Watch:
        started = on_disk.watch(lab, *options)
        started.wait_registered(1, "RUNNING")
        return started

    first = watch()
    pace.go()
    # The file is written behind the events: something must stand in it.
    begun = first.wait_for(lambda line: line["kind"] == "event", "an event")
    first.wait_for(lambda _: file.exists(), "the file", start=begun)
    first.send(number)
    code = first.wait()
    assert code == (143 if number == signal.SIGTERM else -9)
    lab.expect(first, code)
    saved = {at["node"]: (at["epoch"], at["position"]) for at in json.loads(file.read_text(encoding="utf-8"))["positions"]}
    second = watch()
    second.wait_for(lambda line: line["kind"] == "event", "an event")
    truth = pace.stop()
    second.wait_end_of(pace.pid)
    lab.stop(second)  # it cannot know what had been forked before it began
    events = told([first, second])
    assert first.of_kind("gap") == second.of_kind("gap") == []
    places = Counter((line["epoch"], line["position"]) for line in events)
    assert Counter(kind for (kind,) in {(line["epoch"], line["position"]): (line["type"],) for line in events}.values()) == truth.counts
    # What comes a second time lies behind what was saved.
    twice = [place for place, count in places.items() if count > 1]
    assert all(place > saved.get("a", (0, 0)) for place in twice)
    if number == signal.SIGTERM:
        assert twice == []
