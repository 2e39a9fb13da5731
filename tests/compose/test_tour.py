# SPDX-License-Identifier: Apache-2.0
"""docs/lab.md, typed and seen: every command that stands there is run on a real engine, and what it promises must come."""

from __future__ import annotations

import json
import re
import subprocess
import time

import pytest

from tests.compose import page
from tests.compose.engine import TOP, Compose, compose
from tests.lab.process import LabError, Running

SEEN_LIMIT = 90.0
"""Seconds until what the page promises must have come: an out-of-memory kill takes half a minute by itself."""

_PREFIX = re.compile(r"^monitor-1 \| ")
_FORK_OF_SHOP = re.compile(r"(\d\d:\d\d:\d\d)\.\d{3} (\w+) FORK \d+ shop → (\d+)")


class Terminal:
    """The first terminal: `docker compose up`."""

    def __init__(self, running: Running) -> None:
        self.running = running

    def lines(self, start: int = 0) -> list[str]:
        """What it shows from line `start` on."""
        return [_said(line) for line in self.running.lines[start:]]

    def wait(self, shown: list[str], known: dict[str, str], start: int) -> dict[str, str]:
        """Until all of these have come from `start` on; what the pids that the page shows are really."""
        lines: list[str] = []
        found: dict[str, str] | None = None

        def complete(line: bytes) -> bool:
            nonlocal found
            lines.append(_said(line))
            found = page.match(shown, lines, known)
            return found is not None

        try:
            self.running.wait_line(complete, "\n" + "\n".join(shown), limit=SEEN_LIMIT, start=start)
        except LabError as error:
            raise LabError("\n".join([str(error), "-- what came instead:", *lines[-100:]])) from None
        assert found is not None
        return found


def _said(line: bytes) -> str:
    """As the page has it: without the monitor's name, with that of others."""
    return _PREFIX.sub("", page.plain(line.decode(errors="replace")))


def _type(lab: Compose, step: page.Step, known: dict[str, str]) -> dict[str, str]:
    """Run a command of the page to its end; it must succeed, and print what stands there. What the pids that the page shows are really."""
    done = subprocess.run(
        lab.command(step.command),
        cwd=TOP,
        env=lab.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    found = page.match(step.prints, [page.plain(line) for line in done.stdout.splitlines()], known)
    if done.returncode != 0 or found is None:
        raise LabError(f"{step.command}: exit status {done.returncode}, expected\n{step.prints}\nand got\n{done.stdout}{done.stderr}")
    return found


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("tour", page.tours(), ids=lambda tour: str(tour[0].heading))
def test_the_tour(tour: list[page.Scene]) -> None:
    first = tour[0].steps[0]
    with compose(*re.findall(r"--profile (\w+)", first.command)) as lab:
        terminal = Terminal(lab.start(first.command))
        try:
            for scene in tour:
                _play(lab, terminal, scene)
            assert terminal.running.wait(60) == 0, terminal.running.failure("docker compose up")
        finally:
            terminal.running.stop(limit=60)
    assert not lab.left()


def _play(lab: Compose, terminal: Terminal, scene: page.Scene) -> None:
    """All that stands below one heading. `up` runs already."""
    known: dict[str, str] = {}
    for step in scene.steps:
        if " up " in step.command:
            start = 0
        else:
            start = len(terminal.running.lines)
            if " down " in step.command:
                _check_healthy(lab)
                _check_privileges(lab)
                _check_book(lab, terminal)
            typed = time.strftime("%H:%M:%S", time.gmtime())
            known = _type(lab, step, known)
        for shown in step.seen:
            known = terminal.wait(shown, {} if start == 0 else known, start)
        if "network connect" in step.command:
            _check_came_late(terminal.lines(start), typed)


def _check_came_late(lines: list[str], connected: str) -> None:
    """After the node is up again its events are those of the time before."""
    up = next(at for at, line in enumerate(lines) if line.startswith("── db1: node is UP"))
    times = [line[:8] for line in lines[up:] if " db1 FORK " in line]
    assert times[0] < connected, f"what happened in db1 while it was cut off did not come first: {times}, connected at {connected}"


def _check_healthy(lab: Compose) -> None:
    """All containers run, and those with a health check have passed it; one that was restarted may be about to."""
    until = time.monotonic() + SEEN_LIMIT
    while True:
        found = [json.loads(line) for line in lab.run("--profile", "*", "ps", "--all", "--format", "json").splitlines()]
        states = {service["Service"]: (service["State"], service["Health"]) for service in found}
        if all(state == "running" and health in ("healthy", "") for state, health in states.values()):
            break
        assert time.monotonic() < until, states
        time.sleep(1)
    assert [name for name, (_, health) in states.items() if not health] == ["monitor"]


def _check_privileges(lab: Compose) -> None:
    """The agent of a node has CAP_PERFMON and CAP_BPF (38 and 39), and the shop nothing."""
    both = lab.run("exec", "web1", "sh", "-c", "grep -h CapEff /proc/$(cat /run/agent.pid)/status /proc/$(cat /run/shop.pid)/status")
    assert [int(line.split()[1], 16) for line in both.splitlines()] == [1 << 38 | 1 << 39, 0]
    node, broker = (json.loads(lab.inspect(name))[0]["HostConfig"] for name in ("web1", "broker"))
    for each in (node, broker):
        assert (each["Privileged"], each["ReadonlyRootfs"], each["CapDrop"]) == (False, True, ["ALL"])
        assert each["SecurityOpt"] == ["no-new-privileges:true"]
    assert broker["CapAdd"] is None


def _check_book(lab: Compose, terminal: Terminal) -> None:
    """Of a node whose agent was not killed each child of the shop was told, from the first one that was: the shop has kept a book.
    What it forks just now is awaited."""
    for node in ("db1", "web2"):
        book = lab.run("exec", node, "cat", "/run/shop.book").split()
        told: list[str] = []

        def complete(line: bytes, node: str = node, told: list[str] = told, last: str = book[-1]) -> bool:
            fork = _FORK_OF_SHOP.match(_said(line))
            if fork and fork[2] == node:
                told.append(fork[3])
            return bool(told) and told[-1] == last

        terminal.running.wait_line(complete, f"the fork of {book[-1]} in {node}")
        assert told == book[book.index(told[0]) :]
    assert not [line for line in terminal.lines() if re.match("── (db1|web2): GAP", line)]
