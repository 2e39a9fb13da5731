# SPDX-License-Identifier: Apache-2.0
"""A ring that runs full: what was told and what a gap counts are together what happened, type by type.

The agent has the smallest ring there is and is stopped while a workload, which counts for itself, makes far more events than
it holds. Other processes must not blur the numbers: node-wide watches are those of an agent in a pid namespace of its own.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import storm
from tests.lab.cluster import Cluster, NodeStage, running
from tests.lab.compare import Line
from tests.lab.control_groups import control_group, hierarchy_lack
from tests.lab.namespaces import namespaces_lack
from tests.lab.process import Running
from tests.lab.requires import capture_lack, need
from tests.lab.services import Lab
from tests.lab.stopped import stopped
from tests.lab.storm import Storm
from tests.lab.watch import Watch
from tests.lab.workload import Programs, Root, Stage

WORKERS = 2
RING_SLOTS = (64 << 10) // 128
MARK_SLOTS = RING_SLOTS // 4 * 3
SMALL_RING = ("--ring-size", "64K")
LEASE = ("--lease", "50s")
"""An agent that is stopped is not to be taken for one that is gone."""

Counts = Counter[str]


def truth_of(kind: str, told: Storm) -> Counts:
    """What a storm was, by event type. Its root forks the workers, and ends; so do they."""
    counts = Counter({"PROCESS_FORK": WORKERS, "PROCESS_EXIT": WORKERS + 1})
    if kind == "threads":
        return counts + Counter({"THREAD_CREATE": told.count, "THREAD_EXIT": told.count})
    counts += Counter({"PROCESS_FORK": told.count, "PROCESS_EXIT": told.count})
    return counts + Counter({"PROCESS_EXEC": told.count}) if kind == "exec" else counts


def received(watch: Watch) -> Counts:
    """What it was told, by event type. Ends that were found, not seen, are in the gap that hides them."""
    return Counter(line["type"] for line in watch.events() if not line["inferred"])


def lost(watch: Watch) -> Counts:
    """What its gaps count, by event type."""
    counts: Counts = Counter()
    for gap in watch.of_kind("gap"):
        assert gap["reason"] == "RING"
        assert gap["from_position"] <= gap["to_position"]
        assert gap["from_time_unix_nano"] <= gap["to_time_unix_nano"]
        counts += Counter({each["type"]: each["count"] for each in gap["lost"]})
    return counts


def wait_all_told(watch: Watch, truth: Counts) -> None:
    """Until events and gaps together are as many as there should be, of all types. Whether they are the right ones is for later."""
    seen = 0

    def enough(line: Line) -> bool:
        nonlocal seen
        if line["kind"] == "event":
            seen += not line["inferred"]
        elif line["kind"] == "gap":
            seen += sum(each["count"] for each in line["lost"])
        return seen >= truth.total()

    watch.wait_for(enough, f"{truth.total()} events, told or counted")


def in_order(watch: Watch) -> bool:
    """Whether positions only went up, past all gaps."""
    positions = [line["position"] for line in watch.events()]
    return all(before < after for before, after in itertools.pairwise(positions))


def run(root: Root, folder: Path) -> Storm:
    """A storm that was prepared, to its end."""
    root.say("go")
    return storm.read(root, folder)


@pytest.fixture(scope="module")
def small(pins: Path) -> Iterator[Cluster]:
    """A cluster of one node, whose ring is as small as can be."""
    need(capture_lack, namespaces_lack)
    with running(pins, *LEASE, zones={}) as cluster:
        cluster.node("small", *SMALL_RING)
        yield cluster


class Scene:
    """What the tests of one stage share: a storm in folders of its own, and processes that are watched one by one."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._numbers = itertools.count()

    def storm(self, kind: str, count: int) -> tuple[Root, Path]:
        """A storm that waits for the word, and where it writes to."""
        folder = Path(self.stage.folder, f"storm {next(self._numbers)}")
        folder.mkdir()
        return self.stage.prepare(self.stage.programs.storm, kind, str(count), str(WORKERS), str(folder)), folder

    def end(self, process: Running) -> None:
        """End a process that ends with its input."""
        process.close_input()
        process.wait()


@pytest.fixture
def scene(small: Cluster, lab: Lab, programs: Programs, tmp_path: Path) -> Scene:
    return Scene(NodeStage(lab, small, "small", programs, tmp_path))


@pytest.mark.parametrize(("kind", "count"), [("fork", 3_000), ("exec", 1_500)])
def test_a_node_wide_watch(small: Cluster, scene: Scene, lab: Lab, kind: str, count: int) -> None:
    """What matches node-wide is dropped above the mark, and the ends of watched processes get in."""
    stage = scene.stage
    watched = [stage.fence() for _ in range(40)]
    fence = stage.fence()
    root, folder = scene.storm(kind, count)
    single = stage.watch(*(process.pid for process in watched), options=["--events", "exit"])
    wide = lab.watch(stage.broker, "--node", stage.node, "--events", "fork,exec,abort,exit")
    wide.wait_registered(1, "ARMED")
    with stopped(small.agents["small"]):
        told = run(root, folder)
        for process in watched:
            scene.end(process)
    for process in watched:
        single.wait_end_of(process.pid)
    assert single.wait() == 0
    assert {line["kind"] for line in single.records} == {"registered", "event"}, "no loss there can be of its processes"
    assert Counter(line["pid"] for line in single.events()) == Counter(process.pid for process in watched)

    truth = truth_of(kind, told) + Counter({"PROCESS_EXIT": len(watched)})
    wait_all_told(wide, truth)
    got = received(wide)
    missing = lost(wide)
    print(f"\n{kind}: {truth.total()} events, {got.total()} told, {missing.total()} lost: {dict(missing)}")
    assert got + missing == truth
    # All that was watched is in the node-wide stream too, behind the mark; the rest is what fitted below it.
    assert {process.pid for process in watched} <= {line["pid"] for line in wide.events() if line["type"] == "PROCESS_EXIT"}
    assert MARK_SLOTS / 4 < got.total() <= RING_SLOTS
    assert set(missing) == set(truth), "some of each type were lost"
    assert in_order(wide)

    # No idler is started from here on: its start would be an event.
    root.wait_closed()
    lab.stop(root)
    position = wide.events()[-1]["position"]
    begun = len(wide.records)
    last, folder = scene.storm(kind, 60)
    # The new workload's own start is an event too: of its exec, as nsenter forks it outside.
    wide.wait_for(lambda line: line.get("type") == "PROCESS_EXEC" and line["pid"] == last.root_pid, "the next storm's exec", start=begun)
    before = received(wide)
    later = run(last, folder)
    scene.end(fence)
    wide.wait_end_of(fence.pid)
    assert received(wide) - before == truth_of(kind, later) + Counter({"PROCESS_EXIT": 1})
    assert lost(wide) == missing, "a later stretch is whole"
    assert min(line["position"] for line in wide.events()[got.total() :]) > position
    assert in_order(wide)
    lab.stop(wide)


@pytest.mark.parametrize("kind", ["fork", "threads"])
def test_a_followed_tree(small: Cluster, scene: Scene, lab: Lab, kind: str) -> None:
    """What a process's own entry asked for fills the ring to its end; only then is it lost, and counted as such.

    Threads go at the mark, whoever asked for them.
    """
    stage = scene.stage
    other, ended, fence = stage.fence(), stage.fence(), stage.fence()
    root, folder = scene.storm(kind, 3_000)
    missed = stage.watch(ended.pid, options=["--events", "exit"])
    follow = stage.watch(root.root_pid, fence.pid, options=["--follow", "--events", "all"])
    single = stage.watch(other.pid, options=["--events", "exit"])
    unconcerned = stage.watch(other.pid, options=["--events", "exec,abort"])
    with stopped(small.agents["small"]):
        told = run(root, folder)
        scene.end(ended)
    truth = truth_of(kind, told)
    if kind == "fork":
        truth += Counter({"PROCESS_EXIT": 1})  # that of the other process, for which there was no room either
    wait_all_told(follow, truth)
    got, missing = received(follow), lost(follow)
    print(f"\n{kind}: {truth.total()} events, {got.total()} told, {missing.total()} lost: {dict(missing)}")
    assert got + missing == truth
    assert "UNSPECIFIED" not in missing, "all were followed"
    assert in_order(follow)
    if kind == "fork":
        # To the last slot, and above the mark: nothing here goes first.
        assert RING_SLOTS - 2 <= got.total() <= RING_SLOTS
        assert set(missing) == set(truth)
    else:
        # The ends of the workers and of the root came last, and got in above the mark.
        assert set(missing) == {"THREAD_CREATE", "THREAD_EXIT"}
        assert MARK_SLOTS <= got.total() <= MARK_SLOTS + 2 * WORKERS + 8

    # It does not wait for ever for what cannot come: the end of who is not there any more is told, without a status.
    assert missed.wait() == 0
    kinds = [(line["kind"], line.get("state") or line.get("reason") or line["exit_code"]) for line in missed.records]
    if kind == "fork":
        assert kinds == [("registered", "RUNNING"), ("gap", "RING"), ("event", None)]
        assert missed.events()[-1]["inferred"]
    else:
        assert kinds == [("registered", "RUNNING"), ("event", 0)]

    scene.end(other)
    single.wait_end_of(other.pid)
    assert single.wait() == 0
    if kind == "fork":
        # Exits of watched processes were lost, and whose they were nobody knows: it might have been this one's.
        assert lost(single) == Counter({"PROCESS_EXIT": missing["PROCESS_EXIT"]})
    else:
        assert single.of_kind("gap") == []
    assert [line["pid"] for line in single.events()] == [other.pid]
    scene.end(fence)
    follow.wait_end_of(fence.pid)
    assert lost(follow) == missing
    assert follow.wait() == 0
    lab.stop(unconcerned)
    assert {line["kind"] for line in unconcerned.records} == {"registered"}, "of the types that it asked for none was lost"


FILL = 400
ORPHANAGE = f"""
echo "{{\\"ready\\":$$}}"; read go
i=0; while [ $i -lt {FILL} ]; do (:); i=$((i+1)); done
"$0" "$@"; exit $?
"""
"""Fills the ring with children of no interest, and then runs a storm: as one more child, of whose fork there is no record."""


@pytest.mark.parametrize("kind", ["fork", "exec", "threads"])
def test_a_child_whose_fork_was_lost(small: Cluster, scene: Scene, lab: Lab, kind: str) -> None:
    """It is followed all the same: all that it and its children do from then on is told."""
    stage = scene.stage
    fence, stranger = stage.fence(), stage.fence()
    folder = Path(stage.folder, "storm")
    folder.mkdir()
    root = stage.prepare(Path("/bin/sh"), "-c", ORPHANAGE, str(stage.programs.storm), kind, "40", str(WORKERS), str(folder))
    follow = stage.watch(root.root_pid, fence.pid, options=["--follow", "--events", "all"])
    other = stage.watch(stranger.pid, options=["--follow", "--events", "all"])
    with stopped(small.agents["small"]):
        root.say("go")
        at = root.wait_line(lambda text: b"ready" in text, "the storm's pid", start=1)
    orphan = json.loads(root.lines[at])["ready"]
    truth = Counter({"PROCESS_FORK": FILL + 1, "PROCESS_EXIT": FILL, "PROCESS_EXEC": 1})
    wait_all_told(follow, truth)
    assert received(follow) + lost(follow) == truth
    assert orphan not in {line.get("child_pid") for line in follow.events()}, "its fork was to be lost"
    assert orphan not in {line["pid"] for line in follow.events()}
    before, missing = received(follow), lost(follow)
    # The end of the fence is told: there is room again.
    scene.end(fence)
    follow.wait_end_of(fence.pid)

    begun = len(follow.events())
    told = run(root, folder)
    follow.wait_end_of(root.root_pid)
    assert follow.wait() == 0, "the last of the tree was told, and nothing is waited for"
    events = follow.events()[begun:]
    ends = Counter({"PROCESS_EXIT": 1})
    assert received(follow) - before == truth_of(kind, told) + ends + Counter({"PROCESS_EXIT": 1}), "and those of fence and root"
    assert lost(follow) == missing, "nothing else was lost"
    assert in_order(follow)
    assert [line["type"] for line in events if line["pid"] == orphan] == ["PROCESS_FORK"] * WORKERS + ["PROCESS_EXIT"]
    workers = {line["child_pid"] for line in events if line["pid"] == orphan and line["type"] == "PROCESS_FORK"}
    assert workers == set(told.ends)
    if kind == "threads":
        made = Counter((line["pid"], line["child_tid"]) for line in events if line["type"] == "THREAD_CREATE")
        assert made == Counter((line["pid"], line["tid"]) for line in events if line["type"] == "THREAD_EXIT") == told.started()
    else:
        made = Counter((line["pid"], line["child_pid"]) for line in events if line["type"] == "PROCESS_FORK" and line["pid"] in workers)
        assert made == told.started()
        children = {child for _, child in made}
        codes = Counter((line["pid"], line["exit_code"]) for line in events if line["type"] == "PROCESS_EXIT" and line["pid"] in children)
        assert codes == told.statuses()
    scene.end(stranger)
    other.wait_end_of(stranger.pid)
    assert {line["pid"] for line in other.events()} == {stranger.pid}
    assert other.wait() == 0


def test_a_control_group(lab: Lab, programs: Programs, tmp_path: Path) -> None:
    """Threads and processes of one group, on a machine where others do things too: the same sums."""
    need(hierarchy_lack)
    broker = lab.broker(*LEASE)
    agent = lab.agent("small", broker.address, *SMALL_RING)
    scene = Scene(Stage(lab, broker.address, "small", programs, tmp_path))
    with control_group() as group:
        roots = {kind: scene.storm(kind, 1_000) for kind in ("threads", "fork", "exec")}
        fence = scene.stage.fence()
        for root, _ in roots.values():
            group.take(root.root_pid)
        group.take(fence.pid)
        later, later_folder = scene.storm("threads", 100)
        group.take(later.root_pid)
        watch = lab.watch(broker.address, "--node", "small", "--cgroup", group.path, "--events", "all")
        watch.wait_registered(1, "ARMED")
        with stopped(agent):
            told = {kind: run(*started) for kind, started in roots.items()}
        truth = sum((truth_of(kind, storm) for kind, storm in told.items()), Counts())
        wait_all_told(watch, truth)
        got, missing = received(watch), lost(watch)
        print(f"\n{truth.total()} events, {got.total()} told, {missing.total()} lost: {dict(missing)}")
        assert got + missing == truth
        assert MARK_SLOTS - 32 < got.total() <= MARK_SLOTS + 1
        run_later = run(later, later_folder)
        scene.end(fence)
        watch.wait_end_of(fence.pid)
        assert received(watch) - got == truth_of("threads", run_later) + Counter({"PROCESS_EXIT": 1})
        assert lost(watch) == missing
        assert in_order(watch)
        lab.stop(watch)
