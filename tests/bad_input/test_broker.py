# SPDX-License-Identifier: Apache-2.0
"""`kmonitor-broker` with what cannot be."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from tests.bad_input.refusal import refused, run_all
from tests.lab.services import Lab


def test_bad_value(lab: Lab, tmp_path: Path) -> None:
    cases = {
        ("--log", "nats://127.0.0.1:4222"): "not in this version",
        ("--log", "moon"): "--log moon: unknown",
        ("--log", "memory:moon"): "--log memory:moon: unknown",
        ("--log", ""): "use --log sqlite",
        ("--log", "sqlite:/dev/null/kmonitor/log"): "cannot be opened: not a directory",
        ("--log", "sqlite:/proc/nosuch/log"): "cannot be opened: no such file or directory",  # nobody may make a folder there
        ("--log", f"sqlite:{tmp_path}"): "cannot be opened: is a directory",
        ("--log", f"sqlite:{tmp_path}/{'x' * 300}"): "cannot be opened: file name too long",
        ("--log", "memory", "--log-age", "1h"): "--log-age: the log in memory is bounded by --log-bytes alone",
        ("--log-age", "soon"): "'soon' is not a duration",
        ("--log-age", "999ms"): "give 1s to 3650d",
        ("--log-age", "9" * 400 + "d"): "give 1s to 3650d",
        ("--linger", "2h"): "--linger 2h: give 0s to 60m",
        ("--linger", "-1s"): "'-1s' is not a duration",
        ("--listen", "moon"): "'moon' is no address to listen on",
        ("--listen", "127.0.0.1:65536"): "write HOST:PORT",
        ("--listen", "192.0.2.1:7221"): "cannot listen on 192.0.2.1:7221",  # TEST-NET-1: no host has it
        ("--lease", "soon"): "'soon' is not a duration",
        ("--lease", "1ms"): "give 250ms to 60m",
        ("--progress-interval", "0s"): "give 10ms to 2s",
        ("--progress-interval", "11s"): "give 10ms to 2s",
        ("--log-bytes", "much"): "'much' is no size",
        ("--log-bytes", "-5M"): "'-5M' is no size",
        ("--log-bytes", "1K"): "give at least 1M",
        ("--log", "memory", "--log-bytes", "0"): "give at least 1M",
    }
    for words, done in zip(cases.values(), run_all(lab, [["kmonitor-broker", *options] for options in cases]), strict=True):
        refused(done, 2, words)
        assert done.stdout == "", done


def test_files_that_are_no_log(lab: Lab, tmp_path: Path) -> None:
    """They are left as they are."""
    text, database = tmp_path / "text", tmp_path / "database"
    text.write_text("no database, but long enough to be taken for one by who looks at the size of its header only\n" * 9, encoding="utf-8")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE moon (phase)")
    before = text.read_bytes(), database.read_bytes()
    words = (f"the log {text} is damaged, or no log", f"{database} is a database, but no log of kmonitor: name another file")
    for path, said in zip((text, database), words, strict=True):
        refused(lab.run("kmonitor-broker", "--listen", "127.0.0.1:0", "--log", f"sqlite:{path}"), 2, said)
    assert before == (text.read_bytes(), database.read_bytes())


def test_two_brokers_on_one_log(lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "log"
    first = lab.broker("--log", f"sqlite:{path}")
    second = lab.run("kmonitor-broker", "--listen", "127.0.0.1:0", "--log", f"sqlite:{path}")
    refused(second, 2, f"the log {path} is in use by another broker (pid {first.pid})")
    assert second.stdout == ""


def test_port_in_use(lab: Lab) -> None:
    broker = lab.broker()
    refused(lab.run("kmonitor-broker", "--log", "memory", "--listen", broker.address), 2, f"cannot listen on {broker.address}", "in use")


def test_usage(lab: Lab) -> None:
    refused(lab.run("kmonitor-broker", "--nosuch"), 2, "no such option: --nosuch", "kmonitor-broker --help")
