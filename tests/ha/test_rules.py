# SPDX-License-Identifier: Apache-2.0
"""The configuration of `kmon ha pacemaker`, and what is said of mistakes in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kmonitor.clients.ha.rules import Rule, load
from kmonitor.wire.durations import parse_duration
from kmonitor.wire.errors import UsageError


def rules(tmp_path: Path, text: str) -> Path:
    """A file."""
    path = tmp_path / "pacemaker.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_all_of_it(tmp_path: Path) -> None:
    text = """
[nodes]
web1 = "web1.example"
[resource.web]
pidfile = "/run/web.pid"
grace = "500ms"
[resource.db]
unit = "postgresql.service"
comm = ["postgres", "postmaster"]
[resource.ip]
ignore = true
"""
    found = load(rules(tmp_path, text), parse_duration)
    assert found.resources == {
        "web": Rule(pidfile="/run/web.pid", grace=0.5),
        "db": Rule(unit="postgresql.service", comms=("postgres", "postmaster")),
        "ip": Rule(ignore=True),
    }
    assert (found.agent_of("web1"), found.agent_of("web2")) == ("web1.example", "web2")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[resource.web]\npidfil = '/run/web.pid'", "'pidfil' is not known"),
        ("[resource.web]\npidfile = 3", "pidfile cannot be 3"),
        ("[resource.web]\npidfile = '/a'\nunit = 'b'", "give one of pidfile, unit, cgroup"),
        ("[resource.web]\npidfile = '/a'\ncomm = 'b'", "comm belongs to unit or cgroup"),
        ("[resource.web]\npidfile = '/a'\ngrace = 'soon'", "'soon' is not a duration"),
        (
            "[resource.web]\nunit = 'a'\ncomm = 'elasticsearch-main'",
            "pacemaker.toml: [resource.web]: comm 'elasticsearch-main' matches nothing",
        ),
        ("[resource.web]\nunit = 'a'\ncomm = ['x', 'a*elasticsearch-*main']", "comm 'a*elasticsearch-*main' matches nothing"),
        ("[resource.web]\nunit = 'a'\ncomm = ['x', 3]", "comm is a text, or a list of texts"),
        ("[resource.web]\nunit = 'a b'", "[resource.web]: 'a b' is not the name of a systemd unit"),
        ("[resource.web]\npidfile = 'run/web.pid'", "[resource.web]: pidfile 'run/web.pid': give an absolute path"),
        ("[resource.web]\ncgroup = 'a/..'", "[resource.web]: control group 'a/..'"),
        ("[nodes]\nweb1 = 'a b'", "[nodes]: 'a b' cannot be a node's name"),
        ("[resources.web]\n", "'resources' is not known"),
        ("[nodes]\nweb1 = 3", "[nodes]"),
        ("resource = 3", "[resource.NAME]"),
        ("[resource", "end of a table declaration"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        load(rules(tmp_path, text), parse_duration)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load(tmp_path / "nothing.toml", parse_duration)
