# SPDX-License-Identifier: Apache-2.0
"""A guard of real processes: a real broker, a real agent, and what may befall them."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from kmonitor.clients import Blindness, Life, ProcessGuard, Subject, Verdict, connect
from tests.lab.services import Lab

pytestmark = pytest.mark.capture


async def until(guard: ProcessGuard, wanted: Callable[[Verdict], bool]) -> list[Verdict]:
    """The verdicts up to the first that is `wanted`."""
    found = []
    async with asyncio.timeout(30):
        async for verdict in guard:
            found.append(verdict)
            if wanted(verdict):
                break
    return found


@pytest.fixture
async def guard(service: tuple[str, str]) -> AsyncIterator[ProcessGuard]:
    async with connect(service[0]) as monitor, ProcessGuard(monitor, look_again=0.05) as made:
        yield made


async def test_a_pid_to_its_end(guard: ProcessGuard, service: tuple[str, str], lab: Lab) -> None:
    sleeper = lab.command("sleep", "60")
    await guard.add(Subject("s", node=service[1], pid=sleeper.pid))
    assert guard.verdict("s").life is Life.ALIVE
    os.kill(sleeper.pid, signal.SIGKILL)
    alive, dead = await until(guard, lambda verdict: verdict.life is Life.DEAD)
    assert (alive.life, alive.alive, dead.alive) == (Life.ALIVE, 1, 0)
    assert dead.death is not None
    assert str(dead.death).startswith(f"killed by SIGKILL from pid {os.getpid()} (")
    assert dead.process == alive.process
    await guard.add(Subject("again", node=service[1], pid=sleeper.pid))
    assert guard.verdict("again").life is Life.ABSENT


async def test_a_pidfile(guard: ProcessGuard, service: tuple[str, str], lab: Lab, tmp_path: Path) -> None:
    file = tmp_path / "x.pid"
    await guard.add(Subject("s", node=service[1], pidfile=str(file)))
    assert (guard.verdict("s").life, guard.verdict("s").reason) == (Life.ABSENT, "there is no such pidfile")
    for turn in range(3):
        sleeper = lab.command("sh", "-c", "read code; exit $code")
        file.write_text("" if turn else f"{sleeper.pid}\n", encoding="ascii")
        file.write_text(f"{sleeper.pid}\n", encoding="ascii")
        *_, alive = await until(guard, lambda verdict: verdict.life is Life.ALIVE)
        assert alive.process is not None
        assert alive.process.pid == sleeper.pid
        sleeper.say(str(turn))
        *_, dead = await until(guard, lambda verdict: verdict.life is Life.DEAD)
        assert str(dead.death) == f"exit code {turn}"
        sleeper.wait()


async def test_the_broker_is_killed_while_it_dies(lab: Lab, tmp_path: Path) -> None:
    log = ("--log", f"sqlite:{tmp_path}/log.db")
    broker = lab.broker(*log)
    agent = lab.agent("alpha", broker.address)
    sleepers = [lab.command("sleep", "60") for _ in range(2)]
    async with connect(broker.address) as monitor, ProcessGuard(monitor) as guard:
        await guard.add(*(Subject(str(n), node=agent.node, pid=sleeper.pid) for n, sleeper in enumerate(sleepers)))
        lab.kill(broker)
        await until(guard, lambda verdict: verdict.blind is Blindness.DISCONNECTED and verdict.subject.name == "1")
        assert [verdict.life for verdict in guard.verdicts.values()] == [Life.ALIVE] * 2
        os.kill(sleepers[0].pid, signal.SIGTERM)
        sleepers[0].wait()
        lab.broker(*log, listen=broker.address)
        *_, dead = await until(guard, lambda verdict: verdict.life is Life.DEAD)
        assert dead.subject.name == "0"
        assert dead.death is not None
        assert dead.death.exit_signal == signal.SIGTERM
        await until(guard, lambda verdict: verdict.subject.name == "1" and verdict.blind is None)
        assert guard.verdict("1").life is Life.ALIVE
