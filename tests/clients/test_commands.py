# SPDX-License-Identifier: Apache-2.0
"""`kmon wait`, `nodes`, `ps`, `doctor`, `up` as a user runs them, and how fast `--help` is there."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, create_subprocess_exec
from pathlib import Path

import pytest

from tests.clients.conftest import Kmon
from tests.clients.fake_broker import EXIT, FakeBroker, batch, event, gap, node_change
from tests.clients.test_watch import ended, next_line


@pytest.mark.parametrize(
    ("fields", "status", "line"),
    [
        ({"exit_code": 0}, 0, "web1: sleep (4711) ended: code 0\n"),
        ({"exit_code": 7}, 7, "web1: sleep (4711) ended: code 7\n"),
        (
            {"exit_signal": 15, "killed_by": {"pid": 3, "comm": "kill", "uid": 0}},
            143,
            "web1: sleep (4711) ended: SIGTERM by kill(3) uid 0\n",
        ),
        ({"inferred": True}, 2, "web1: sleep (4711) ended: gone: found ended, status not known\n"),
    ],
)
async def test_wait_ends_as_the_process_did(broker: FakeBroker, kmon: Kmon, fields: dict[str, object], status: int, line: str) -> None:
    broker.processes = {("web1", 4711): 99}
    waiting = await kmon("wait", "--node", "web1", "--pid", "4711")
    session = await broker.session()
    await session.asked(1)
    session.send(gap(), batch("web1", event(128, EXIT, 4711, **fields)))
    assert await ended(waiting) == (
        status,
        line,
        "kmon: web1: GAP, events are missing (its kernel's ring was full): 3 PROCESS_EXIT\n",
    )


async def test_wait_for_what_is_not_there(broker: FakeBroker, kmon: Kmon) -> None:
    broker.processes = {("web1", 1): None, ("web1", 3): 30}
    assert await ended(await kmon("wait", "--node", "web1", "--pid", "1")) == (2, "", "kmon: process 1 on web1 has already ended\n")
    assert await ended(await kmon("wait", "--node", "web1", "--pid", "2")) == (2, "", "kmon: there is no process 2 on web1\n")
    assert await ended(await kmon("wait", "--node", "web1", "--pid", "3", "--timeout", "50ms")) == (
        124,
        "",
        "kmon: pid 3 on web1 still runs after 0.05 s\n",
    )
    waiting = await kmon("wait", "--node", "web1", "--pid", "3")
    await (await broker.session(3)).asked(1)
    waiting.send_signal(signal.SIGINT)
    assert await ended(waiting) == (130, "", "")


async def test_nodes_that_will_not_come_back(broker: FakeBroker, kmon: Kmon) -> None:
    broker.nodes = ["web1", "web2"]
    broker.unreachable = {"web2"}
    broker.processes = {("web2", 5): 5000}
    waiting = await kmon("wait", "--node", "web2", "--pid", "5")
    assert waiting.stderr is not None
    assert await waiting.stderr.readline() == b"kmon: web2: not connected, pid 5 will be watched when it returns\n"
    watching = await kmon("watch", "--json", "--node", "web2", "--pid", "5")
    assert (await next_line(watching))["state"] == "NODE_UNREACHABLE"
    for name, words in (("db1", "there is no node db1"), ("web1", "node web1 is connected: stop its agent first"), ("a*", "'a*'")):
        status, out, err = await ended(await kmon("nodes", "--remove", name))
        assert (status, out, err.count("\n"), words in err) == (2, "", 1, True)
    assert (await ended(await kmon("nodes", "web1", "--remove", "web2")))[0] == 2
    assert broker.removed == []
    assert await ended(await kmon("nodes", "--remove", "web2")) == (0, "", "kmon: node web2 is removed\n")
    assert broker.removed == ["web2"]
    for session in broker.sessions:
        session.send(node_change(4, "web2", "removed by an operator"))
    status, out, err = await ended(waiting)
    assert (status, out) == (2, "")
    assert err.splitlines() == [
        "kmon: web2: node is GONE: removed by an operator",
        "kmon: web2 was removed: the end of process 5 there will not be told",
    ]
    gone = await next_line(watching)
    assert (gone["kind"], gone["node"], gone["state"]) == ("node", "web2", "GONE")
    # Nothing of what was asked for was ever there.
    assert await ended(watching) == (2, "", "kmon: nothing to watch: removed was web2\n")
    broker.processes = {("web1", 5): 5000}
    watching = await kmon("watch", "--json", "--pid", "5")
    assert (await next_line(watching))["state"] == "RUNNING"
    broker.sessions[-1].send(node_change(4, "web1"))
    assert (await next_line(watching))["state"] == "GONE"
    # What became of it is not known.
    assert await ended(watching) == (0, "", "kmon: nothing more will come: what was watched has ended, or was on web1, now removed\n")
    await broker.stop()
    assert (await ended(await kmon("nodes", "--remove", "web2")))[0] == 3


async def test_doctor(broker: FakeBroker, kmon: Kmon) -> None:
    """Whatever this machine can: the checks are the agent's, the exit status is that of the verdict."""
    status, out, _ = await ended(await kmon("doctor", "--json"))
    checks = {check["name"]: check for check in map(json.loads, out.splitlines())}
    assert {"kernel", "BTF", "CAP_BPF", "lockdown", "libbpf", "source core", "source bcc", "source netlink", "broker"} < set(checks)
    assert checks["broker"]["status"] == "ok"
    assert all(check["advice"] for check in checks.values() if check["status"] != "ok")
    assert list(checks)[-1] == "auto"
    assert status == (0 if checks["auto"]["works"] else 2)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A folder to put stand-ins for the two programs in; `kmon` itself stands there too, and looks beside itself."""
    kmon = tmp_path / "kmon"
    kmon.write_text(f"#!{sys.executable}\nfrom kmonitor.clients.cli import main\nmain()\n")
    kmon.chmod(0o755)
    return tmp_path


def stand_in(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


CHECKED = """{"status":"ok","name":"kernel","found":"6.18 [x]","advice":""}
{"status":"warn","name":"source core","found":"no [BTF]","advice":"it needs BTF","source":"core","scope":"host","works":false,"needs":"BTF"}
{"status":"ok","name":"source netlink","found":"works","advice":"","source":"netlink","scope":"host","works":true,"needs":"CAP_NET_ADMIN"}
{"status":"ok","name":"auto","found":"takes netlink","advice":"","source":"netlink","scope":"host","works":true,"host":"h"}"""


async def test_doctor_shows_what_the_agent_beside_it_says(broker: FakeBroker, parts: Path) -> None:
    stand_in(parts / "kmonitor-agent", f'echo "$@" >{parts}/asked; cat <<"END"\n{CHECKED}\nEND')
    options = ("doctor", "--broker", broker.address)
    process = await create_subprocess_exec(parts / "kmon", *options, "--scope", "host", "-v", stdout=PIPE, stderr=PIPE)
    status, out, err = await ended(process)
    assert (status, err) == (0, "")
    assert (parts / "asked").read_text() == "--check --json --scope host\n"
    *table, verdict = out.splitlines()
    rows = [line.split(maxsplit=1) for line in table if line.split()[:1] in (["ok"], ["warn"])]
    assert [(state, " ".join(rest.split())) for state, rest in rows] == [
        ("ok", "kernel 6.18 [x]"),
        ("ok", f"broker answers at {broker.address}"),
        ("warn", "source core no [BTF] it needs BTF"),
        ("ok", "source netlink works it needs CAP_NET_ADMIN"),
    ]
    assert verdict == "h: --source auto takes netlink"

    process = await create_subprocess_exec(parts / "kmon", *options, "--json", stdout=PIPE, stderr=PIPE)
    status, out, _ = await ended(process)
    given = CHECKED.splitlines()
    assert (status, out.splitlines()[:3], out.splitlines()[4]) == (0, given[:3], given[3])
    assert json.loads(out.splitlines()[3])["name"] == "broker"

    stand_in(parts / "kmonitor-agent", f'cat <<"END"\n{CHECKED.replace("true", "false")}\nEND\nexit 2')
    process = await create_subprocess_exec(parts / "kmon", *options, stdout=PIPE, stderr=PIPE)
    assert (await ended(process))[0] == 2


async def test_doctor_without_an_answer(parts: Path) -> None:
    """Of another version's agent, say."""
    stand_in(parts / "kmonitor-agent", "echo usage: >&2; echo no such option: --check >&2; exit 2")
    process = await create_subprocess_exec(parts / "kmon", "doctor", stdout=PIPE, stderr=PIPE)
    assert await ended(process) == (2, "", f"kmon: {parts}/kmonitor-agent --check gave no answer: no such option: --check\n")


async def test_doctor_and_up_without_an_agent(parts: Path) -> None:
    (parts / "kmon").write_text(
        f"#!{sys.executable}\nimport sys\nsys.executable = {str(parts / 'python')!r}\nfrom kmonitor.clients.cli import main\nmain()\n"
    )
    for command, name in (("doctor", "kmonitor-agent"), ("up", "kmonitor-broker")):
        process = await create_subprocess_exec(parts / "kmon", command, stdout=PIPE, stderr=PIPE, env={"PATH": "/usr/bin:/bin"})
        status, out, err = await ended(process)
        assert (status, out) == (2, "")
        assert err.startswith(f"kmon: {name} is not installed here")
        assert err.count("\n") == 1


async def test_up_shows_the_line_of_a_part_that_fails(parts: Path) -> None:
    stand_in(parts / "kmonitor-broker", f"echo $$ >{parts}/pid; echo kmonitor-broker: listening on 127.0.0.1:1; exec sleep 1000")
    stand_in(parts / "kmonitor-agent", "echo a warning >&2; echo kmonitor-agent: needs CAP_BPF: run it as root >&2; exit 4")
    process = await create_subprocess_exec(parts / "kmon", "up", stdout=PIPE, stderr=PIPE)
    assert await ended(process) == (4, "", "kmon: kmonitor-agent: needs CAP_BPF: run it as root\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int((parts / "pid").read_text()), 0)


async def test_up_says_when_it_is_not_the_best_source(broker: FakeBroker, parts: Path) -> None:
    stand_in(parts / "kmonitor-broker", f"echo kmonitor-broker: listening on {broker.address}; exec sleep 1000")
    agent = 'echo "kmonitor-agent: $4 is connected to $2 (source netlink, scope host)"'
    stand_in(parts / "kmonitor-agent", f"{agent}; exec sleep 1000")
    process = await create_subprocess_exec(parts / "kmon", "up", "--json", stdout=PIPE, stderr=PIPE)
    assert process.stderr is not None
    assert b"source netlink, since core does not work here" in await process.stderr.readline()
    process.send_signal(signal.SIGINT)
    await ended(process)


async def test_up_takes_its_parts_along(broker: FakeBroker, parts: Path) -> None:
    stand_in(parts / "kmonitor-broker", f"echo $$ >{parts}/pid1; echo kmonitor-broker: listening on {broker.address}; exec sleep 1000")
    agent = 'echo "kmonitor-agent: $4 is connected to $2 (source core, scope host)"'
    stand_in(parts / "kmonitor-agent", f"echo $$ >{parts}/pid2; {agent}; exec sleep 1000")
    for number, (how, status) in enumerate(((signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGKILL, -9))):
        process = await create_subprocess_exec(parts / "kmon", "up", "--json", stdout=PIPE, stderr=PIPE)
        assert process.stdout is not None
        session = await broker.session(number)
        await session.asked(1)
        session.send(batch("web1", event(128, EXIT, 5)))
        assert json.loads(await process.stdout.readline())["kind"] == "registered"
        assert json.loads(await process.stdout.readline())["pid"] == 5
        handles = [os.pidfd_open(int((parts / name).read_text())) for name in ("pid1", "pid2")]
        process.send_signal(how)
        assert (await ended(process))[0] == status
        for handle in handles:
            with os.fdopen(handle):
                await wait_readable(handle)


async def wait_readable(descriptor: int) -> None:
    """A pidfd is readable when its process has ended."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    loop.add_reader(descriptor, done.set)
    try:
        await done.wait()
    finally:
        loop.remove_reader(descriptor)


async def test_help_does_not_wait_for_grpc() -> None:
    script = "import sys, kmonitor.clients.cli as cli\nsys.argv = ['kmon', '--help']\ntry: cli.main()\nexcept SystemExit: pass\n"
    script += "print([name for name in ('grpc', 'numpy', 'google.protobuf') if name in sys.modules])"
    process = await create_subprocess_exec(sys.executable, "-c", script, stdout=PIPE, stderr=PIPE)
    status, out, _ = await ended(process)
    assert status == 0
    assert out.splitlines()[-1] == "[]"
