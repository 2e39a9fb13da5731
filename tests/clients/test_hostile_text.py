# SPDX-License-Identifier: Apache-2.0
"""What a process, an agent or a broker wrote, in what each command shows: on one line, seen whole, and steering nothing."""

from __future__ import annotations

import json
import sys
import unicodedata
from asyncio.subprocess import PIPE, create_subprocess_exec
from pathlib import Path

import grpc

from tests.clients.conftest import Kmon
from tests.clients.fake_broker import EXEC, EXIT, FORK, FakeBroker, batch, event, node_change, refused
from tests.clients.test_commands import stand_in
from tests.clients.test_watch import ended

EVIL = "[/][red]x:smile:\x1b[2J\nkmon: OK\r\u202e\u200b\u200f\u061c\ufeff\U000e0041"
SHOWN = "[/][red]x:smile:\\x1b[2J\\x0akmon: OK\\x0d\\u202e\\u200b\\u200f\\u061c\\ufeff\\U000e0041"
SHORT = "\nkmon: OK\u202e\u200b"
SHORT_SHOWN = "\\x0akmon: OK\\u202e\\u200b"


def harmless(*texts: str) -> None:
    """Nothing in it but lines of what has a form."""
    for text in texts:
        wrong = [letter for letter in text if letter != "\n" and unicodedata.category(letter) in {"Cc", "Cf", "Zl", "Zp"}]
        assert not wrong, text
        assert not any(line.startswith("kmon: OK") for line in text.splitlines()), text
        assert "Traceback" not in text


async def test_nodes(broker: FakeBroker, kmon: Kmon) -> None:
    broker.nodes = ["web1", EVIL]
    names = ("source", "scope", "kernel_release", "agent_version", "boot_id")
    broker.described = dict.fromkeys(names, SHORT + 500 * "x") | {"labels": {"role": EVIL}, "lost": 3}
    status, out, err = await ended(await kmon("nodes"))
    assert (status, err) == (0, "")
    harmless(out)
    assert len([line for line in out.splitlines() if "UP" in line]) == 2
    assert out.count(SHORT_SHOWN) == 2
    status, out, err = await ended(await kmon("nodes", "-o", "wide"))
    assert (status, err) == (0, "")
    harmless(out)
    assert out.count(SHORT_SHOWN) == 8  # of two nodes four each
    status, out, _ = await ended(await kmon("nodes", "--json"))
    harmless(out)
    assert [json.loads(line)["source"] for line in out.splitlines()] == 2 * [SHORT + 500 * "x"]


async def test_ps(broker: FakeBroker, kmon: Kmon) -> None:
    broker.processes = {("web1", 9): 90, ("web1", 10): 90}
    broker.comms = {9: EVIL, 10: "\\"}
    status, out, err = await ended(await kmon("ps", "--node", "web1"))
    assert (status, err) == (0, "")
    harmless(out)
    assert SHOWN in out
    status, out, _ = await ended(await kmon("ps", "--node", "web1", "--json"))
    harmless(out)
    assert json.loads(out.splitlines()[0])["comm"] == EVIL


async def test_watch(broker: FakeBroker, kmon: Kmon) -> None:
    broker.processes = {("web1", 9): 90}
    broker.comms = {9: EVIL}
    watching = await kmon("watch", "--pid", "9", "--count", "3")
    killer = {"pid": 3, "comm": SHORT, "uid": 0}
    (await broker.session()).send(
        node_change(2, "web1", EVIL),
        refused(77, 9, EVIL, node=EVIL),
        batch(EVIL, event(128, FORK, 9, comm=EVIL, child_pid=5)),
        batch("web1", event(128, EXEC, 9, comm=EVIL, filename=EVIL, args=["x", EVIL])),
        batch("web1", event(256, EXIT, 9, comm=EVIL, exit_signal=9, killed_by=killer)),
    )
    status, out, err = await ended(watching)
    assert status == 0
    harmless(out, err)
    assert f"SIGKILL by {SHORT_SHOWN}(3) uid 0" in out
    # what was found, the node's reason, the refusal; three events, of which one has it three times, and one a node of that name
    assert [line.count(SHOWN) for line in out.splitlines()] == [1, 1, 1, 1, 3, 1]


async def test_watch_of_what_is_refused(broker: FakeBroker, kmon: Kmon) -> None:
    broker.answers = False
    watching = await kmon("watch", "--json")
    session = await broker.session()
    session.send(refused(session.requests[0].request_id, 3, EVIL))
    status, out, err = await ended(watching)
    assert (status, out, err) == (2, "", f"kmon: {SHOWN}\n")
    harmless(err)


async def test_wait(broker: FakeBroker, kmon: Kmon) -> None:
    broker.processes = {("web1", 9): 90}
    waiting = await kmon("wait", "--node", "web1", "--pid", "9")
    killer = {"pid": 3, "comm": EVIL, "uid": 0}
    exit_ = event(128, EXIT, 9, comm=EVIL, exit_signal=9, killed_by=killer)
    (await broker.session()).send(node_change(2, "web1", EVIL), batch("web1", exit_))
    status, out, err = await ended(waiting)
    assert (status, out) == (137, f"web1: {SHOWN} (9) ended: SIGKILL by {SHOWN}(3) uid 0\n")
    assert err == f"kmon: web1: node is UNREACHABLE: {SHOWN}\n"
    harmless(out, err)


async def test_a_broker_s_error(broker: FakeBroker, kmon: Kmon) -> None:
    for code, status in ((grpc.StatusCode.INVALID_ARGUMENT, 2), (grpc.StatusCode.PERMISSION_DENIED, 4), (grpc.StatusCode.INTERNAL, 1)):
        broker.refuse, broker.refusal = code, "\x1b[2J\u202e\u200b[/]"
        for words in (["nodes"], ["wait", "--node", "web1", "--pid", "9"], ["watch"]):
            done = await ended(await kmon(*words))
            assert (done[0], done[2].count("\n")) == (status, 1)
            assert "\\x1b[2J\\u202e\\u200b[/]" in done[2]
            harmless(done[2])


async def test_parts_that_say_something(tmp_path: Path) -> None:
    """doctor and up show what an agent or a broker said."""
    (tmp_path / "kmon").write_text(f"#!{sys.executable}\nfrom kmonitor.clients.cli import main\nmain()\n", encoding="utf-8")
    (tmp_path / "kmon").chmod(0o755)
    lines = [
        {"status": "ok", "name": EVIL, "found": EVIL, "advice": EVIL},
        {"status": "ok", "name": "auto", "found": EVIL, "advice": EVIL, "works": True, "host": EVIL},
    ]
    (tmp_path / "lines").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    stand_in(tmp_path / "kmonitor-agent", f"cat {tmp_path}/lines")
    doctor = await create_subprocess_exec(tmp_path / "kmon", "doctor", "--broker", "127.0.0.1:1", stdout=PIPE, stderr=PIPE)
    status, out, err = await ended(doctor)
    assert status == 0
    harmless(out, err)
    assert "\\u202e" in out
    stand_in(tmp_path / "kmonitor-broker", "printf 'it \\033[2J failed\\342\\200\\256\\n' >&2; exit 4")
    up = await create_subprocess_exec(tmp_path / "kmon", "up", stdout=PIPE, stderr=PIPE)
    assert await ended(up) == (4, "", "kmon: it \\x1b[2J failed\\u202e\n")
