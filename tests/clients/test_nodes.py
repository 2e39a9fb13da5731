# SPDX-License-Identifier: Apache-2.0
"""`kmon nodes`, `kmon ps` and `kmon version` as a user runs them."""

from __future__ import annotations

import json

from kmonitor.wire.version import installed_version
from tests.clients.conftest import Kmon
from tests.clients.fake_broker import FakeBroker
from tests.clients.test_watch import ended


async def test_nodes(broker: FakeBroker, kmon: Kmon) -> None:
    """Names and states are whole, however long."""
    long = f"web1.{'x' * 100}.example"
    broker.nodes = [long, "web2"]
    broker.unreachable = {"web2"}
    status, out, _ = await ended(await kmon("nodes"))
    heading, *rows = (line.split() for line in out.splitlines())
    assert (status, heading) == (0, ["NODE", "STATE", "SINCE", "SOURCE", "WATCHED", "LOST"])
    assert [row[:2] for row in rows] == [[long, "UP"], ["web2", "UNREACHABLE"]]
    assert max(map(len, (await ended(await kmon("nodes", "web2")))[1].splitlines())) < 80
    status, out, _ = await ended(await kmon("nodes", "-o", "wide"))
    assert "role=web" in out
    assert await ended(await kmon("nodes", "-o", "name")) == (0, f"{long}\nweb2\n", "")
    for form in (["--json"], ["-o", "json"]):
        status, out, _ = await ended(await kmon("nodes", *form))
        assert [(node["name"], node["state"], node["labels"]) for node in map(json.loads, out.splitlines())] == [
            (long, "UP", {"role": "web"}),
            ("web2", "UNREACHABLE", {"role": "web"}),
        ]
    assert (await ended(await kmon("nodes", "-o", "xml")))[2] == "kmon: --output xml: give one of wide, json, name\n"


async def test_questions_that_nothing_answers(broker: FakeBroker, kmon: Kmon) -> None:
    """Status 1 and a line, as grep(1); an empty cluster is an answer."""
    broker.nodes = ["web1"]
    for words, said in ((["nodes", "nosuch"], "the broker knows no such node"), (["ps", "--comm", "nosuch"], "no such process on web1")):
        for form in ([], ["--json"]):
            assert await ended(await kmon(*words, *form)) == (1, "", f"kmon: {said}\n")
    broker.nodes = []
    assert await ended(await kmon("nodes")) == (0, "", "kmon: no node has connected yet: start kmonitor-agent on one\n")


async def test_ps(broker: FakeBroker, kmon: Kmon) -> None:
    """The only node needs no name; of several one is asked for."""
    broker.nodes = ["web1"]
    broker.processes = {("web1", 9): 90, ("web1", 8): 50_000_000_090}
    broker.comms = {8: "cat"}
    status, out, _ = await ended(await kmon("ps"))
    assert status == 0
    assert [line.split() for line in out.splitlines()] == [
        ["PID", "PPID", "UID", "AGE", "COMMAND"],
        ["8", "1", "1000", "10.00", "s", "cat", "60"],
        ["9", "1", "1000", "1m00s", "sleep", "60"],
    ]
    for order, pids in (("pid", "8\n9\n"), ("age", "9\n8\n"), ("comm", "8\n9\n")):
        assert await ended(await kmon("ps", "--sort", order, "-o", "name")) == (0, pids, "")
    status, out, _ = await ended(await kmon("ps", "--node", "web1", "--json"))
    first = json.loads(out.splitlines()[0])
    assert {"boot_id": "boot-1", "args": ["cat", "60"], "args_truncated": False}.items() <= first.items()
    assert (first["start_time"], first["age_ns"]) == (50_000_000_090, 10_000_000_000)
    broker.nodes = ["web1", "web2"]
    assert await ended(await kmon("ps")) == (2, "", "kmon: give --node: one of web1, web2\n")
    assert await ended(await kmon("ps", "--node", "db1")) == (2, "", "kmon: there is no node db1\n")
    assert (await ended(await kmon("ps", "--sort", "size")))[0] == 2


async def test_version(broker: FakeBroker, kmon: Kmon) -> None:
    """Of both ends; without a broker the own one all the same."""
    broker.nodes = ["web1"]
    own = installed_version()
    assert await ended(await kmon("version")) == (0, f"kmon    {own}\nbroker  0.9\n", "")
    status, out, _ = await ended(await kmon("version", "--json"))
    assert json.loads(out) == {"kmon": own, "broker": "0.9", "address": broker.address}
    status, out, err = await ended(await kmon("version", "--broker", "127.0.0.1:1"))
    assert (status, out, err.count("\n")) == (3, f"kmon    {own}\n", 1)
    assert await ended(await kmon("--version")) == (0, f"kmon {own}\n", "")
