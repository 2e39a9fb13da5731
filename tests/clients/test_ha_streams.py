# SPDX-License-Identifier: Apache-2.0
"""`kmon ha keepalived` and `kmon ha pacemaker` whose log is full, gone or closed, and what a process calls itself in that log."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from tests.clients.conftest import Kmon
from tests.clients.fake_broker import EXIT, FakeBroker, Session, batch, event
from tests.clients.test_watch import ended

PIDFILE = "/run/web.pid"
SPOOF = "\nkmon: OK"
RECORDED = Path(__file__).parents[1] / "ha/recorded"
BROKEN = ["2>/dev/full", "2>&-", ">/dev/full 2>&1", ">&- 2>&-", "<&- >&- 2>&-"]


async def until_it_says(path: Path, text: str) -> None:
    """A file that somebody else writes has this in it."""
    async with asyncio.timeout(30):
        while text not in _content(path):  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0.01)


def _content(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def lives(broker: FakeBroker, node: str) -> None:
    """Its process, by pidfile."""
    broker.nodes = [node]
    broker.processes = {(node, 11): 11000}
    broker.pidfiles = {(node, PIDFILE): 11}


async def killed(broker: FakeBroker, node: str, name: str = "web") -> None:
    """By somebody of a doubtful name."""
    broker.processes[node, 11] = None
    killer = {"pid": 3, "comm": SPOOF, "uid": 1000}
    (await broker.session()).send(batch(node, event(128, EXIT, 11, comm=name, start_time=11000, exit_signal=9, killed_by=killer)))


async def guarded(session: Session) -> None:
    """It was asked for, and what is sent from here on comes after the answer."""
    count = 1
    while not any(request.register.registration.target.pidfile == PIDFILE for request in await session.asked(count)):
        count = len(session.requests) + 1


# ---- keepalived


def keepalived(file: Path) -> list[str]:
    return ["ha", "keepalived", "--file", str(file), "--process", f"web1:pidfile={PIDFILE}", "--when-blind", "keep"]


@pytest.mark.parametrize("streams", BROKEN)
async def test_a_track_file_without_a_log(broker: FakeBroker, kmon: Kmon, tmp_path: Path, streams: str) -> None:
    lives(broker, "web1")
    tool = await kmon(*keepalived(tmp_path / "track"), streams=streams)
    await until_it_says(tmp_path / "track", "0\n")
    await killed(broker, "web1")
    await until_it_says(tmp_path / "track", "1\n")
    broker.processes["web1", 11] = 22000
    await until_it_says(tmp_path / "track", "0\n")
    tool.send_signal(signal.SIGTERM)
    assert await ended(tool) == (143, "", "")


async def test_a_track_file_whose_log_ends(broker: FakeBroker, kmon: Kmon, tmp_path: Path) -> None:
    lives(broker, "web1")
    reading, writing = os.pipe()
    tool = await kmon(*keepalived(tmp_path / "track"), stdout=writing, streams="2>&1")
    os.close(writing)
    await until_it_says(tmp_path / "track", "0\n")
    os.close(reading)
    await killed(broker, "web1")
    await until_it_says(tmp_path / "track", "1\n")
    tool.send_signal(signal.SIGTERM)
    assert await tool.wait() == 143


async def test_a_killers_name_in_keepalived_s_log(broker: FakeBroker, kmon: Kmon, tmp_path: Path) -> None:
    lives(broker, "web1")
    tool = await kmon(*keepalived(tmp_path / "track"))
    await until_it_says(tmp_path / "track", "0\n")
    await killed(broker, "web1", "\u202e\x1b[2J")
    await until_it_says(tmp_path / "track", "1\n")
    tool.send_signal(signal.SIGTERM)
    status, _, err = await ended(tool)
    assert status == 143
    assert "killed by SIGKILL from pid 3 (\\x0akmon: OK), uid 1000" in err
    assert "kmon: OK" not in err.splitlines()


# ---- Pacemaker


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Commands of Pacemaker that show a recorded cluster, in which "web" runs on alpha, and note what they are told. As environment."""
    commands = {
        "crm_node": "echo alpha",
        "cibadmin": f'cib={RECORDED}/many.cib.xml; case "$*" in *--no-children*) sed -n "1s,>,/>,p" $cib ;; *) cat $cib ;; esac',
        "crm_mon": f"cat {RECORDED}/many.monitor.xml",
        "crmadmin": "echo '<pacemaker-result><crmd state=\"S_IDLE\"/></pacemaker-result>'",
        "crm_resource": f'case "$1" in --fail) echo "$*" >>{tmp_path}/told ;; --show-metadata) exit 5 ;; esac',
        "attrd_updater": f'for word in "$@"; do printf "<%s>" "$word"; done >{tmp_path}/attribute',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


@pytest.mark.parametrize("options", [["--attribute"], ["--json"]])
@pytest.mark.parametrize("streams", BROKEN)
async def test_pacemaker_is_told_without_a_log(
    broker: FakeBroker, kmon: Kmon, tmp_path: Path, cluster: dict[str, str], options: list[str], streams: str
) -> None:
    lives(broker, "alpha")
    tool = await kmon("ha", "pacemaker", *options, streams=streams, env=cluster)
    await guarded(await broker.session())
    await killed(broker, "alpha")
    await until_it_says(tmp_path / "told", "--fail --resource web --node alpha\n")
    tool.send_signal(signal.SIGTERM)
    assert (await ended(tool))[0] == 143


async def test_a_killers_name_in_pacemaker_s_log_and_attribute(
    broker: FakeBroker, kmon: Kmon, tmp_path: Path, cluster: dict[str, str]
) -> None:
    lives(broker, "alpha")
    tool = await kmon("ha", "pacemaker", "--attribute", env=cluster)
    assert tool.stderr is not None
    while b"guarded by pidfile /run/web.pid: sleep (11)" not in await tool.stderr.readline():
        pass
    await killed(broker, "alpha", "\u202e\x1b[2J")
    wanted = (
        b"web on alpha: \\u202e\\x1b[2J (11) killed by SIGKILL from pid 3 (\\x0akmon: OK), uid 1000: told Pacemaker that it has failed ("
    )
    while b"killed by" not in (line := await tool.stderr.readline()):
        assert line
    assert line.startswith(b"kmon: " + wanted), line
    await until_it_says(tmp_path / "attribute", "\\u202e\\x1b[2J (11) killed by SIGKILL from pid 3 (\\x0akmon: OK), uid 1000>")
    tool.send_signal(signal.SIGTERM)
    status, _, rest = await ended(tool)
    assert status == 143
    assert "kmon: OK" not in rest.splitlines()
