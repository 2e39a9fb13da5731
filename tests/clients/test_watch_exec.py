# SPDX-License-Identifier: Apache-2.0
"""`kmon watch --exec`: what is run for each event, how much of it at a time, and how that ends."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.conftest import Kmon
from tests.clients.fake_broker import EXIT, FakeBroker, batch, event, progress
from tests.clients.test_watch import ended

PRINT = 'import sys; open(sys.argv[1], "w").write("|".join(sys.argv[2:]))'


async def test_exec_runs_a_command_for_each_event(broker: FakeBroker, kmon: Kmon, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = f'(cat; echo "$KMON_NODE $KMON_TYPE $KMON_PID $KMON_EXIT_CODE") >>{log}; test $KMON_PID != 2'
    command = f"sh -c '{script}'"
    watching = await kmon("watch", "--json", "--count", "2", "--exec", command)
    (await broker.session()).send(batch("web1", event(128, EXIT, 1, exit_code=3), event(256, EXIT, 2)))
    status, out, err = await ended(watching)
    assert status == 0
    assert err == "kmon: --exec: the command ended with status 1 for pid 2 on web1\n"
    events = out.splitlines()[1:]
    assert log.read_text().splitlines() == [events[0], "web1 PROCESS_EXIT 1 3", events[1], "web1 PROCESS_EXIT 2 0"]


async def test_exec_without_a_shell(broker: FakeBroker, kmon: Kmon, tmp_path: Path) -> None:
    """What a shell would make something of is an argument as any other. What cannot be run is said before anybody is asked."""
    log = tmp_path / "log"
    watching = await kmon("watch", "--json", "--count", "1", "--exec", f"{sys.executable} -c '{PRINT}' {log} $KMON_PID ';' 'a b'")
    (await broker.session()).send(batch("web1", event(128, EXIT, 1)))
    assert (await ended(watching))[0] == 0
    assert log.read_text() == "$KMON_PID|;|a b"
    for options, words in (
        (["--exec", "no-such-program x"], "--exec: there is no program 'no-such-program'. No shell runs the command"),
        (["--exec", "sh -c 'x"], "no closing quotation"),
        (["--exec", " "], "--exec: name a program to run"),
        (["--exec", "true", "--exec-jobs", "0"], "--exec-jobs: give a number from 1 to 256"),
        (["--exec", "true", "--exec-timeout", "soon"], "'soon' is not a duration"),
        (["--exec-jobs", "2"], "--exec-jobs and --exec-timeout belong to --exec"),
    ):
        status, out, err = await ended(await kmon("watch", *options))
        assert (status, out, err.count("\n"), words in err) == (2, "", 1, True), err


async def test_exec_several_at_a_time(broker: FakeBroker, kmon: Kmon, tmp_path: Path) -> None:
    """Three that wait for each other, of six; never four. The cursor does not pass one that has not ended."""
    path, here = tmp_path / "cursor", tmp_path / "here"
    here.mkdir()
    script = f"""
import os, pathlib, time
here, pid = pathlib.Path({str(here)!r}), int(os.environ["KMON_PID"])
(here / f"begun {{pid}}").touch()
if pid <= 3:
    while len(list(here.glob("begun *"))) < 3:
        time.sleep(0.01)
if pid == 1:
    while not (here / "go").exists():
        time.sleep(0.01)
(here / f"ended {{pid}}").write_text(str(len(list(here.glob("begun *"))) - len(list(here.glob("ended *")))))
"""
    (tmp_path / "script").write_text(script)
    command = f"{sys.executable} {tmp_path / 'script'}"
    watching = await kmon("watch", "--json", "--resume", str(path), "--count", "6", "--exec", command, "--exec-jobs", "3")
    session = await broker.session()
    session.send(batch("web1", *(event(100 + number, EXIT, number) for number in range(1, 7))), progress(200))
    await files(lambda: len(list(here.glob("ended *"))) == 5)
    assert saved(path) == 99  # the first has not ended, though all others have
    (here / "go").touch()
    assert (await ended(watching))[0] == 0
    assert saved(path) == 106
    assert max(int(file.read_text()) for file in here.glob("ended *")) <= 3


async def test_exec_that_takes_too_long(broker: FakeBroker, kmon: Kmon, tmp_path: Path) -> None:
    """It is ended with all that it has started, also if it does not heed SIGTERM; the next has its turn."""
    pids = tmp_path / "pids"
    script = f'trap "" TERM; sleep 60 & echo $$ $! >>{pids}; wait; wait; wait'
    options = ("--exec", f"sh -c '{script}'", "--exec-timeout", "300ms")
    watching = await kmon("watch", "--json", "--count", "2", *options)
    (await broker.session()).send(batch("web1", event(128, EXIT, 1), event(256, EXIT, 2)))
    status, _, err = await ended(watching)
    assert status == 0
    assert err.splitlines() == [f"kmon: --exec: the command took more than 0.3 s for pid {pid} on web1, and was ended" for pid in (1, 2)]
    left = pids.read_text().split()
    assert len(left) == 4
    assert not [pid for pid in left if lives(pid)]


async def test_exec_and_who_insists(broker: FakeBroker, kmon: Kmon, tmp_path: Path) -> None:
    """The first Ctrl-C waits for the command, which does not get it; the second cuts it off, and it is not taken as done."""
    path, pids = tmp_path / "cursor", tmp_path / "pids"
    options = ("--resume", str(path), "--exec", f"sh -c 'sleep 60 & echo $$ $! >{pids}; wait'")
    watching = await kmon("watch", "--json", *options)
    (await broker.session()).send(batch("web1", event(128, EXIT, 1)))
    await files(lambda: pids.exists() and pids.read_text() != "")
    watching.send_signal(signal.SIGINT)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(watching.wait(), 0.3)
    assert all(lives(pid) for pid in pids.read_text().split())
    watching.send_signal(signal.SIGINT)
    status, _, err = await ended(watching)
    assert (status, err) == (0, "kmon: --exec: the command was cut off for pid 1 on web1\n")
    assert not any(lives(pid) for pid in pids.read_text().split())
    assert saved(path) < 128


async def files(are_there: Callable[[], bool]) -> None:
    """Nobody is told of files."""
    async with asyncio.timeout(20):
        while not are_there():  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)


def lives(pid: str) -> bool:
    """Not as a zombie: whose child it became may be slow."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def saved(path: Path) -> int:
    """The position in a cursor's file."""
    at: int = json.loads(path.read_text())["positions"][0]["position"]
    return at
