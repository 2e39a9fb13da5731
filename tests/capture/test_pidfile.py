# SPDX-License-Identifier: Apache-2.0
"""Registering for the process that a file of the node names: the file is read once, by the agent, and its process is the one."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from kmonitor.clients import BadSelectorError, Event, Monitor, Reconnected, Registered, RegistrationError, RegistrationState, connect, sync
from kmonitor.wire.selectors import PID_MAX
from tests.bad_input.refusal import refused
from tests.capture.test_registration import LONGEST_US, Forker
from tests.lab.process import Running
from tests.lab.services import Lab
from tests.lab.workload import Programs, Stage

RUNNING = RegistrationState.RUNNING
EXITED = RegistrationState.EXITED
NOT_FOUND = RegistrationState.NOT_FOUND
LIMIT = 10.0
NO_PID = PID_MAX
"""Never given: the highest pid is one less. That of a process that has ended may be another's by the time it is looked up."""
ROUNDS = 300
LONGEST = (LONGEST_US, 10 * LONGEST_US)


def idler(lab: Lab) -> Running:
    """A process that ends with the code that it is told."""
    started = lab.command("sh", "-c", "echo ready; read code; exit $code")
    started.wait_line(lambda text: text == b"ready", "its start")
    return started


def end(process: Running, code: int) -> None:
    process.say(str(code))
    assert process.wait() == code


async def next_exit(monitor: Monitor) -> Event:
    async with asyncio.timeout(LIMIT):
        async for item in monitor:
            if isinstance(item, Event) and item.is_exit:
                return item
    raise AssertionError("the stream has ended")


@pytest.mark.one_source
@pytest.mark.parametrize("text", ["{}", "{}\n", " {} \n", "\t{}\r\n", "{}\nmore\n" + "x" * 5000, "000{}\n"])
async def test_what_the_file_names_is_watched(lab: Lab, service: tuple[str, str], tmp_path: Path, text: str) -> None:
    address, node = service
    process, file = idler(lab), tmp_path / "daemon.pid"
    file.write_text(text.format(process.pid))
    (tmp_path / "link.pid").symlink_to(file)
    async with connect(address) as monitor:
        answer = await monitor.register(node=node, pidfile=str(tmp_path / "link.pid"), events="exit")
        assert answer.states == {node: RUNNING}
        found = answer.process(node)
        assert found is not None
        assert (found.pid, found.comm) == (process.pid, "sh")
        assert answer.answers[0].target == f"pidfile {tmp_path}/link.pid"
        end(process, 7)
        event = await next_exit(monitor)
        assert (event.pid, event.start_time, event.exit_code, event.inferred) == (process.pid, found.start_time, 7, False)


@pytest.mark.one_source
async def test_the_registration_is_the_process_s_and_not_the_file_s(lab: Lab, service: tuple[str, str], tmp_path: Path) -> None:
    address, node = service
    first, second, file = idler(lab), idler(lab), tmp_path / "daemon.pid"
    file.write_text(f"{first.pid}\n")
    async with connect(address) as monitor:
        await monitor.register(node=node, pidfile=str(file), events="exit")
        file.write_text(f"{second.pid}\n")
        more = await monitor.register(node=node, pidfile=str(file), events="abort")
        assert int(more.event_mask) == 0x50
        assert (process := more.process(node)) is not None
        assert process.pid == first.pid
        end(first, 1)
        assert (await next_exit(monitor)).pid == first.pid
        # It is over with its process: registering again is the way to the next one.
        again = await monitor.register(node=node, pidfile=str(file), events="exit")
        assert again.states == {node: RUNNING}
        end(second, 2)
        event = await next_exit(monitor)
        assert (event.pid, event.exit_code) == (second.pid, 2)


@pytest.mark.one_source
async def test_deregistered_by_the_file(lab: Lab, service: tuple[str, str], tmp_path: Path) -> None:
    address, node = service
    watched, fence, file = idler(lab), idler(lab), tmp_path / "daemon.pid"
    file.write_text(f"{watched.pid}\n")
    async with connect(address) as monitor:
        await monitor.register(node=node, pidfile=str(file), events="exit,fork")
        left = await monitor.deregister(node=node, pidfile=str(file), events="fork")
        assert int(left.event_mask) == 0x40
        assert int((await monitor.deregister(node=node, pidfile=str(file))).event_mask) == 0
        await monitor.register(node=node, pid=fence.pid, events="exit")
        end(watched, 1)
        end(fence, 2)
        assert (await next_exit(monitor)).pid == fence.pid
        assert (await monitor.list_nodes(node))[0].watched_processes == 0


async def test_followed(service: tuple[str, str], stage: Stage, tmp_path: Path) -> None:
    """With filter and follow, as for a pid: the same events."""
    address, node = service
    root = stage.start("mixed")
    file = tmp_path / "root.pid"
    file.write_text(f"{root.root_pid}\n")
    async with connect(address) as by_file, connect(address) as by_pid:
        await by_file.register(node=node, pidfile=str(file), events="process", follow=True)
        await by_pid.register(node=node, pid=root.root_pid, events="process", follow=True)
        root.say("go")
        await asyncio.to_thread(root.truth)
        seen: list[list[int]] = []
        for monitor in (by_file, by_pid):
            positions: list[int] = []
            async with asyncio.timeout(LIMIT):
                async for item in monitor:
                    if isinstance(item, Event):
                        positions.append(item.position)
                        if item.is_exit and item.pid == root.root_pid:
                            break
            seen.append(positions)
        assert seen[0] == seen[1]
        assert len(seen[0]) > 3


@pytest.mark.timeout(120)
async def test_registering_while_the_process_dies(service: tuple[str, str], programs: Programs, tmp_path: Path) -> None:
    """RUNNING and then the end, or EXITED and nothing: the file is read in one step, and its process armed in another."""
    address, node = service
    seed = random.randrange(1 << 32)
    print(f"\nseed {seed}")
    rng = random.Random(seed)
    forker = await Forker.start(programs.brief)
    states: list[RegistrationState] = []
    promised: dict[tuple[int, int], int] = {}  # pid and start time of each that was RUNNING -> its exit code
    told: list[tuple[tuple[int, int], int | None]] = []
    async with connect(address) as monitor:
        # The last one lives long enough to be seen to its end: what was to come before has come by then.
        for number, micros in enumerate([*(rng.randrange(rng.choice(LONGEST)) for _ in range(ROUNDS)), 2_000_000]):
            file, code = tmp_path / f"{number}.pid", rng.randrange(256)
            pid = await forker.fork(micros, code, reap=False)  # nobody else gets the pid before the answer is there
            file.write_text(f"{pid}\n")
            async with asyncio.timeout(LIMIT):
                answer = await monitor.register(node=node, pidfile=str(file), events="exit")
            states.append(answer.states[node])
            if (process := answer.process(node)) is not None:
                assert process.pid == pid
                promised[pid, process.start_time] = code
                while not told or told[-1][0] != (pid, process.start_time):
                    event = await next_exit(monitor)
                    assert not event.inferred
                    told.append(((event.pid, event.start_time), event.exit_code))
            await forker.ended(reaped=False)
    await forker.stop()
    count = Counter(states)
    print(dict(count))
    assert states[-1] is RUNNING
    # Both sides of the race were tried, or the test has shown nothing.
    assert min(count[RUNNING], count[EXITED]) > ROUNDS / 20
    assert count[RUNNING] + count[EXITED] == len(states)
    assert len(promised) == count[RUNNING]
    assert told == list(promised.items())


async def test_another_broker_is_told_which_process_it_was(lab: Lab, tmp_path: Path) -> None:
    """The client comes back to a broker that knows nothing, and the file names another process by then."""
    broker = lab.broker()
    lab.agent("beta", broker.address)
    first, second, file = idler(lab), idler(lab), tmp_path / "daemon.pid"
    file.write_text(f"{first.pid}\n")
    async with connect(broker.address) as monitor:
        await monitor.register(nodes=["be*"], pidfile=str(file), events="exit")
        lab.stop(broker)
        file.write_text(f"{second.pid}\n")
        lab.broker(listen=broker.address)
        reconnected = False
        async with asyncio.timeout(30):
            async for item in monitor:
                reconnected |= isinstance(item, Reconnected)
                if reconnected and isinstance(item, Registered) and item.process is not None:
                    assert (item.state, item.process.pid) == (RUNNING, first.pid)
                    break
        end(second, 2)
        end(first, 1)
        event = await next_exit(monitor)
        assert (event.pid, event.exit_code) == (first.pid, 1)


@pytest.mark.one_source
async def test_no_such_file(service: tuple[str, str], tmp_path: Path) -> None:
    address, node = service
    (tmp_path / "file").write_text("1\n")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    async with connect(address) as monitor:
        for name in ("missing.pid", "nofolder/x.pid", "file/x.pid", "dangling"):
            assert (await monitor.register(node=node, pidfile=str(tmp_path / name), events="exit")).states == {node: NOT_FOUND}


def test_a_process_that_has_ended(service: tuple[str, str], tmp_path: Path) -> None:
    """Waited for or not: the file named it, so it was there."""
    address, node = service
    file = tmp_path / "stale.pid"
    with sync.connect(address) as monitor:
        file.write_text(f"{NO_PID}\n")
        assert monitor.register(node=node, pidfile=str(file), events="exit").states == {node: EXITED}
        with subprocess.Popen(["true"]) as zombie:
            os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
            file.write_text(f"{zombie.pid}\n")
            assert monitor.register(node=node, pidfile=str(file), events="exit").states == {node: EXITED}
        with pytest.raises(BadSelectorError):
            monitor.register(node=node, pidfile="run/x.pid", events="exit")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


def _loop(path: Path) -> None:
    path.symlink_to(path)


KERNELS = "is a file of the kernel's own, such as those in /proc and /sys"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "garbage": (lambda path: path.write_text("nginx\n"), "has no process id in its first line"),
    "two numbers": (lambda path: path.write_text("1 2\n"), "has no process id in its first line"),
    "second line": (lambda path: path.write_text("\n1\n"), "has no process id in its first line"),
    "negative": (lambda path: path.write_text("-1\n"), "has no process id in its first line"),
    "bytes": (lambda path: path.write_bytes(bytes(range(128, 160))), "has no process id in its first line"),
    "zero": (lambda path: path.write_text("0\n"), "has a number in its first line that no process can have"),
    "too large": (lambda path: path.write_text("4194305\n"), "has a number in its first line that no process can have"),
    "empty": (lambda path: path.write_text(""), "is empty"),
    "long line": (lambda path: path.write_text("1" * 65), "has a first line of more than 64 bytes"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "FIFO": (os.mkfifo, "is a FIFO"),
    "socket": (_socket, "is a socket"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "kernel's log": (lambda path: path.symlink_to("/proc/kmsg"), KERNELS),
    "number of the kernel's": (lambda path: path.symlink_to("/sys/class/net/lo/ifindex"), KERNELS),
    "loop": (_loop, "cannot be opened: Too many levels of symbolic links"),
}


@pytest.mark.one_source
@pytest.mark.parametrize(("make", "why"), BAD.values(), ids=BAD)
async def test_files_that_name_no_process(service: tuple[str, str], tmp_path: Path, make: Callable[[Path], object], why: str) -> None:
    """One line that says it; nothing stays registered; and the node lives on."""
    address, node = service
    file = tmp_path / "bad.pid"
    make(file)
    async with connect(address) as monitor:
        for where in ({"node": node}, {"nodes": ["*"]}):
            with pytest.raises(RegistrationError) as caught:
                await monitor.register(pidfile=str(file), events="exit", **where)
            assert (str(caught.value), caught.value.code) == (f"node {node}: pidfile '{file}' {why}", 9)
            with pytest.raises(RegistrationError, match="nothing is registered"):
                await monitor.deregister(pidfile=str(file), **where)
        assert (await monitor.list_nodes(node))[0].watched_processes == 0


@pytest.mark.one_source
def test_commands(lab: Lab, service: tuple[str, str], tmp_path: Path) -> None:
    address, node = service
    process, other, file = idler(lab), idler(lab), tmp_path / "daemon.pid"
    file.write_text(f"{process.pid}\n")
    where = ["--node", node, "--broker", address]
    watch = lab.watch(address, "--pidfile", str(file), "--pid", str(other.pid), "--events", "exit")
    answers = {answer["target"]: answer for answer in watch.wait_registered(2, "RUNNING")}
    assert answers[f"pidfile {file}"]["process"]["pid"] == process.pid
    end(other, 0)
    watch.wait_end_of(other.pid)
    end(process, 9)
    watch.wait_end_of(process.pid)
    assert watch.wait() == 0
    waited = idler(lab)
    file.write_text(f"{waited.pid}\n")
    waiting = lab.command("kmon", "wait", *where, "--pidfile", str(file))
    with sync.connect(address) as monitor:
        until = time.monotonic() + LIMIT
        while monitor.list_nodes(node)[0].watched_processes == 0 and time.monotonic() < until:
            time.sleep(0.01)  # `kmon wait` does not say when it has asked
        # The agent takes one after the other: when this is armed, that is.
        assert monitor.register(node=node, pid=waited.pid, events="exit").states == {node: RUNNING}
        end(waited, 9)
    assert waiting.wait() == 9
    assert waiting.lines == [f"{node}: sh ({waited.pid}) ended: code 9".encode()]
    file.write_text(f"{NO_PID}\n")
    for command in ("watch", "wait"):
        done = lab.run("kmon", command, *where, "--pidfile", str(tmp_path / "none.pid"))
        refused(done, 2, "nothing to watch" if command == "watch" else f"there is no pidfile '{tmp_path}/none.pid' on {node}")
        done = lab.run("kmon", command, *where, "--pidfile", str(file))
        if command == "watch":
            refused(done, 0, "has ended")
            assert f"{node}: the process of pidfile {file} has already ended" in done.stdout
        else:
            refused(done, 2, f"the process of '{file}' on {node} has already ended")
        refused(lab.run("kmon", command, *where, "--pidfile", str(tmp_path)), 2, f"node {node}: pidfile '{tmp_path}' is a folder")
