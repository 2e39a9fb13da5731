# SPDX-License-Identifier: Apache-2.0
"""One path, another file on each node."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.test_faults import ends, wait_answer, wait_change
from tests.lab.cluster import Cluster
from tests.lab.namespaces import Machine
from tests.lab.services import Lab
from tests.lab.watch import Watch

Place = Callable[[Machine], Path]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Give a node a folder of its own at this path, in its mount namespace; the path of a pidfile there."""
    machines: list[Machine] = []

    def mount(machine: Machine) -> Path:
        machine.beside_it("mount", "-t", "tmpfs", "pidfiles", tmp_path)
        machines.append(machine)
        return tmp_path / "daemon.pid"

    yield mount
    for machine in machines:
        machine.beside_it("umount", tmp_path)


def write(machine: Machine, file: Path, text: object) -> None:
    (machine.root / file.relative_to("/")).write_text(f"{text}\n", encoding="ascii")


def running(watch: Watch, start: int = 0) -> dict[str, int]:
    """Node -> pid of the process that the node found, in the lines from `start` on."""
    found = [line for line in watch.records[start:] if line["kind"] == "registered" and line["state"] == "RUNNING"]
    return {line["node"]: line["process"]["pid"] for line in found}


def test_each_node_reads_its_own(cluster: Cluster, lab: Lab, place: Place) -> None:
    """Each with a pid of its own; where there is no file, or none that names a process, the others are watched all the same."""
    machines = dict(cluster.machines)
    idlers = {name: machines[name].idler(lab) for name in ("a", "b")}
    paths = {name: place(machine) for name, machine in machines.items()}
    file = paths["a"]
    for name, idler in idlers.items():
        write(machines[name], file, idler.pid)
    target = f"pidfile {file}"
    watch = lab.watch(cluster.address, "--node", "[abc]", "--pidfile", str(file), "--events", "exit")
    watch.wait_registered(3)
    wait_answer(watch, "c", "NOT_FOUND", target)
    assert running(watch) == {name: idler.pid for name, idler in idlers.items()}
    write(machines["c"], file, "none")
    other = lab.watch(cluster.address, "--node", "[abc]", "--pidfile", str(file), "--events", "exit")
    [refused] = [line for line in other.wait_registered(3) if line["node"] == "c"]
    assert refused["error"] == f"node c: pidfile '{file}' has no process id in its first line"
    for code, (name, idler) in enumerate(idlers.items(), 1):
        idler.end(code)
        for monitor in (watch, other):
            monitor.wait_for(lambda line, name=name: line["kind"] == "event" and line["node"] == name, f"the exit on {name}")  # type: ignore[misc]
    expected = [(name, idler.pid, code) for code, (name, idler) in enumerate(idlers.items(), 1)]
    for monitor in (watch, other):
        assert ends(monitor) == expected
        assert monitor.wait() == 0
    lab.stop(*idlers.values())


def test_a_node_that_was_away(cluster: Cluster, lab: Lab, place: Place) -> None:
    """What was armed before is watched still, though the file names another process by now. Who was told UNREACHABLE gets that one."""
    machine = cluster.machines["b"]
    file = place(machine)
    first, second = machine.idler(lab), machine.idler(lab)
    target = f"pidfile {file}"
    write(machine, file, first.pid)
    watch = lab.watch(cluster.address, "--node", "b", "--pidfile", str(file), "--events", "exit")
    watch.wait_registered(1, "RUNNING")
    cluster.lab.kill(cluster.agents["b"])
    wait_change(watch, "b", "UNREACHABLE")
    late = lab.watch(cluster.address, "--node", "b", "--pidfile", str(file), "--events", "exit")
    late.wait_registered(1, "NODE_UNREACHABLE")
    write(machine, file, second.pid)
    again = len(watch.records)
    cluster.node("b", "--label", "zone=east")
    wait_answer(watch, "b", "RUNNING", target, again)
    wait_answer(late, "b", "RUNNING", target)
    assert (running(watch, again), running(late)) == ({"b": first.pid}, {"b": second.pid})
    first.end(1)
    watch.wait_end_of(first.pid)
    second.end(2)
    late.wait_end_of(second.pid)
    assert (ends(watch), ends(late)) == ([("b", first.pid, 1)], [("b", second.pid, 2)])
    assert watch.wait() == late.wait() == 0
    lab.stop(first, second)


def test_a_node_that_joins_later(cluster: Cluster, lab: Lab, place: Place) -> None:
    machine = cluster.machines["late"] = cluster.net.machine(cluster.lab, "late")
    file, idler = place(machine), machine.idler(lab)
    write(machine, file, idler.pid)
    watch = lab.watch(cluster.address, "--node", "la*", "--pidfile", str(file), "--events", "exit")
    watch.wait_registered(1, "NO_NODE")
    cluster.node("late")
    wait_answer(watch, "late", "RUNNING", f"pidfile {file}")
    idler.end(4)
    watch.wait_end_of(idler.pid)
    assert ends(watch) == [("late", idler.pid, 4)]
    assert watch.wait() == 0
    lab.stop(idler)
