# SPDX-License-Identifier: Apache-2.0
"""Streams that are full, gone, closed from the start, or of a narrow encoding: a status, and at most one line."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, create_subprocess_exec
from pathlib import Path

import pytest

from tests.clients.conftest import Kmon
from tests.clients.fake_broker import EXIT, FORK, FakeBroker, batch, event, gap, node_change
from tests.clients.test_watch import ended

KMON = Path(sys.executable).parent / "kmon"
FULL = "kmon: cannot write to standard output: No space left on device\n"
CLOSED = "kmon: cannot write to standard output: Bad file descriptor\n"
PRINTING = [["nodes"], ["nodes", "--json"], ["ps", "--node", "web1"], ["ps", "--node", "web1", "--json"], ["watch"], ["watch", "--json"]]
KILLED = event(128, EXIT, 4711, exit_signal=9, killed_by={"pid": 3, "comm": "kill", "uid": 0})


def ids(words: list[str]) -> str:
    return " ".join(words)


@pytest.mark.parametrize("words", [*PRINTING, ["doctor"], ["doctor", "--json"], ["--help"], ["watch", "--help"]], ids=ids)
async def test_standard_output_is_full_or_closed(broker: FakeBroker, kmon: Kmon, words: list[str]) -> None:
    broker.processes = {("web1", 9): 90}
    assert await ended(await kmon(*words, streams=">/dev/full")) == (1, "", FULL)
    assert await ended(await kmon(*words, streams=">&-")) == (1, "", CLOSED)


@pytest.mark.parametrize("words", PRINTING, ids=ids)
async def test_nobody_reads(broker: FakeBroker, kmon: Kmon, words: list[str]) -> None:
    """As usual, an end of which nothing is said."""
    broker.processes = {("web1", 9): 90}
    reading, writing = os.pipe()
    os.close(reading)
    try:
        process = await kmon(*words, stdout=writing)
    finally:
        os.close(writing)
    assert process.stderr is not None
    assert (await process.wait(), await process.stderr.read()) == (0, b"")


@pytest.mark.parametrize("streams", ["2>/dev/full", "2>&-", ">/dev/full", ">&-", ">/dev/full 2>&1", ">&- 2>&-", "<&- >&- 2>&-"])
async def test_wait_ends_as_the_process_did(broker: FakeBroker, kmon: Kmon, streams: str) -> None:
    broker.processes = {("web1", 4711): 99}
    waiting = await kmon("wait", "--node", "web1", "--pid", "4711", streams=streams)
    session = await broker.session()
    session.send(gap(), batch("web1", KILLED))
    status, out, err = await ended(waiting)
    assert status == 137
    # Nothing lands where it does not belong.
    assert out in ("", "web1: sleep (4711) ended: SIGKILL by kill(3) uid 0\n")
    assert err in ("", "kmon: web1: GAP, events are missing (its kernel's ring was full): 3 PROCESS_EXIT\n")


@pytest.mark.parametrize("streams", ["2>/dev/full", "2>&-"])
async def test_without_standard_error_the_status_says_it(broker: FakeBroker, kmon: Kmon, streams: str) -> None:
    assert await ended(await kmon("watch", "--nosuch", streams=streams)) == (2, "", "")
    assert await ended(await kmon("watch", "--events", "moon", streams=streams)) == (2, "", "")
    assert await ended(await kmon("nodes", "--broker", "127.0.0.1:1", streams=streams)) == (3, "", "")
    watching = await kmon("watch", "--json", "--pid", "7", streams=streams)
    assert await ended(watching) == (2, await one_json_line(broker), "")


async def one_json_line(broker: FakeBroker) -> str:
    """What kmon watch says of a process that is not there; without anybody's broken stream."""
    process = await create_subprocess_exec(KMON, "watch", "--json", "--pid", "7", "--broker", broker.address, stdout=PIPE, stderr=DEVNULL)
    return (await ended_of(process))[1]


async def ended_of(process: asyncio.subprocess.Process) -> tuple[int | None, str]:
    out, _ = await process.communicate()
    return process.returncode, out.decode()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("words", [*PRINTING, ["doctor"], ["wait", "--node", "web1", "--pid", "4711"]], ids=ids)
async def test_a_narrow_encoding(broker: FakeBroker, kmon: Kmon, words: list[str], encoding: str) -> None:
    """What it does not have is written out."""
    broker.processes = {("web1", 4711): 99}
    if words[0] == "watch":
        words = [*words, "--count", "2"]
    process = await kmon(*words, env={"PYTHONIOENCODING": encoding, "LANG": "C", "LC_ALL": "C"})
    if words[0] in ("watch", "wait"):
        (await broker.session()).send(batch("web1", event(128, FORK, 4711, child_pid=5), event(256, EXIT, 4711, comm="größe→")))
    out, err = await process.communicate()
    assert (process.returncode in (0, 2), b"Traceback" in err) == (True, False), err
    out.decode(encoding)
    if words[0] in ("watch", "wait") and "--json" not in words:
        assert {"ascii": b"gr\\xf6\\xdfe\\u2192", "latin-1": b"gr\xf6\xdfe\\u2192", "utf-8": "größe→".encode()}[encoding] in out


async def test_a_log_that_nobody_reads_holds_nothing_up(broker: FakeBroker, kmon: Kmon) -> None:
    """A pipe that is full and stays so, as that of a journal that has stopped."""
    broker.processes = {("web1", 4711): 99}
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writing, True)
    process = await create_subprocess_exec(
        Path(sys.executable).parent / "kmon",
        "wait",
        "--node",
        "web1",
        "--pid",
        "4711",
        "--broker",
        broker.address,
        stdout=PIPE,
        stderr=writing,
    )
    os.close(writing)
    session = await broker.session()
    session.send(*(node_change(2, "web1", "x" * 5000) for _ in range(50)), batch("web1", KILLED))
    try:
        assert await ended_of(process) == (137, "web1: sleep (4711) ended: SIGKILL by kill(3) uid 0\n")
    finally:
        os.close(reading)


@pytest.mark.parametrize(("how", "status"), [(signal.SIGHUP, 143), (signal.SIGTERM, 143), (signal.SIGINT, 0)])
async def test_hang_up_during_exec(broker: FakeBroker, kmon: Kmon, tmp_path: Path, how: signal.Signals, status: int) -> None:
    """Three events, three programs, though the terminal is closed while the second runs."""
    cursor, began, go = tmp_path / "cursor", tmp_path / "began", tmp_path / "go"
    os.mkfifo(go)
    command = f"sh -c 'echo $KMON_PID >>{began}; test $KMON_PID != 2 || read line <{go}'"
    events = (event(128, EXIT, 1), event(256, EXIT, 2), event(384, EXIT, 3))
    watching = await kmon("watch", "--json", "--resume", str(cursor), "--exec", command)
    (await broker.session()).send(batch("web1", *events))
    with await asyncio.to_thread(go.open, "w", encoding="ascii") as file:  # it can be when the second program reads
        watching.send_signal(how)
        file.write("\n")
    assert (await ended(watching))[0] == status
    second = await kmon("watch", "--json", "--resume", str(cursor), "--exec", command, "--count", "1")
    session = await broker.session(1)
    assert session.cursor == {"web1": (7, 256)}
    session.send(batch("web1", events[2]))
    assert (await ended(second))[0] == 0
    assert began.read_text(encoding="ascii").split() == ["1", "2", "3"]


async def test_nohup(broker: FakeBroker, kmon: Kmon) -> None:
    """Who asked that a hang-up be ignored is heeded."""
    watching = await kmon("watch", "--json", streams="", env={})
    await ended_by(watching, signal.SIGTERM, broker, 0)
    process = await create_subprocess_exec(
        "nohup",
        Path(sys.executable).parent / "kmon",
        "watch",
        "--json",
        "--broker",
        broker.address,
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
    )
    session = await broker.session(1)
    process.send_signal(signal.SIGHUP)
    session.send(batch("web1", event(128, EXIT, 5)))
    assert process.stdout is not None
    assert b'"registered"' in await process.stdout.readline()
    assert b'"pid":5' in await process.stdout.readline()
    await ended_by(process, signal.SIGTERM, broker, 1)


async def ended_by(process: asyncio.subprocess.Process, number: signal.Signals, broker: FakeBroker, session: int) -> None:
    await broker.session(session)
    process.send_signal(number)
    assert (await ended(process))[0] == 143


async def test_a_pipe_that_does_not_block(broker: FakeBroker, kmon: Kmon) -> None:
    """As a parent leaves it that shares it: what does not fit at once comes later, whole."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    watching = await kmon("watch", "--json", "--count", "3000", stdout=writing)
    os.close(writing)
    (await broker.session()).send(batch("web1", *(event(128 * number, EXIT, number) for number in range(1, 3001))))
    with os.fdopen(reading, "rb") as pipe:
        lines = (await asyncio.to_thread(pipe.read)).splitlines()
    assert watching.stderr is not None
    assert (await watching.wait(), await watching.stderr.read()) == (0, b"")
    assert [json.loads(line)["pid"] for line in lines[1:]] == list(range(1, 3001))
