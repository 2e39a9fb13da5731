# SPDX-License-Identifier: Apache-2.0
"""`kmon ha keepalived` without a cluster: what it is told wrongly, what it writes when nobody answers, and the file itself."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kmonitor.clients.cli.ha import app
from kmonitor.clients.ha.keepalived_file import TrackFile
from kmonitor.wire.errors import KmonitorError, UsageError

pytestmark = pytest.mark.wheel_ok

KMON = Path(sys.executable).parent / "kmon"
NOBODY = ("--broker", "127.0.0.1:1")
ONE = ("--process", "web1:pidfile=/run/web.pid")


def kmon(*words: str | Path, env: dict[str, str] | None = None) -> tuple[int, list[str]]:
    """Exit status, and lines of standard error, as main() makes them; without the time that an interpreter takes to start."""
    done = CliRunner().invoke(app, ["keepalived", *map(str, words)], env=env)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    if isinstance(done.exception, KmonitorError):
        return done.exception.exit_status, [*lines, f"kmon: {done.exception}"]
    assert done.exception is None or isinstance(done.exception, SystemExit), done
    return done.exit_code, lines


def test_a_mistake_is_one_line_and_status_2() -> None:
    done = subprocess.run([KMON, "ha", "keepalived", "--file", "x"], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "kmon: give --file and at least one --process, or --config\n"


def table(**keys: str) -> str:
    """A [[track]], of which some keys are other ones, or ("") not there."""
    usual = {"file": '"/run/x"', "processes": '["web1:pid=3"]', "when-blind": '"keep"'}
    given = {name.replace("_", "-"): text for name, text in keys.items()}
    return "[[track]]\n" + "".join(f"{name} = {text}\n" for name, text in (usual | given).items() if text)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ((), "give --file and at least one --process, or --config"),
        (("--file", "x", *ONE), "--when-blind down (nobody serves unseen), keep"),
        (("--file", "x", *ONE, "--when-blind", "perhaps"), "when-blind 'perhaps': say down, keep or up"),
        (("--file", "x", *ONE, "--when-blind", "up", "--quorum", "2"), "a quorum of 2 from 1 processes"),
        (("--file", "x", *ONE, *ONE, "--when-blind", "up"), "is given twice"),
        (("--file", "x", *ONE, "--when-blind", "up", "--down-value", "0"), "both 0"),
        (("--file", "x", *ONE, "--when-blind", "up", "--down-value", "-255"), "value -255 is more than keepalived takes"),
        (("--file", "x", *ONE, "--when-blind", "up", "--up-delay", "soon"), "'soon' is not a duration"),
        (("--file", "x", "--process", "web1", "--when-blind", "up"), "write NODE:pidfile=PATH"),
        (("--file", "x", "--process", "web1:pid=x", "--when-blind", "up"), "write NODE:pidfile=PATH"),
        (("--file", "x", "--process", "web1:pidfile=run", "--when-blind", "up"), "give an absolute path"),
        (("--file", "x", "--process", "web*:pid=3", "--when-blind", "up"), "cannot be a node's name"),
        (("--file", "x", "--process", "a:pid=3,comm=b", "--when-blind", "up"), "comm= belongs to unit= and cgroup="),
        (
            ("--file", "x", "--process", "a:unit=b,comm=elasticsearch-main", "--when-blind", "up"),
            "comm 'elasticsearch-main' matches nothing",
        ),
        (("--file", "/nowhere/x", *ONE, "--when-blind", "up"), "cannot write /nowhere/x: No such file or directory"),
        (("--file", "/tmp", *ONE, "--when-blind", "up"), "/tmp is a folder"),
        (("--config", "/nowhere.toml"), "cannot read /nowhere.toml: No such file or directory"),
        (("--config", "/nowhere.toml", *ONE), "--config says all of it"),
    ],
)
def test_a_mistake(words: tuple[str, ...], wanted: str) -> None:
    code, [line] = kmon(*words, *NOBODY)
    assert code == 2
    assert wanted in line


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "there is no [[track]]"),
        ("[track]\nfile = 1", "there is no [[track]]"),
        ("[[track]\n", "is no TOML"),
        ('broker = "x"\n' + table(), "'broker' is nothing that is known"),
        (table(weight="1"), "'weight' is nothing that a [[track]] has"),
        (table(when_blind=""), "a [[track]] has no when-blind"),
        (table(quorum='"1"'), "quorum = '1' is of the wrong type"),
        (table(quorum="true"), "quorum = True is of the wrong type"),
        (table(processes="[3]"), "processes is a list of texts"),
        (table(processes='["a:cgroup=/b,comm=*elasticsearch-main"]'), "comm '*elasticsearch-main' matches nothing"),
        (table(file='"x"'), "give an absolute path"),
        (table() + table(), "/run/x is the file of two tracks"),
    ],
)
def test_a_mistake_in_the_file(tmp_path: Path, text: str, wanted: str) -> None:
    config = tmp_path / "keepalived.toml"
    config.write_text(text, encoding="utf-8")
    code, [line] = kmon("--config", config, *NOBODY)
    assert code == 2
    assert wanted in line


@pytest.mark.parametrize(
    ("when", "before", "after"), [("down", "0\n", "1\n"), ("keep", "0\n", "0\n"), ("keep", "", "1\n"), ("up", "1\n", "0\n")]
)
def test_no_broker_answers(tmp_path: Path, when: str, before: str, after: str) -> None:
    file = tmp_path / "x"
    if before:
        file.write_text(before, encoding="ascii")
    code, lines = kmon("--file", file, *ONE, "--when-blind", when, *NOBODY)
    assert code == 3
    assert "no broker answers at 127.0.0.1:1" in lines[-1]
    assert file.read_text(encoding="ascii") == after
    assert file.stat().st_mode & 0o777 == 0o644


def test_write_blind_asks_no_broker(tmp_path: Path) -> None:
    file = tmp_path / "x"
    assert kmon("--file", file, *ONE, "--when-blind", "down", "--down-value", "-20", "--write-blind") == (
        0,
        [f"kmon: {file}: -20: nobody watches"],
    )
    assert file.read_text(encoding="ascii") == "-20\n"


def test_systemd_is_told_that_the_files_are_there(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(5)
        code, _ = kmon("--file", tmp_path / "x", *ONE, "--when-blind", "down", *NOBODY, env={"NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert code == 3
        assert [told.recv(100), told.recv(100)] == [b"READY=1", b"STOPPING=1"]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    first, second = TrackFile(tmp_path / "x"), TrackFile(tmp_path / "x")
    first.open()
    with pytest.raises(UsageError, match="by another kmon ha keepalived"):
        second.open()
    first.close()
    second.open()
    second.close()


def test_it_is_never_seen_half_written(tmp_path: Path) -> None:
    """Whoever has the old file open reads the old number: another file takes its name. What a killed writer left is no hindrance."""
    file = TrackFile(tmp_path / "x")
    file.open()
    file.write(1)
    (tmp_path / ".x.kmon-new").write_text("half", encoding="ascii")
    with (tmp_path / "x").open(encoding="ascii") as old:
        file.write(-20)
        assert old.read() == "1\n"
    assert file.read() == -20
    assert not (tmp_path / ".x.kmon-new").exists()
    file.close()


def test_a_link_is_no_track_file(tmp_path: Path) -> None:
    """keepalived resolves it when it starts, and would not see another file in the link's place; and whoever made it may mean harm."""
    (tmp_path / "x").write_text("0\n", encoding="ascii")
    (tmp_path / "link").symlink_to("x")
    with pytest.raises(UsageError, match="link cannot be a track file: it is a symbolic link; remove it, or name another"):
        TrackFile(tmp_path / "link").open()
    assert TrackFile(tmp_path / "link").read() is None
    assert (tmp_path / "x").read_text(encoding="ascii") == "0\n"


def test_a_link_that_comes_later_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("precious", encoding="ascii")
    file = TrackFile(tmp_path / "x")
    file.open()
    file.write(1)
    (tmp_path / "x").unlink()
    (tmp_path / "x").symlink_to("other")
    assert file.mend()
    assert not (tmp_path / "x").is_symlink()
    assert (tmp_path / "other").read_text(encoding="ascii") == "precious"
    file.close()


@pytest.mark.parametrize("text", ["", "x", "1 2", "1\\n2"])
def test_what_is_no_number(tmp_path: Path, text: str) -> None:
    (tmp_path / "x").write_text(text, encoding="ascii")
    assert TrackFile(tmp_path / "x").read() is None
