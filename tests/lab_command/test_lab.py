# SPDX-License-Identifier: Apache-2.0
"""`kmon lab`: what is done to a lab, what a monitor sees of it, and that nothing is missing behind it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kmonitor.clients.lab.processes import Process
from tests.bad_input.refusal import refused, run_all
from tests.lab.services import BIN, Lab
from tests.lab.watch import Watch
from tests.lab_command.conftest import Made, Maker

MANY = 'for code in $(seq {}); do sh -c "exit $code" & wait $!; done; exit 0'
"""That many processes, each of which ends with a code of its own."""


@pytest.fixture(scope="module")
def made(make_lab: Maker) -> Iterator[Made]:
    """Nodes a and b."""
    with make_lab("", "--nodes", "2", "--lease", "1s") as made:
        yield made


@pytest.fixture(scope="module")
def second(make_lab: Maker) -> Iterator[Made]:
    """Another one at the same time, of one node that has something to do."""
    with make_lab("x", "--nodes", "1", "--workload") as second:
        yield second


def wait_state(watch: Watch, node: str, state: str, start: int = 0) -> int:
    """Until a node is said to be in a state; where that is said."""
    return watch.wait_for(
        lambda line: line["kind"] == "node" and (line["node"], line["state"]) == (node, state), f"{node} {state}", start=start
    )


def wait_code(watch: Watch, code: int) -> None:
    """Until a process ended with a code that no other has."""
    watch.wait_for(lambda line: line.get("exit_code") == code, f"exit code {code}")


def codes(watch: Watch) -> list[int]:
    """Of the ends of shells in the order in which they were told."""
    return [line["exit_code"] for line in watch.events() if line["comm"] == "sh"]


def test_processes_of_a_node(made: Made, lab: Lab) -> None:
    """They have its pids, its host name and its files; the other node's monitor is told of none."""
    here = lab.watch(made.broker, "--node", "a", "--events", "exit")
    there = lab.watch(made.broker, "--node", "b", "--events", "exit")
    for watch in (here, there):
        watch.wait_registered(1, "ARMED")
    done = made.run("exec", "a", "--", "sh", "-c", "echo $$; hostname; ls -A /run; exit 7")
    pid, *words = done.stdout.split()
    assert (done.code, words) == (7, ["a", "kmonitor-node"]), done
    refused(made.run("exec", "a", "--", str(BIN / "kmon"), "lab", "down", "--name", made.name), 2, "this is a node of a lab")
    assert made.run("exec", "b", "sh", "-c", "kill -9 $$").code == -9
    here.wait_end_of(int(pid))
    wait = there.wait_for(lambda line: line.get("exit_signal") == 9, "its end")
    assert there.records[wait]["killed_by"]["comm"] == "sh"
    assert [line["exit_code"] for line in here.events() if line["pid"] == int(pid)] == [7]
    assert 7 not in [line.get("exit_code") for line in there.events()]
    lab.stop(here, there)


def test_a_node_is_cut_off_and_heals(made: Made, lab: Lab) -> None:
    """UNREACHABLE when its lease is over, UP; and each end of the time between, once."""
    watch = lab.watch(made.broker, "--node", "a", "--comm", "sh", "--events", "exit")
    watch.wait_registered(1, "ARMED")
    made.done("cut", "a")
    assert made.states() == {"a": "CUT", "b": "UP"}
    made.done("exec", "a", "sh", "-c", MANY.format(40))
    down = wait_state(watch, "a", "UNREACHABLE")
    assert codes(watch) == []
    made.done("heal", "a")
    wait_state(watch, "a", "UP", down)
    wait_code(watch, 40)
    watch.wait_for(lambda line: line.get("exit_code") == 0, "the last one")
    assert codes(watch) == [*range(1, 41), 0]
    assert watch.of_kind("gap") == []
    assert made.states() == {"a": "UP", "b": "UP"}
    lab.stop(watch)


def test_an_agent_is_killed_and_one_is_paused(made: Made, lab: Lab) -> None:
    """The node's processes go on, and are told of when there is an agent again."""
    watch = lab.watch(made.broker, "--comm", "sh", "--events", "exit")
    watch.wait_registered(2, "ARMED")
    made.done("kill", "--agent", "a")
    made.done("pause", "b")
    assert made.states() == {"a": "AGENT KILLED", "b": "AGENT PAUSED"}
    for node in ("a", "b"):
        made.done("exec", node, "sh", "-c", MANY.format(5))
    downs = {node: wait_state(watch, node, "UNREACHABLE") for node in ("a", "b")}
    made.done("start", "a")
    made.done("resume", "b")
    for node, down in downs.items():
        wait_state(watch, node, "UP", down)
        watch.wait_for(lambda line, node=node: line["node"] == node and line.get("exit_code") == 0, "its last one")  # type: ignore[misc]
    assert made.states() == {"a": "UP", "b": "UP"}
    for node in ("a", "b"):
        assert [line["exit_code"] for line in watch.events() if line["node"] == node] == [1, 2, 3, 4, 5, 0]
    assert watch.of_kind("gap") == []
    lab.stop(watch)


def test_a_node_loses_its_power(made: Made, lab: Lab) -> None:
    """Nothing of it says good-bye: only the lease tells. It comes back in another boot, and what was watched there has ended."""
    made.done("exec", "b", "sh", "-c", "sleep 1000 </dev/null >/dev/null 2>&1 & echo $! >/run/sleeper.pid")
    watch = lab.watch(made.broker, "--node", "b", "--pidfile", "/run/sleeper.pid", "--events", "exit")
    [answer] = watch.wait_registered(1, "RUNNING")
    assert answer["process"]["comm"] == "sleep"
    made.done("kill", "b")
    killed_ns = time.time_ns()
    at = wait_state(watch, "b", "UNREACHABLE")
    down = watch.records[at]
    # A broker that was held up itself lets the connection run into its own limit, which is later.
    assert down["reason"] == "nothing came from its agent for 1 s" or down["time_unix_nano"] > killed_ns
    status = made.status()["b"]
    assert (status["state"], status["init_pid"], status["agent_pid"]) == ("KILLED", None, None)
    made.done("kill", "b")  # it is dead
    assert made.run("exec", "b", "true").code == 2
    made.done("start", "b")
    at = wait_state(watch, "b", "REBOOTED", at)
    up = watch.records[at]
    assert up["boot_id"] != down["boot_id"]
    assert watch.wait() == 0
    assert [(line["pid"], line["inferred"]) for line in watch.events()] == [(answer["process"]["pid"], True)]
    assert made.states() == {"a": "UP", "b": "UP"}
    assert made.run("exec", "b", "test", "-e", "/run/sleeper.pid").code == 1
    boot_id = made.done("exec", "b", "cat", "/proc/sys/kernel/random/boot_id").strip()
    assert boot_id == up["boot_id"]


def test_the_broker_is_killed(made: Made, lab: Lab) -> None:
    """A monitor comes back when the next one is there, and is told of what happened meanwhile."""
    watch = lab.watch(made.broker, "--node", "a", "--comm", "sh", "--events", "exit")
    watch.wait_registered(1, "ARMED")
    made.done("kill", "broker")
    assert "broker  KILLED" in made.done("status")
    assert lab.run("kmon", "nodes", "--broker", made.broker).code == 3
    made.done("exec", "a", "sh", "-c", MANY.format(5))
    made.done("start", "broker")
    assert "broker  UP" in made.done("status")
    wait_code(watch, 5)
    watch.wait_for(lambda line: line.get("exit_code") == 0, "the last one", limit=40)
    assert codes(watch) == [1, 2, 3, 4, 5, 0]
    assert {"disconnected", "reconnected"} <= {line["kind"] for line in watch.records}
    assert watch.of_kind("gap") == []
    lab.stop(watch)
    assert "listening on" in made.done("logs", "broker")
    assert "a is connected to" in made.done("logs", "a")


def test_a_second_lab(made: Made, second: Made, lab: Lab) -> None:
    """Has the same names and addresses, and nothing to do with the first. Its workload fails now and then."""
    assert second.broker != made.broker
    assert second.status()["a"]["address"] == made.status()["a"]["address"]
    failures = lab.watch(second.broker, "--events", "exit", "--failed")
    workload = lab.watch(second.broker, "--pidfile", "/run/workload.pid", "--events", "exit")
    [answer] = workload.wait_registered(1, "RUNNING")
    assert (answer["node"], answer["process"]["comm"]) == ("a", "sh")
    wait_code(failures, 3)
    lab.stop(failures, workload)


def test_nobody_elses_process_is_killed(second: Made, lab: Lab) -> None:
    """A pid that is written down and is another's now, as when the lab's own process ended long ago."""
    sleeper = lab.command("sleep", "1000")
    known = Process.of(sleeper.pid)
    assert known is not None
    os.kill(second.status()["a"]["agent_pid"], signal.SIGKILL)
    file = Path("/run/kmonitor-lab", second.name, "lab.json")
    state = json.loads(file.read_text())
    state["processes"]["a agent"] = {"pid": sleeper.pid, "start": known.start - 1}
    file.write_text(json.dumps(state))
    refused(second.run("kill", "--agent", "a"), 2, "the agent of node a does not run")
    second.done("kill", "a")
    assert sleeper.process.poll() is None


def test_what_cannot_be_asked_of_a_lab(second: Made, lab: Lab) -> None:
    second.done("kill", "a", "broker")
    asked = {
        ("up",): f"there is a lab {second.name} already: kmon lab down",
        ("cut", "z"): "has no node z: it has a",
        ("cut", "broker"): "has no node broker",
        ("logs", "z"): "has no node z",
        ("heal", "a"): "node a does not run: kmon lab start a",
        ("kill", "--agent", "a"): "node a does not run",
        ("exec", "a", "true"): "node a does not run",
        ("pause", "broker"): "the broker does not run",
    }
    commands = [("kmon", "lab", command, "--name", second.name, *words) for command, *words in asked]
    for done, said in zip(run_all(lab, commands), asked.values(), strict=True):
        refused(done, 2, said)
