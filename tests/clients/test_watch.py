# SPDX-License-Identifier: Apache-2.0
"""`kmon watch` as a user runs it: its lines, its ends, its exit statuses."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from asyncio.subprocess import Process
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.clients.conftest import Kmon
from tests.clients.fake_broker import ABORT, EXEC, EXIT, FORK, RUNNING, FakeBroker, batch, event, gap, process_of, progress, registered

COMMON = [
    "kind",
    "node",
    "type",
    "pid",
    "tid",
    "ppid",
    "uid",
    "gid",
    "comm",
    "time",
    "start_time",
    "cgroup_id",
    "epoch",
    "position",
    "inferred",
    "boot_id",
]
DEATH = ["exit_code", "exit_signal", "core_dumped", "oom_killed", "killed_by"]


async def ended(process: Process) -> tuple[int, str, str]:
    stdout, stderr = await process.communicate()
    assert process.returncode is not None
    assert b"Traceback" not in stderr
    return process.returncode, stdout.decode(), stderr.decode()


async def next_line(process: Process) -> dict[str, Any]:
    assert process.stdout is not None
    found: dict[str, Any] = json.loads(await process.stdout.readline())
    return found


async def test_json_lines(broker: FakeBroker, kmon: Kmon) -> None:
    watching = await kmon("watch", "--json", "--count", "4", "--events", "all")
    session = await broker.session()
    nasty = 'a"\\\n\x1b['
    session.send(
        batch(
            "web1",
            event(128, FORK, 5, child_pid=6, child_tid=6, child_start_time=2**63),
            event(256, EXEC, 6, filename="/bin/ls", args=["ls", "-l", nasty], args_truncated=True, comm=nasty),
        ),
        gap(),
        progress(300),
        batch(
            "web1",
            event(384, ABORT, 6, exit_signal=9, core_dumped=True, killed_by={"pid": 1, "comm": "sh", "uid": 0}),
            event(512, EXIT, 5, exit_code=0),
            event(640, EXIT, 7),
        ),
    )
    status, out, err = await ended(watching)
    assert (status, err) == (0, "")
    registered, fork, execed, hole, abort, end = [json.loads(line) for line in out.splitlines()]
    assert (registered["kind"], registered["state"], registered["node"]) == ("registered", "ARMED", "web1")
    assert list(fork) == [*COMMON, "child_pid", "child_tid", "child_start_time"]
    assert list(execed) == [*COMMON, "filename", "args", "args_truncated"]
    assert list(abort) == list(end) == COMMON + DEATH
    assert {line["boot_id"] for line in (registered, fork, execed, abort, end)} == {"boot-1"}
    assert (fork["type"], fork["child_start_time"], fork["time"]) == ("PROCESS_FORK", 2**63, 1_700_000_000_123_456_789)
    assert (execed["comm"], execed["args"], execed["args_truncated"]) == (nasty, ["ls", "-l", nasty], True)
    assert [abort[key] for key in DEATH] == [None, 9, True, False, {"pid": 1, "comm": "sh", "uid": 0}]
    assert [end[key] for key in DEATH] == [0, None, False, False, None]
    assert (hole["kind"], hole["reason"], hole["lost"]) == ("gap", "RING", [{"type": "PROCESS_EXIT", "count": 3}])


async def test_each_line_is_there_at_once(broker: FakeBroker, kmon: Kmon) -> None:
    watching = await kmon("watch", "--json", "--progress")
    assert (await next_line(watching))["kind"] == "registered"
    session = await broker.session()
    for at in range(1, 4):
        session.send(batch("web1", event(128 * at, EXIT, at)))
        assert (await next_line(watching))["pid"] == at  # before the next is even sent
    session.send(progress(1000))
    assert (await next_line(watching)) == {
        "kind": "progress",
        "nodes": [{"node": "web1", "epoch": 7, "position": 1000, "time_unix_nano": 1}],
        "number": 0,
        "log_id": 0,
    }
    watching.send_signal(signal.SIGINT)
    assert await ended(watching) == (0, "", "")


async def test_for_people(broker: FakeBroker, kmon: Kmon) -> None:
    watching = await kmon("watch", "--count", "4")
    (await broker.session()).send(
        batch(
            "web1",
            event(128, FORK, 5, child_pid=6, child_tid=6, child_start_time=10**9, comm="bash"),
            event(256, EXEC, 6, filename="/usr/bin/ls", args=["ls", "-l", "a b"], comm="ls\x1b[2J"),
            event(384, ABORT, 6, exit_signal=9, core_dumped=True, killed_by={"pid": 4711, "comm": "kill", "uid": 0}),
            event(512, EXIT, 6, exit_code=1, time=1_700_000_001_123_456_789, start_time=10**9),
        ),
        gap(),
    )
    status, out, _ = await ended(watching)
    assert status == 0
    assert "\x1b" not in out  # no colour into a pipe, and no process's name steers a terminal
    notice, *lines = out.splitlines()
    assert notice.startswith("── web1: watching everything for fork, abort, exec, exit ───")
    columns = [line.split(maxsplit=3)[1:] for line in lines]
    assert [" ".join(column[:2]) for column in columns] == ["web1 FORK", "web1 EXEC", "web1 ABORT", "web1 EXIT"]
    assert lines[0].endswith("bash             → 6")
    assert lines[1].endswith("/usr/bin/ls -l 'a b'")
    assert "ls\\x1b[2J" in lines[1]
    assert lines[2].endswith("SIGKILL by kill(4711) uid 0 (core dumped)")
    assert lines[3].endswith("code 1  after 1.00 s")


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["--events", "exit,bogus"], 2, "unknown event 'bogus'"),
        (["--events", "0"], 2, "the event mask is empty"),
        (["--events", "0x80"], 2, "unknown bits 0x80"),
        (["--node", "web["], 2, "malformed glob 'web['"),
        (["--comm", "[a"], 2, "malformed glob '[a'"),
        (["--pid", "0"], 2, "pid 0 names no process"),
        (["--pid", "x"], 2, "--pid"),
        (["--uid", "-1"], 2, "is no user's"),
        (["--cgroup", "system.slice"], 2, "control group"),
        (["--for", "soon"], 2, "'soon' is not a duration"),
        (["--count", "0"], 2, "--count"),
        (["--signal", "SIGTERM"], 2, "no real-time signal"),
        (["--notify", "0"], 2, "pid 0 names no process"),
        (["--nonsense"], 2, "--nonsense"),
        (["--label", "zone"], 2, "write NAME=VALUE"),
        (["--label", "a=1,a=2"], 2, "label a is given twice"),
        (["--resume", "/nosuch/dir/file"], 2, "/nosuch/dir"),
        (["--broker", "nowhere"], 2, "is no broker address"),
    ],
)
async def test_mistakes(kmon: Kmon, args: list[str], status: int, words: str) -> None:
    got, out, err = await ended(await kmon("watch", *args))
    assert (got, out) == (status, "")
    assert words in err
    assert err.startswith("kmon: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        ([], {"event_mask": 0x78}),
        (["--failed"], {"event_mask": EXIT, "failures": True}),  # a process that died is one event
        (["--failed", "--events", "process"], {"event_mask": 0x78, "failures": True}),
        (["--node", "web1,db[1,2]", "--node", "x"], {"event_mask": 0x78, "names": ["web1", "db[1,2]", "x"]}),
        (["--label", "zone=west,role=web"], {"event_mask": 0x78, "labels": {"zone": "west", "role": "web"}}),
        (["--label", "zone=west", "--label", "role="], {"event_mask": 0x78, "labels": {"zone": "west", "role": ""}}),
        (["--for", "1d"], {"event_mask": 0x78}),
    ],
)
async def test_what_is_asked_for(broker: FakeBroker, kmon: Kmon, args: list[str], wanted: dict[str, Any]) -> None:
    await kmon("watch", *args)
    session = await broker.session()
    await session.asked(1)
    asked = next(each.register.registration for each in session.requests if each.WhichOneof("kind") == "register")
    found = {
        "event_mask": asked.event_mask,
        "failures": asked.filter.failures_only,
        "names": [*asked.nodes.names],
        "labels": {**asked.nodes.labels},
    }
    assert found == {"failures": False, "names": [], "labels": {}} | wanted


async def test_the_heading_tells_the_filters(broker: FakeBroker, kmon: Kmon) -> None:
    broker.nodes = ["web1"]
    watching = await kmon("watch", "--comm", "nginx*", "--uid", "33", "--failed")
    assert watching.stdout is not None
    assert "only: named nginx*; of user 33; of ends those that failed" in (await watching.stdout.readline()).decode()


async def test_no_broker(broker: FakeBroker, kmon: Kmon) -> None:
    await broker.stop()
    for command in (["watch"], ["nodes"], ["ps", "--node", "web1"], ["wait", "--node", "web1", "--pid", "1"]):
        line = f"kmon: no broker answers at {broker.address}: start kmonitor-broker, or set --broker / KMONITOR_BROKER\n"
        assert await ended(await kmon(*command)) == (3, "", line)


async def test_not_authorised(broker: FakeBroker, kmon: Kmon) -> None:
    broker.refuse = grpc.StatusCode.PERMISSION_DENIED
    assert await ended(await kmon("watch", "--json")) == (4, "", "kmon: refused by the test\n")


async def test_a_gap_fails_if_asked_to(broker: FakeBroker, kmon: Kmon) -> None:
    watching = await kmon("watch", "--json", "--fail-on-gap")
    (await broker.session()).send(gap())
    status, out, err = await ended(watching)
    assert (status, err) == (5, "kmon: events of web1 are missing (RING)\n")
    assert json.loads(out.splitlines()[-1])["kind"] == "gap"


async def test_it_ends_after_a_time(kmon: Kmon) -> None:
    status, out, err = await ended(await kmon("watch", "--json", "--for", "50ms"))
    assert (status, err, out.count("\n")) == (0, "", 1)


async def test_it_ends_when_all_have_ended(broker: FakeBroker, kmon: Kmon) -> None:
    broker.processes = {("web1", 1): 1000, ("web1", 2): 2000, ("web1", 3): None}
    watching = await kmon("watch", "--json", "--pid", "1", "--pid", "2", "--pid", "3")
    session = await broker.session()
    await session.asked(3)
    session.send(batch("web1", event(128, EXIT, 2)), batch("web1", event(256, EXIT, 1)))
    status, out, err = await ended(watching)
    assert (status, err) == (0, "kmon: everything that was watched has ended\n")
    assert [json.loads(line).get("state") for line in out.splitlines()] == ["RUNNING", "RUNNING", "EXITED", None, None]


async def test_with_follow_it_ends_with_the_last_descendant(broker: FakeBroker, kmon: Kmon) -> None:
    broker.processes = {("web1", 1): 1000}
    watching = await kmon("watch", "--json", "--pid", "1", "--follow")
    session = await broker.session()
    session.send(batch("web1", event(128, FORK, 1, child_pid=9), event(256, EXIT, 1)), batch("web1", event(384, EXIT, 9)))
    status, out, _ = await ended(watching)
    assert (status, out.count("\n")) == (0, 4)


async def test_nothing_there_to_watch(broker: FakeBroker, kmon: Kmon) -> None:
    status, out, err = await ended(await kmon("watch", "--json", "--pid", "1", "--pid", "2"))
    assert status == 2
    assert [json.loads(line)["state"] for line in out.splitlines()] == ["NOT_FOUND", "NOT_FOUND"]
    assert err.startswith("kmon: nothing to watch")
    broker.processes = {("web1", 1): None}
    status, _, _ = await ended(await kmon("watch", "--json", "--pid", "1"))
    assert status == 0


async def test_an_exit_that_comes_before_the_answer(broker: FakeBroker, kmon: Kmon) -> None:
    broker.answers = False
    watching = await kmon("watch", "--json", "--pid", "1")
    session = await broker.session()
    session.send(batch("web1", event(128, EXIT, 1)), registered(1, "web1", RUNNING, process=process_of(1, 1000)))
    assert (await ended(watching))[0] == 0


async def test_a_node_that_is_away_is_waited_for(broker: FakeBroker, kmon: Kmon) -> None:
    broker.unreachable = {"web1"}
    watching = await kmon("watch", "--json", "--pid", "1", "--node", "web1", "--count", "1")
    assert (await next_line(watching))["state"] == "NODE_UNREACHABLE"
    (await broker.session()).send(batch("web1", event(128, EXIT, 1)))
    assert (await ended(watching))[0] == 0


async def test_a_reader_that_has_had_enough(broker: FakeBroker, kmon: Kmon) -> None:
    ours, theirs = os.pipe()
    watching = await kmon("watch", "--json", stdout=theirs)
    os.close(theirs)
    assert b"registered" in await asyncio.to_thread(os.read, ours, 4096)
    os.close(ours)
    session = await broker.session()
    session.send(batch("web1", event(128, EXIT, 1)), batch("web1", event(256, EXIT, 2)))
    _, stderr = await watching.communicate()
    assert (watching.returncode, stderr) == (0, b"")


async def test_resume_from_a_file(broker: FakeBroker, kmon: Kmon, tmp_path: Path) -> None:
    path = tmp_path / "cursor"
    for run, first in enumerate((1, 3)):
        watching = await kmon("watch", "--json", "--resume", str(path), "--count", "2")
        session = await broker.session(run)
        await session.asked(1)
        session.send(batch("web1", *(event(1000 + at, EXIT, at) for at in range(1, 9))))
        status, out, _ = await ended(watching)
        assert status == 0
        assert [json.loads(line)["pid"] for line in out.splitlines()[1:]] == [first, first + 1]
        assert json.loads(path.read_text())["positions"] == [{"node": "web1", "epoch": 7, "position": 1001 + first}]
    assert session.cursor == {"web1": (7, 1002)}
    path.write_text("not a cursor")
    status, _, err = await ended(await kmon("watch", "--resume", str(path)))
    assert status == 2
    assert "holds no cursor" in err


async def test_a_reconnect_is_told(broker: FakeBroker, kmon: Kmon) -> None:
    watching = await kmon("watch", "--json")
    await next_line(watching)
    (await broker.session()).end(grpc.StatusCode.UNAVAILABLE)
    kinds = [(await next_line(watching))["kind"] for _ in range(3)]
    assert kinds == ["disconnected", "reconnected", "registered"]


async def test_it_ends_if_the_last_process_ended_while_the_broker_was_away(broker: FakeBroker, kmon: Kmon) -> None:
    broker.processes = {("web1", 1): 1000}
    watching = await kmon("watch", "--json", "--pid", "1")
    assert (await next_line(watching))["state"] == "RUNNING"
    broker.processes = {}
    (await broker.session()).end(grpc.StatusCode.UNAVAILABLE)
    (await broker.session(1)).send(batch("web1", event(256, EXIT, 1)), progress(512))  # its exit, from the log
    status, out, err = await ended(watching)
    assert (status, err) == (0, "kmon: everything that was watched has ended\n")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["kind"], line.get("state")) for line in lines[2:]] == [("registered", "EXITED"), ("event", None)]
