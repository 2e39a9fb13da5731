# SPDX-License-Identifier: Apache-2.0
"""The tour of docs/lab-without-docker.md, as it is written there: each command is run, each line that is shown must come.

Of the page these blocks count, in their order: `console`, where a line after "# " is a command and others are what it prints; `watch` and
`watch 2`, what the first and the second `kmon watch` shows from there on. Numbers may differ, and how long things took.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.lab.namespaces import namespaces_lack
from tests.lab.process import Running
from tests.lab.requires import capture_lack, need
from tests.lab.services import BIN, Lab
from tests.lab_command.conftest import LIMIT, identities, rest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "lab-without-docker.md"
NAME = f"tour{os.getpid()}"


@dataclass
class Step:
    """A command, or (with none) a look at what a watch shows."""

    command: str = ""
    watch: str = ""
    shown: list[str] = field(default_factory=list)


def steps(page: str) -> Iterator[Step]:
    """Those of a page."""
    for kind, body in re.findall(r"^```(console|watch(?: 2)?)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        if kind != "console":
            yield Step(watch=kind, shown=body.splitlines())
            continue
        step: Step | None = None
        for line in body.splitlines():
            if line.startswith("# "):
                if step is not None:
                    yield step
                step = Step(command=line.removeprefix("# "))
            else:
                assert step is not None, f"{line!r} is no command, and behind none"
                step.shown.append(line)
        if step is not None:
            yield step


def plain(line: str) -> str:
    """A line without what differs from run to run: numbers, the length of rules and columns, the time that something took."""
    line = line.replace("its agent ended the stream", "its agent's stream broke")  # which of them a kill is, the broker's luck decides
    line = re.sub(r"\s+after [\d.hmsun ]+$", " after N", line)
    line = re.sub(r"\d[\d:.]*", "N", line)
    return re.sub(r"[─\s]+", " ", line).strip()


class Shell(Running):
    """The terminal of the commands."""

    def __init__(self) -> None:
        environment = {"PATH": f"{BIN}:{os.environ['PATH']}", "KMONITOR_LAB": NAME, "KMONITOR_BROKER": ""}
        super().__init__(
            "bash",
            ["bash", "--noprofile", "--norc", "-c", 'exec 2>&1; while read -r line; do eval "$line"; echo ended $?; done'],
            env=environment,
        )

    def run(self, command: str) -> list[str]:
        """Run a command of the page; what it prints."""
        start = len(self.lines)
        self.say(command)
        end = self.wait_line(lambda line: line.startswith(b"ended "), command, limit=LIMIT, start=start)
        if self.lines[end] != b"ended 0" and not command.startswith("kmon lab exec"):  # which ends as the command in the node
            raise self.failure(command)
        # A shell that is no terminal's says where it was when a command was killed.
        return [
            re.sub(r"^bash: line \d+: +\d+ ([A-Z][a-z]+( [a-z]+)*)(  | \(core).*", r"\1", line.decode()) for line in self.lines[start:end]
        ]


def shows(watch: Running, wanted: str, start: int) -> int:
    """Wait until a watch shows a line; the place of the next. Lines of several nodes may come in any order: the caller says from where."""
    return watch.wait_line(lambda line: plain(line.decode()) == plain(wanted), repr(wanted), start=start) + 1


@pytest.fixture
def shell() -> Iterator[Shell]:
    """No lab is left behind it."""
    need(capture_lack, namespaces_lack)
    shell = Shell()
    yield shell
    were = identities(NAME)
    subprocess.run([BIN / "kmon", "lab", "down", "--name", NAME], check=True)
    shell.close_input()
    shell.wait()
    shell.stop()
    assert rest(NAME, were) == []


@pytest.mark.timeout(180)
def test_the_tour(shell: Shell, lab: Lab) -> None:
    watches: dict[str, Running] = {}
    seen: dict[str, int] = {}
    for step in steps(PAGE.read_text(encoding="utf-8")):
        if step.command.startswith("kmon watch"):
            name = "watch" if not watches else "watch 2"
            [address] = shell.run("echo $KMONITOR_BROKER")
            watches[name] = lab.command("sh", "-c", f"exec {BIN}/{step.command} 2>&1", env={"KMONITOR_BROKER": address})
            for line in step.shown:
                seen[name] = max(seen.get(name, 0), shows(watches[name], line, 0))
        elif step.command:
            printed = shell.run(step.command)
            assert list(map(plain, printed)) == [plain(line.replace("lab lab", f"lab {NAME}")) for line in step.shown], step.command
        else:
            start = seen[step.watch]
            for line in step.shown:
                seen[step.watch] = max(seen[step.watch], shows(watches[step.watch], line, start))
    assert sorted(watches) == ["watch", "watch 2"]
    assert shell.run("ip netns list | grep -c kmlab-$KMONITOR_LAB- || true") == ["0"]
    lab.stop(watches["watch"])
    assert watches["watch 2"].wait() == 0


def test_every_command_is_in_the_page() -> None:
    help_text = subprocess.run(
        [BIN / "kmon", "lab", "--help"], check=True, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"}
    ).stdout
    names = re.findall(r"^  (\w+)\s", help_text.partition("Commands:")[2], re.MULTILINE)
    assert {"up", "down", "exec"} <= set(names)
    table = PAGE.read_text(encoding="utf-8").partition("## The commands")[2]
    assert [name for name in names if f"`{name} " not in table and f"`{name}`" not in table] == []
