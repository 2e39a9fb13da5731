# SPDX-License-Identifier: Apache-2.0
"""Control groups, systemd's units and filters as targets, with processes that come and go."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from pathlib import Path

import pytest

from kmonitor.clients import connect
from kmonitor.wire.errors import UsageError
from tests.lab.control_groups import control_group, hierarchy_lack, placed_group
from tests.lab.process import Running
from tests.lab.requires import Lack, need, tools_lack
from tests.lab.services import Agent, Lab
from tests.lab.stopped import stopped
from tests.lab.watch import Line, Watch
from tests.lab.worker import Worker, worker
from tests.lab.workload import Stage

Seen = list[tuple[str, int]]


class Scene:
    """Watches of groups, and a fence in a group of its own that tells them how far they are."""

    def __init__(self, stage: Stage, agent: Running) -> None:
        self.stage = stage
        self.agent = agent
        self.fence = stage.fence()

    def worker(self) -> Worker:
        return worker(self.stage.lab)

    def watch(self, *target: str, state: str = "ARMED") -> Watch:
        """Of a target, and of the fence."""
        lab, stage = self.stage.lab, self.stage
        watch = lab.watch(stage.broker, "--node", stage.node, "--events", "all", *target, "--pid", str(self.fence.pid))
        answers = watch.wait_registered(2)
        assert sorted(answer["state"] for answer in answers) == sorted([state, "RUNNING"])
        return watch

    def finish(self, *watches: Watch) -> list[list[Line]]:
        """What each was told of until now, but for the fence."""
        self.fence.close_input()
        self.fence.wait()
        for watch in watches:
            watch.wait_end_of(self.fence.pid)
            assert watch.of_kind("gap") == []
        self.stage.lab.stop(*watches)
        return [[line for line in watch.events() if line["pid"] != self.fence.pid] for watch in watches]


@pytest.fixture
def scene(stage: Stage, module_lab: Lab) -> Scene:
    need(hierarchy_lack)
    return Scene(stage, next(process for process in module_lab.running if isinstance(process, Agent)))


def short(lines: list[Line]) -> Seen:
    """Type and pid of each event, and for a fork the child's pid."""
    return [(line["type"], line.get("child_pid") or line["pid"]) for line in lines]


def shift(lines: list[Line], by: Worker) -> Seen:
    """What a shift of a worker looks like; its children's pids are those that the lines say."""
    children = [line["child_pid"] for line in lines if line["type"] == "PROCESS_FORK" and line["pid"] == by.pid]
    return [(kind, child) for child in children for kind in ("PROCESS_FORK", "PROCESS_EXEC", "PROCESS_EXIT")]


@pytest.mark.knows("control groups")
def test_processes_that_enter_and_leave(scene: Scene) -> None:
    with control_group() as group:
        comes, goes, ends = scene.worker(), scene.worker(), scene.worker()
        group.take(goes.pid)
        watch = scene.watch("--cgroup", group.path)
        comes.work()  # outside: nothing
        group.take(comes.pid)
        comes.work()
        comes.end(3)
        goes.work()
        group.leave(goes.pid)
        goes.work()
        goes.end(4)
        group.take(ends.pid)
        ends.end(5)
        (events,) = scene.finish(watch)
        expected = [
            *shift([line for line in events if line["pid"] == comes.pid], comes),
            ("PROCESS_EXIT", comes.pid),
            *shift([line for line in events if line["pid"] == goes.pid], goes),
            ("PROCESS_EXIT", ends.pid),
        ]
        assert short(events) == expected
        assert len(expected) == 3 + 1 + 3 + 1
        assert {line["cgroup_id"] for line in events} == {group.id}
        assert [line["exit_code"] for line in events if line["pid"] in (comes.pid, ends.pid) and line["type"] == "PROCESS_EXIT"] == [3, 5]


@pytest.mark.knows("control groups")
def test_groups_within_groups(scene: Scene) -> None:
    """A group stands for all below it. Who watches two of them hears of each event in its own place."""
    with control_group() as group:
        inner = group.group("inner")
        deep = inner.group("a/b/c/d/e/f/g/h")
        beside = group.group("beside")
        above, below, other = scene.worker(), scene.worker(), scene.worker()
        group.take(above.pid)
        deep.take(below.pid)
        beside.take(other.pid)
        whole, part = scene.watch("--cgroup", group.path), scene.watch("--cgroup", inner.path)
        for code, each in enumerate((above, below, other)):
            each.work()
            each.end(code)
        of_whole, of_part = scene.finish(whole, part)
        assert [line["pid"] for line in of_whole if line["type"] == "PROCESS_FORK"] == [above.pid, below.pid, other.pid]
        assert len(of_whole) == 3 * 4
        assert [line["cgroup_id"] for line in of_whole] == [group.id] * 4 + [deep.id] * 4 + [beside.id] * 4
        assert [line["position"] for line in of_part] == [line["position"] for line in of_whole[4:8]]


def answers(watch: Watch, target: str) -> list[str]:
    """What was said of a target, in order."""
    return [line["state"] for line in watch.of_kind("registered") if line["target"] == target]


@pytest.mark.knows("control groups")
def test_a_group_that_is_removed(scene: Scene) -> None:
    """Who watches it is told that it is over."""
    with control_group() as group:
        inner = group.group("inner")
        first = scene.worker()
        inner.take(first.pid)
        watch = scene.watch("--cgroup", inner.path)
        first.end(1)
        inner.remove()
        watch.wait_for(lambda line: line["kind"] == "registered" and line["state"] == "EXITED", "the group's end")
        (events,) = scene.finish(watch)
        assert short(events) == [("PROCESS_EXIT", first.pid)]
        assert answers(watch, f"control group {inner.path}") == ["ARMED", "EXITED"]


@pytest.mark.knows("control groups")
@pytest.mark.parametrize("by", ["path", "unit"])
def test_a_group_that_is_made_anew(scene: Scene, by: str) -> None:
    """As systemd does when it restarts a unit: the name goes on to be watched, from when that is said."""
    own = f"kmtest{os.getpid()}.service"
    with placed_group(f"system.slice/{own}") as first:
        worker = scene.worker()
        first.take(worker.pid)
        what, name = ("control group", first.path) if by == "path" else ("unit", own)
        watch = scene.watch("--cgroup" if by == "path" else "--unit", name)
        worker.end(1)
        # The two at once, as far as the agent can see: it looks every so often.
        with stopped(scene.agent):
            was = first.id
            first.remove()
            second = first.again()
            assert second.id != was
        said = watch.wait_for(lambda line: line["kind"] == "registered" and line["state"] == "ARMED", "the first answer")
        watch.wait_for(lambda line: line["kind"] == "registered" and line["state"] == "ARMED", "the second", start=said + 1)
        later = scene.worker()
        second.take(later.pid)
        later.end(2)
        (events,) = scene.finish(watch)
        assert short(events) == [("PROCESS_EXIT", worker.pid), ("PROCESS_EXIT", later.pid)]
        assert answers(watch, f"{what} {name}") == ["ARMED", "ARMED"]


@pytest.mark.knows("control groups")
@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("system.slice/{}.service", "{}.service"),
        ("{}.service", "{}.service"),
        ("system.slice/system-{}.slice/{}@bar.service", "{}@bar.service"),
        (r"system.slice/{}\x2dwith\x2ddashes.service", r"{}\x2dwith\x2ddashes.service"),
        (r"system.slice/system-{}\x2dtemplate.slice/{}\x2dtemplate@dev-sda1:x.service", r"{}\x2dtemplate@dev-sda1:x.service"),
        ("user.slice/user-54321.slice/user@54321.service", "user@54321.service"),
        ("user.slice/user-54321.slice/session-{}.scope", "session-{}.scope"),
        ("system.slice/docker-{}0123456789abcdef.scope", "docker-{}0123456789abcdef.scope"),
        ("machine.slice/machine-{}.scope", "machine-{}.scope"),
        ("{}.slice", "{}.slice"),
        ("{}.slice/{}-inner.slice", "{}-inner.slice"),
        # Names that an attribute of a group may have are escaped: cg_escape() of systemd.
        ("system.slice/__{}.service", "_{}.service"),
        ("system.slice/_cpu.{}.service", "cpu.{}.service"),
    ],
)
def test_units(scene: Scene, folder: str, name: str) -> None:
    """By name alone, wherever the service manager puts the unit."""
    own = f"kmtest{os.getpid()}"
    with placed_group(folder.replace("{}", own)) as group:
        inside, outside = scene.worker(), scene.worker()
        group.take(inside.pid)
        watch = scene.watch("--unit", name.replace("{}", own))
        outside.end(1)
        inside.work()
        inside.end(9)
        (events,) = scene.finish(watch)
        assert short(events) == [*shift(events, inside), ("PROCESS_EXIT", inside.pid)]
        assert len(events) == 4
        assert {line["cgroup_id"] for line in events} == {group.id}


ELSEWHERE = [
    "user.slice/user-54321.slice/user@54321.service/app.slice/{}",
    "user.slice/user-54321.slice/user@54321.service/{}",
    "user.slice/user-54321.slice/user@54321.service/system.slice/{}",
    "user.slice/user-54321.slice/session-7.scope/{}",
    "system.slice/docker-0123456789abcdef.scope/system.slice/{}",
    "system.slice/docker-0123456789abcdef.scope/init.scope/{}",
    "system.slice/kmtest-delegated.service/{}",
    "machine.slice/systemd-nspawn@kmtest.service/payload/system.slice/{}",
    "machine.slice/libpod-0123456789abcdef.scope/container/system.slice/{}",
    "kubepods.slice/kubepods-pod1.slice/cri-containerd-0123456789abcdef.scope/system.slice/{}",
    "docker/0123456789abcdef/system.slice/{}",
    "lxc.payload.kmtest/system.slice/{}",
    "init.scope/system.slice/{}",
    "kmtest.slice/other.slice/{}",
]
"""Where groups that are named as a system unit's are none: a user's manager, a container, a machine or whoever owns a part of the tree has
made them. The last is in no folder that systemd could make."""


@pytest.mark.knows("control groups")
def test_what_is_named_as_a_unit_and_is_none(scene: Scene) -> None:
    """It is never taken for the unit, not even while the unit itself has no group."""
    name = f"kmtest{os.getpid()}.service"
    with contextlib.ExitStack() as stack:
        others = []
        for folder in ELSEWHERE:
            worker = scene.worker()
            stack.enter_context(placed_group(folder.format(name))).take(worker.pid)
            others.append(worker)
        nothing = scene.watch("--unit", name, state="NOT_FOUND")
        assert listed(scene, name) == []
        with placed_group(f"system.slice/{name}") as group:
            inside = scene.worker()
            group.take(inside.pid)
            watch = scene.watch("--unit", name)
            assert listed(scene, name) == [inside.pid]
            others.pop().end(1)
            inside.end(9)
        # The unit's group is gone: that of another is no successor.
        watch.wait_for(lambda line: line["kind"] == "registered" and line["state"] == "EXITED", "the end of the unit")
        for other in others:
            other.end(1)
        nothing_told, events = scene.finish(nothing, watch)
        assert nothing_told == []
        assert short(events) == [("PROCESS_EXIT", inside.pid)]
        assert answers(watch, f"unit {name}") == ["ARMED", "EXITED"]


def listed(scene: Scene, unit: str) -> list[int]:
    """Who is in the unit, as the node lists it."""

    async def ask() -> list[int]:
        async with connect(scene.stage.broker) as monitor:
            return [process.pid for process in (await monitor.list_group(scene.stage.node, unit=unit)).processes]

    return asyncio.run(ask())


@pytest.mark.knows("control groups")
def test_two_groups_that_may_be_the_unit(scene: Scene) -> None:
    """Neither is taken: both are named."""
    stage, name = scene.stage, f"kmtest{os.getpid()}.service"
    paths = f"/kmtest{os.getpid()}.slice/{name}", f"/system.slice/{name}"
    with placed_group(paths[0].lstrip("/")), placed_group(paths[1].lstrip("/")):
        said = f"unit {name} has two control groups, {paths[0]} and {paths[1]}"
        done = stage.lab.run("kmon", "watch", "--broker", stage.broker, "--node", stage.node, "--unit", name, "--for", "10s")
        assert done.code != 0
        assert said in done.stderr
        assert "Traceback" not in done.stderr
        with pytest.raises(UsageError, match=said):
            listed(scene, name)


@pytest.mark.knows("control groups")
def test_a_host_with_the_old_hierarchies_only(lab: Lab) -> None:
    need(hierarchy_lack, lambda: tools_lack(Lack.NAMESPACES, "unshare", "umount"))
    broker = lab.broker()
    script = 'while umount -l "$(awk \'$3 == "cgroup2" {print $2; exit}\' /proc/self/mounts)" 2>/dev/null; do :; done; exec "$@"'
    lab.agent("old", broker.address, prefix=["unshare", "--mount", "sh", "-c", script, "sh"])
    for target in (("--cgroup", "/some/group"), ("--unit", "nginx.service")):
        done = lab.run("kmon", "watch", "--json", "--broker", broker.address, "--node", "old", *target, "--for", "10s")
        assert "no cgroup2 is mounted on this node: control groups and units can be watched with version 2 only" in done.stderr
        assert done.code != 0
    # All else works there.
    process = lab.command("cat")
    watch = lab.watch(broker.address, "--node", "old", "--pid", str(process.pid), "--events", "exit")
    watch.wait_registered(1, "RUNNING")
    process.close_input()
    watch.wait_end_of(process.pid)
    assert watch.wait() == 0


def test_names_users_and_failures(stage: Stage) -> None:
    """Filters of a watch of everything. Other processes of the machine are none of this name, or this user's."""
    need(lambda: tools_lack(Lack.SETPRIV, "setpriv"))
    uid, name = 54321, f"kmt{os.getpid()}"
    shells = {}
    stage.folder.chmod(0o755)
    for kind in ("good", "bad"):
        shells[kind] = Path(stage.folder, f"{name}{kind}")
        shutil.copy("/bin/sh", shells[kind])
    watches = {
        "comm": ("--comm", f"{name}*"),
        "one": ("--comm", f"{name}b?d"),
        "uid": ("--uid", str(uid)),
        "failed": ("--failed", "--comm", f"{name}*"),
        "both": ("--comm", f"{name}*", "--uid", str(uid)),
    }
    started: dict[str, Watch] = {}
    for key, words in watches.items():
        started[key] = stage.lab.watch(stage.broker, "--node", stage.node, "--events", "exit,abort", *words)
        started[key].wait_registered(1, "ARMED")
    execs = stage.lab.watch(stage.broker, "--node", stage.node, "--events", "exec")
    execs.wait_registered(1, "ARMED")
    pids: dict[str, int] = {}
    user = ["setpriv", f"--reuid={uid}", "--clear-groups"]
    scenes = {
        "root good": [str(shells["good"]), "-c", "read go; exit 0"],
        "root bad": [str(shells["bad"]), "-c", "read go; exit 3"],
        "root killed": [str(shells["bad"]), "-c", "read go; kill -9 $$"],
        "user good": [*user, str(shells["good"]), "-c", "read go; exit 0"],
        "user bad": [*user, str(shells["bad"]), "-c", "read go; exit 4"],
        "user other": [*user, "/bin/sh", "-c", "read go; exit 5"],
        # Seen by each of the watches: the fence.
        "last": [*user, str(shells["bad"]), "-c", "read go; exit 6"],
    }
    for key, argv in scenes.items():
        process = stage.lab.command(*argv)
        pid, comm = process.pid, Path(argv[argv.index("-c") - 1]).name
        # A source that reads names in /proc knows them when it tells of the exec; of one that is gone by then it cannot.
        execs.wait_for(
            lambda line, pid=pid, comm=comm: line["kind"] == "event" and (line["pid"], line["comm"]) == (pid, comm),  # type: ignore[misc]
            f"exec of {comm} by {pid}",
        )
        pids[key] = pid
        process.say("go")
        process.wait()
    stage.lab.stop(execs)
    expected = {
        "comm": ["root good", "root bad", "root killed", "user good", "user bad"],
        "one": ["root bad", "root killed", "user bad"],
        "uid": ["user good", "user bad", "user other"],
        "failed": ["root bad", "root killed", "user bad"],
        "both": ["user good", "user bad"],
    }
    for key, watch in started.items():
        watch.wait_end_of(pids["last"])
        stage.lab.stop(watch)
        exits = [line["pid"] for line in watch.events() if line["type"] == "PROCESS_EXIT"]
        assert exits == [pids[process] for process in (*expected[key], "last")], key
        aborts = [line["pid"] for line in watch.events() if line["type"] == "PROCESS_ABORT"]
        assert aborts == [pids[process] for process in expected[key] if process == "root killed"], key
