# SPDX-License-Identifier: Apache-2.0
"""`kmon` with what cannot be."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess

import pytest

from tests.bad_input.refusal import refused, run_all
from tests.lab.services import Lab

NOBODY_THERE = "127.0.0.1:1"

UNKNOWN_NODE = [
    ["watch", "--node", "nosuch"],
    ["watch", "--node", "nosuch", "--pid", "1", "--json"],
    ["wait", "--node", "nosuch", "--pid", "1"],
    ["ps", "--node", "nosuch"],
]


def ids(words: list[str]) -> str:
    return " ".join(words)


@pytest.mark.parametrize("words", UNKNOWN_NODE, ids=ids)
def test_unknown_node(lab: Lab, settled: tuple[str, str], words: list[str]) -> None:
    done = lab.run("kmon", *words, "--broker", settled[0])
    refused(done, 2, "unknown node 'nosuch'", "known nodes are", settled[1])
    assert done.stdout == ""


@pytest.mark.parametrize("words", [["watch"], ["wait", "--node", "a", "--pid", "1"], ["ps", "--node", "a"], ["nodes"]], ids=ids)
def test_no_broker(lab: Lab, words: list[str]) -> None:
    with socket.socket() as taken:  # bound and not listening: nobody answers there, and nobody else can
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused(lab.run("kmon", *words, "--broker", address), 3, f"no broker answers at {address}", "kmonitor-broker", "--broker")


def test_a_node_that_is_away(lab: Lab) -> None:
    """The broker answers: it is the node that does not."""
    address = lab.broker().address
    lab.stop(lab.agent("alpha", address))
    refused(lab.run("kmon", "ps", "--node", "alpha", "--broker", address), 2, "node alpha is not connected: start its agent there")


def test_a_broker_at_its_file_limit(lab: Lab) -> None:
    """It is there: to start another one is no help."""
    broker = lab.broker(prefix=["prlimit", "--nofile=64:64"])
    host, _, port = broker.address.rpartition(":")
    with contextlib.ExitStack() as connections:
        for _ in range(80):
            connections.enter_context(socket.create_connection((host, int(port))))
        said = f"no answer from the broker at {broker.address}, though connections are taken", "limit of open files"
        refused(lab.run("kmon", "nodes", "--broker", broker.address, limit=50), 3, *said)


def test_removing_a_node(lab: Lab, settled: tuple[str, str], kmon_options: list[str]) -> None:
    """Only one that is known, and not connected."""
    refused(lab.run("kmon", "nodes", "--remove", "nosuch", *kmon_options), 2, "unknown node 'nosuch'", "known nodes are", settled[1])
    refused(lab.run("kmon", "nodes", "--remove", settled[1], *kmon_options), 2, f"node {settled[1]} is connected", "stop its agent")


def test_malformed_address(lab: Lab) -> None:
    addresses = ["moon", "moon:0", "moon:99999", ":7221", "::1:7221"]
    commands = [["kmon", "nodes", "--broker", address] for address in addresses]
    commands += [
        ["kmon", *words, "--broker", "moon"] for words in (["watch"], ["wait", "--node", "a", "--pid", "1"], ["ps", "--node", "a"])
    ]
    for command, done in zip(commands, run_all(lab, commands), strict=True):
        refused(done, 2, repr(command[-1]), "write", ":7221")


def test_dead_pid(lab: Lab, settled: tuple[str, str], dead_pid: int, kmon_options: list[str]) -> None:
    _, node = settled
    target = ["--node", node, "--pid", str(dead_pid), *kmon_options]
    done = lab.run("kmon", "watch", *target)
    refused(done, 2, "nothing to watch")
    assert f"{node}: there is no pid {dead_pid}" in done.stdout
    done = lab.run("kmon", "watch", "--json", *target)
    refused(done, 2, "nothing to watch")
    [line] = map(json.loads, done.stdout.splitlines())
    assert (line["kind"], line["state"], line["node"]) == ("registered", "NOT_FOUND", node)
    refused(lab.run("kmon", "wait", *target), 2, f"no process {dead_pid} on {node}")


def test_zombie(lab: Lab, settled: tuple[str, str], kmon_options: list[str]) -> None:
    _, node = settled
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and not waited for
        target = ["--node", node, "--pid", str(process.pid), *kmon_options]
        done = lab.run("kmon", "watch", "--json", *target)
        refused(done, 0, "has ended")  # it was there: what was watched for has happened
        assert json.loads(done.stdout)["state"] == "EXITED"
        refused(lab.run("kmon", "wait", *target), 2, str(process.pid), node)


def test_impossible_pid(lab: Lab) -> None:
    pids = ["0", "-1", "4194305", "99999999999999999999"]
    cases = [(command, pid) for command in ("watch", "wait") for pid in pids]
    commands = [["kmon", command, "--node", "a", "--pid", pid, "--broker", NOBODY_THERE] for command, pid in cases]
    for (_, pid), done in zip(cases, run_all(lab, commands), strict=True):
        refused(done, 2, f"pid {pid} ")


def test_watch_of_what_cannot_be_meant(lab: Lab) -> None:
    """Said before anybody is asked: nobody answers at the address."""
    cases = {
        ("--events", ""): "unknown event ''",
        ("--events", "0"): "the event mask is empty",
        ("--events", "0x80"): "unknown bits 0x80",
        ("--events", "-1"): "is negative",
        ("--events", "exit,moon"): "unknown event 'moon'",
        ("--node", "[a"): "malformed glob '[a' for node",
        ("--node", ""): "cannot be a node's name",
        ("--node", "a b"): "cannot be a node's name",
        ("--comm", "[a"): "malformed glob '[a' for comm",
        ("--comm", ""): "empty glob for comm",
        ("--comm", "elasticsearch-main"): "comm 'elasticsearch-main' matches nothing: it takes 18 bytes",
        ("--comm", "\udcff"): "not UTF-8",
        ("--cgroup", "/\udcff"): "not UTF-8",
        ("--uid", "-1"): "is no user's",
        ("--cgroup", "relative"): "control group 'relative'",
        ("--unit", "a b"): "systemd unit",
        ("--pidfile", "x.pid"): "pidfile 'x.pid': give an absolute path",
        ("--pidfile", ""): "pidfile '': give an absolute path",
        ("--pidfile", "/\n" + "x" * 4096): "pidfile '/\\nxxx",
        ("--pidfile", "/\udcff"): "not UTF-8",
        ("--count", "0"): "--count",
        ("--for", "soon"): "'soon' is not a duration",
    }
    commands = [["kmon", "watch", *words, "--broker", NOBODY_THERE] for words in cases]
    for said, done in zip(cases.values(), run_all(lab, commands), strict=True):
        refused(done, 2, said)
        assert done.stdout == "", done


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["wait", "--node", "[a", "--pid", "1"], "cannot be a node's name"),
        (["wait", "--node", "a", "--pidfile", "x.pid"], "pidfile 'x.pid': give an absolute path"),
        (["ps", "--node", "[a"], "cannot be a node's name"),
        (["ps", "--node", "a", "--comm", "[a"], "malformed glob '[a' for comm"),
        (["ps", "--node", "a", "--comm", "?" * 16], "matches nothing: it takes 16 bytes"),
        (["nodes", "[a"], "malformed glob '[a' for node"),
        (["ps", "--node", "a", "--uid", "-1"], "uid -1 is no user's"),
    ],
    ids=lambda value: ids(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_other_commands(lab: Lab, words: list[str], said: str, kmon_options: list[str]) -> None:
    refused(lab.run("kmon", *words, *kmon_options), 2, said)


@pytest.mark.parametrize("target", [("--cgroup", "/nosuch"), ("--unit", "nosuch.service")])
def test_group_that_is_not_there(lab: Lab, settled: tuple[str, str], target: tuple[str, str], kmon_options: list[str]) -> None:
    done = lab.run("kmon", "watch", "--node", settled[1], *target, *kmon_options)
    refused(done, 2, "nothing to watch")
    assert f"{settled[1]}: there is no " in done.stdout
    assert target[1] in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["watch", "--nosuch"],
        ["wait", "--node", "a"],
        ["wait", "--node", "a", "--pid", "1", "--pidfile", "/run/x.pid"],
        ["wait", "--node", "a", "--pidfile", "/run/x.pid", "--start-time", "5"],
        ["watch", "--pid", "x"],
    ],
    ids=ids,
)
def test_usage(lab: Lab, words: list[str]) -> None:
    refused(lab.run("kmon", *words), 2, "--")
