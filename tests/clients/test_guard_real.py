# SPDX-License-Identifier: Apache-2.0
"""A guard of real processes: a real broker, a real agent, and what may befall them."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from kmonitor.clients import Blindness, Certainty, Life, ProcessGuard, Subject, Verdict, connect
from tests.clients.guards import PROCESS, heartbeats, until
from tests.lab.bpffs import remove_pins
from tests.lab.control_groups import control_group, hierarchy_lack
from tests.lab.requires import need
from tests.lab.services import Agent, Lab

pytestmark = pytest.mark.capture


def all_are(guard: ProcessGuard, blind: Blindness | None, *names: str) -> Callable[[Verdict], bool]:
    return lambda _: all(guard.verdict(name).blind is blind for name in names)


@pytest.fixture(scope="module")
def service(module_lab: Lab) -> tuple[str, str]:
    """With heartbeats that come soon: after ten of them a group is listed again."""
    broker = module_lab.broker("--progress-interval", "100ms")
    return broker.address, module_lab.agent("alpha", broker.address).node


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


async def test_groups(guard: ProcessGuard, service: tuple[str, str], lab: Lab) -> None:
    """Members that were there, that are forked, that are moved in and out, and in groups below; and a group that is made anew."""
    need(hierarchy_lack)
    with control_group(f"kmtest{os.getpid()}.slice") as top:
        unit = top.group(f"kmonitor-{os.getpid()}.service")
        first, second = lab.command("sleep", "60"), lab.command("sh", "-c", "read x; sleep 60 & read x; kill -9 $!; wait; exit 4")
        unit.take(first.pid)
        name = unit.path.rpartition("/")[2]
        await guard.add(
            Subject("unit", node=service[1], unit=name),
            Subject("sh", node=service[1], cgroup=top.path, comms=("sh",)),
            Subject("none", node=service[1], unit="nosuch.service"),
        )
        assert {name: verdict.life for name, verdict in guard.verdicts.items()} == {
            "unit": Life.ALIVE, "sh": Life.ABSENT, "none": Life.ABSENT,
        }  # fmt: skip
        assert guard.verdict("none").reason == "the unit does not run"
        unit.group("below").take(second.pid)
        second.say("fork")
        await until(guard, lambda _: guard.verdict("unit").alive == 3 and guard.verdict("sh").life is Life.ALIVE)
        assert (guard.verdict("unit").process or PROCESS).pid == first.pid
        second.say("kill")
        await until(guard, lambda verdict: verdict.subject.name == "sh" and verdict.life is Life.DEAD)
        assert str(guard.verdict("sh").death) == "exit code 4"
        assert guard.verdict("unit").alive == 1
        os.kill(first.pid, signal.SIGKILL)
        *_, dead = await until(guard, lambda verdict: verdict.subject.name == "unit" and verdict.life is Life.DEAD)
        assert dead.death is not None
        assert (dead.death.exit_signal, dead.death.process.pid) == (signal.SIGKILL, first.pid)
        # Started again, as systemd does: the group is removed, and another one made.
        first.wait()
        second.wait()
        unit.remove()
        third = lab.command("sleep", "60")
        unit.again().take(third.pid)
        *_, alive = await until(guard, lambda verdict: verdict.subject.name == "unit" and verdict.life is Life.ALIVE)
        assert (alive.process or PROCESS).pid == third.pid
        # It leaves: that is no death.
        unit.leave(third.pid)
        fourth = lab.command("sleep", "60")
        unit.take(fourth.pid)
        os.kill(fourth.pid, signal.SIGTERM)
        *_, left = await until(guard, lambda verdict: verdict.subject.name == "unit" and verdict.alive == 0)
        assert (left.life, left.reason) == (Life.ABSENT, "its processes are in another control group now")
        third.process.kill()


async def test_what_befalls_broker_and_agent(lab: Lab, tmp_path: Path) -> None:
    lab.pins /= "guard"
    log = ("--log", f"sqlite:{tmp_path}/log.db", "--progress-interval", "100ms")
    broker = lab.broker(*log)
    agent = lab.agent("alpha", broker.address, pin=True)
    sleepers = {name: lab.command("sleep", "60") for name in ("lives", "broker", "agent")}

    async with connect(broker.address) as monitor, ProcessGuard(monitor) as guard:
        await guard.add(*(Subject(name, node=agent.node, pid=sleeper.pid) for name, sleeper in sleepers.items()))
        await heartbeats(broker.address, agent.node)  # it is on the broker's disk
        # The broker is killed, and a process dies meanwhile.
        lab.kill(broker)
        await until(guard, all_are(guard, Blindness.DISCONNECTED, *sleepers))
        assert {verdict.life for verdict in guard.verdicts.values()} == {Life.ALIVE}
        os.kill(sleepers["broker"].pid, signal.SIGTERM)
        sleepers["broker"].wait()
        broker = lab.broker(*log, listen=broker.address)
        *_, dead = await until(guard, lambda verdict: verdict.life is Life.DEAD)
        assert dead.subject.name == "broker"
        assert str(dead.death).startswith(f"killed by SIGTERM from pid {os.getpid()}")
        await until(guard, all_are(guard, None, *sleepers))
        # The agent is killed, and a process dies before the next one is there.
        lab.kill(agent)
        await until(guard, all_are(guard, Blindness.UNREACHABLE, "lives", "agent"))
        os.kill(sleepers["agent"].pid, signal.SIGTERM)
        sleepers["agent"].wait()
        assert guard.verdict("agent").life is Life.ALIVE
        lab.agent("alpha", broker.address, pin=True)
        *_, dead = await until(guard, lambda verdict: verdict.life is Life.DEAD)
        assert dead.subject.name == "agent"
        assert str(dead.death).startswith(f"killed by SIGTERM from pid {os.getpid()}")
        await until(guard, all_are(guard, None, *sleepers))
        assert guard.verdict("lives").life is Life.ALIVE
        # Nobody saw the next one die: the pins are gone.
        for each in [each for each in lab.running if isinstance(each, Agent)]:
            lab.stop(each)
        remove_pins(lab.pins)
        os.kill(sleepers["lives"].pid, signal.SIGTERM)
        sleepers["lives"].wait()
        lab.agent("alpha", broker.address)
        *_, dead = await until(guard, lambda verdict: verdict.life is Life.DEAD)
        assert (dead.certainty, str(dead.death)) == (Certainty.INFERRED, "end not seen")
