# SPDX-License-Identifier: Apache-2.0
"""`kmon watch --resume`: each event once, whatever ends kmon; once more, at the worst, what a kill overtook."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from asyncio.subprocess import Process
from pathlib import Path
from typing import Any

import pytest

from kmonitor.wire.durations import parse_duration
from kmonitor.wire.errors import UsageError
from tests.clients.conftest import Kmon
from tests.clients.fake_broker import BOOT, EXEC, EXIT, FORK, FakeBroker, Session, batch, event, gap, progress
from tests.clients.test_identity import found_in
from tests.clients.test_watch import ended, next_line

COUNT = 400


def events_of(out: str | bytes) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, out.splitlines()) if line["kind"] == "event"]


def saved(path: Path, node: str = "web1") -> int:
    """The position of a node in the file; 0 without one."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return 0
    return next((int(at["position"]) for at in json.loads(text)["positions"] if at["node"] == node), 0)


async def saved_is(path: Path, position: int) -> None:
    async with asyncio.timeout(20):
        while saved(path) != position:  # noqa: ASYNC110 - nothing tells when a file changes but looking
            await asyncio.sleep(0.005)


def replay(session: Session, *, batches_of: int = 1) -> None:
    """As the broker's log: all COUNT events that are behind the cursor. Event n is at position 100 + n, and of pid n."""
    taken = max(session.cursor.get("web1", (7, 100))[1] - 100, 0)
    at = list(range(taken + 1, COUNT + 1))
    session.send(
        *(
            batch("web1", *(event(100 + number, EXIT, number) for number in at[begin : begin + batches_of]))
            for begin in range(0, len(at), batches_of)
        )
    )


async def some_lines(process: Process, count: int) -> list[dict[str, Any]]:
    return [await next_line(process) for _ in range(count)]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
async def test_each_event_once_through_orderly_ends(broker: FakeBroker, kmon: Kmon, tmp_path: Path, how: signal.Signals) -> None:
    path = tmp_path / "cursor"
    seen: list[int] = []
    run = 0
    while len(seen) < COUNT:
        watching = await kmon("watch", "--json", "--resume", str(path))
        session = await broker.session(run)
        replay(session, batches_of=1 + 3 * run)
        lines = await some_lines(watching, 1 + min(COUNT - len(seen), 40 * (run + 1)))
        watching.send_signal(how)
        out, err = await watching.communicate()
        assert (watching.returncode, err) == (0 if how == signal.SIGINT else 143, b"")
        pids = [line["pid"] for line in lines + events_of(out) if line["kind"] == "event"]
        seen += pids
        assert saved(path) == 100 + seen[-1]
        assert not session.closed  # it means to come back
        run += 1
    assert seen == list(range(1, COUNT + 1))
    assert run > 1


async def test_each_event_at_least_once_through_kills(broker: FakeBroker, kmon: Kmon, tmp_path: Path) -> None:
    path = tmp_path / "cursor"
    seen = 0
    for run in range(5):
        watching = await kmon("watch", "--json", "--resume", str(path))
        session = await broker.session(run)
        replay(session)
        before = saved(path)
        pids = [line["pid"] for line in await some_lines(watching, 1 + min(30, COUNT - seen)) if line["kind"] == "event"]
        watching.kill()
        out, _ = await watching.communicate()
        # A kill may cut a line in two.
        pids += [line["pid"] for line in events_of(out[: out.rfind(b"\n") + 1])]
        assert pids == list(range(pids[0], pids[0] + len(pids)))
        assert pids[0] - 1 <= seen  # nothing was left out
        assert pids[0] == max(before - 100, 0) + 1
        seen = max(seen, pids[-1])
        assert saved(path) <= 100 + seen  # nothing is taken that was not shown
    left = await kmon("watch", "--json", "--resume", str(path), "--count", str(COUNT - max(saved(path) - 100, 0)))
    replay(await broker.session(5))
    status, out_text, _ = await ended(left)
    assert (status, events_of(out_text)[-1]["pid"]) == (0, COUNT)


async def test_what_was_shown_is_saved_at_once(broker: FakeBroker, kmon: Kmon, tmp_path: Path) -> None:
    path = tmp_path / "cursor"
    watching = await kmon("watch", "--json", "--resume", str(path))
    assert (await next_line(watching))["kind"] == "registered"
    await saved_is(path, 99)
    session = await broker.session()
    for number in range(1, 6):
        session.send(batch("web1", event(100 + number, EXIT, number)))
        await next_line(watching)
        await saved_is(path, 100 + number)
    session.send(gap(number=40, log_id=9, to_position=200), progress(300, number=41, log_id=9))
    await saved_is(path, 299)
    watching.kill()
    await watching.communicate()
    await kmon("watch", "--json", "--resume", str(path), "--linger", "90s")
    [request] = (await broker.session(1)).requests
    cursor = request.cursor
    assert (cursor.log_id, cursor.number, request.resuming, request.linger_ms) == (9, 41, 1, 90_000)
    assert session.requests[0].linger_ms == 300_000
    assert os.listdir(tmp_path) == ["cursor"]  # noqa: PTH208 - asynchronous functions are to leave pathlib alone


async def test_several_targets_are_brought_together(broker: FakeBroker, kmon: Kmon, tmp_path: Path) -> None:
    """They mean the processes of before, in another run too; with other targets the file counts for how far it came."""
    path = tmp_path / "cursor"
    broker.nodes = ["web1", "web2"]
    broker.processes = {("web1", 5): 5000, ("web2", 5): 5000, ("web1", 6): 6000}
    broker.pidfiles = {("web1", "/run/x.pid"): 6}
    targets = ("--pid", "5", "--pidfile", "/run/x.pid")
    watching = await kmon("watch", "--json", "--events", "exit", "--resume", str(path), *targets)
    await some_lines(watching, 4)
    (await broker.session()).send(batch("web2", event(128, EXIT, 5)))
    await next_line(watching)
    async with asyncio.timeout(20):
        while saved(path, "web2") != 128:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.005)
    watching.kill()
    await watching.communicate()

    broker.processes |= {("web1", 5): 5555, ("web2", 5): 5556, ("web1", 6): None, ("web1", 7): 7000}
    broker.pidfiles = {("web1", "/run/x.pid"): 7}
    watching = await kmon("watch", "--json", "--events", "exit", "--resume", str(path), *targets)
    session = await broker.session(1)
    requests = await session.asked(2)
    assert [found_in(request) for request in requests] == [
        [("web1", 5, 5000, BOOT), ("web2", 5, 5000, BOOT)],
        [("web1", 6, 6000, BOOT)],
    ]
    assert [request.resuming for request in requests] == [2, 0]
    session.send(batch("web1", event(256, EXIT, 5, inferred=True), event(384, EXIT, 6, inferred=True)), progress(512))
    status, out, err = await ended(watching)
    assert (status, err) == (0, "kmon: everything that was watched has ended\n")
    lines = [json.loads(line) for line in out.splitlines()]
    assert {line["state"] for line in lines if line["kind"] == "registered"} == {"EXITED", "NOT_FOUND"}
    assert [(line["pid"], line["inferred"]) for line in events_of(out)] == [(5, True), (6, True)]

    watching = await kmon("watch", "--json", "--events", "exit", "--resume", str(path), "--node", "web1", "--pid", "7")
    session = await broker.session(2)
    assert (found_in(session.requests[0]), session.cursor["web1"]) == ([], (7, 511))
    assert (await next_line(watching))["state"] == "RUNNING"


async def test_a_run_with_follow_goes_on_with_what_was_forked(broker: FakeBroker, kmon: Kmon, tmp_path: Path) -> None:
    """Which this run cannot know: it does not end by itself when the target has ended."""
    path = tmp_path / "cursor"
    broker.processes = {("web1", 5): 5000}
    options = ("watch", "--json", "--resume", str(path), "--pid", "5", "--follow")
    watching = await kmon(*options)
    (await broker.session()).send(batch("web1", event(128, FORK, 5, child_pid=6), event(256, EXIT, 5)))
    await some_lines(watching, 3)
    watching.send_signal(signal.SIGTERM)
    await watching.communicate()
    broker.processes = {("web1", 5): None}
    watching = await kmon(*options, "--count", "1")
    session = await broker.session(1)
    session.send(progress(300), progress(301), batch("web1", event(384, EXIT, 6)))
    assert [line.get("state", line.get("pid")) for line in await some_lines(watching, 2)] == ["EXITED", 6]
    assert (await ended(watching))[0] == 0


async def test_forked_processes_outlive_a_reconnect(broker: FakeBroker, kmon: Kmon) -> None:
    """Where the log still reaches; where it does not, nobody may tell of their ends."""
    for run, lost in enumerate((False, True)):
        broker.processes = {("web1", 5): 5000}
        watching = await kmon("watch", "--json", "--pid", "5", "--follow")
        session = await broker.session(2 * run)
        session.send(batch("web1", event(128, FORK, 5, child_pid=6), event(256, EXIT, 5)))
        broker.processes = {("web1", 5): None}
        session.end()
        again = await broker.session(2 * run + 1)
        if lost:
            again.send(gap(reason=3))
        again.send(progress(300), batch("web1", event(512, EXEC, 6), event(640, EXIT, 6)), progress(700))
        status, out, _ = await ended(watching)
        assert (status, [line["pid"] for line in events_of(out)]) == (0, [5, 5, 6, 6])


async def test_commands_are_run_once(broker: FakeBroker, kmon: Kmon, tmp_path: Path) -> None:
    """SIGTERM in the middle of a batch, and of a command: that one ends, and is not run again; those behind it are run later."""
    path, log, begun = tmp_path / "cursor", tmp_path / "log", tmp_path / "begun"
    script = f"echo $KMON_PID >>{log}; if [ $KMON_PID = 2 ]; then : >{begun}; sleep 0.5; fi; echo end >>{log}"
    options = ("watch", "--json", "--resume", str(path), "--exec", f"sh -c '{script}'")
    watching = await kmon(*options)
    session = await broker.session()
    session.send(batch("web1", *(event(100 + number, EXIT, number) for number in range(1, 5))))
    async with asyncio.timeout(20):
        while not begun.exists():  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.005)
    watching.send_signal(signal.SIGTERM)
    status, out, _ = await ended(watching)
    assert (status, [line["pid"] for line in events_of(out)], saved(path)) == (143, [1, 2], 102)
    watching = await kmon(*options, "--count", "2")
    session = await broker.session(1)
    session.send(batch("web1", *(event(100 + number, EXIT, number) for number in range(1, 5))))
    status, out, _ = await ended(watching)
    assert (status, [line["pid"] for line in events_of(out)]) == (0, [3, 4])
    assert log.read_text().split() == ["1", "end", "2", "end", "3", "end", "4", "end"]


async def test_a_file_that_cannot_be_written(broker: FakeBroker, kmon: Kmon, tmp_path: Path) -> None:
    path = tmp_path / "none" / "cursor"
    why = f"kmon: cannot save the cursor in {path}: No such file or directory\n"
    assert await ended(await kmon("watch", "--json", "--resume", str(path), "--broker", "127.0.0.1:1")) == (2, "", why)
    path.parent.mkdir()
    watching = await kmon("watch", "--json", "--resume", str(path))
    session = await broker.session()
    while path.parent.exists():  # it may be writing there just now
        shutil.rmtree(path.parent, ignore_errors=True)
    ending = asyncio.create_task(ended(watching))
    while not ending.done():  # it is said with the next thing that comes
        session.send(progress(300))
        await asyncio.wait([ending], timeout=0.05)
    status, _, err = await ending
    assert (status, err) == (2, why)


async def test_what_lingers(kmon: Kmon, broker: FakeBroker, tmp_path: Path) -> None:
    path = str(tmp_path / "cursor")
    for options, words in (
        (["--linger", "5m"], "--linger belongs to --resume"),
        (["--linger", "soon", "--resume", path], "'soon' is not a duration"),
        (["--linger", "2h", "--resume", path], "registrations cannot linger for 7200 s: give 0 to 3600 s"),
    ):
        status, out, err = await ended(await kmon("watch", *options))
        assert (status, out, err.count("\n"), words in err) == (2, "", 1, True)
    await kmon("watch", "--linger", "0", "--resume", path)
    assert (await broker.session()).requests[0].HasField("linger_ms")
    assert broker.sessions[0].requests[0].linger_ms == 0
    # Without --resume nothing lingers that need not.
    other = await kmon("watch", "--json")
    await next_line(other)
    assert not (await broker.session(1)).requests[0].HasField("linger_ms")
    other.send_signal(signal.SIGTERM)
    assert (await ended(other))[0] == 143
    assert broker.sessions[1].closed
    with pytest.raises(UsageError):
        parse_duration("-1s")
