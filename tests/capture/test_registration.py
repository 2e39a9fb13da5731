# SPDX-License-Identifier: Apache-2.0
"""Registering while processes die, and hearing of what was registered for and of nothing else."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from kmonitor.clients import Event, Monitor, RegistrationState, connect
from tests.lab import knowledge
from tests.lab.services import Lab
from tests.lab.workload import Programs, Stage

RUNNING = RegistrationState.RUNNING
EXITED = RegistrationState.EXITED
NOT_FOUND = RegistrationState.NOT_FOUND

ROUNDS = 2_000
FORKERS = 4
LONGEST_US = 4_000
LIMIT = 10.0


class Ends:
    """Takes a monitor's events, and gives out the end of each process to whoever waits for it."""

    def __init__(self, monitor: Monitor) -> None:
        self.seen: dict[int, list[Event]] = defaultdict(list)
        self._waited: dict[int, asyncio.Future[Event]] = {}
        self._task = asyncio.create_task(self._take(monitor))

    async def _take(self, monitor: Monitor) -> None:
        async for item in monitor:
            if isinstance(item, Event):
                self.seen[item.pid].append(item)
                if item.pid in self._waited:
                    self._waited.pop(item.pid).set_result(item)

    async def of(self, pid: int) -> Event:
        """The event of a process, which may have come already."""
        if self.seen[pid]:
            return self.seen[pid][-1]
        future: asyncio.Future[Event]
        future = self._waited[pid] = asyncio.get_running_loop().create_future()
        async with asyncio.timeout(LIMIT):
            return await future

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class Forker:
    """tests/workload/brief.c: a child at a time, that lives so many microseconds."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, program: Path) -> Forker:
        pipe = asyncio.subprocess.PIPE
        return cls(await asyncio.create_subprocess_exec(program, stdin=pipe, stdout=pipe))

    async def fork(self, micros: int, code: int, *, reap: bool) -> int:
        """The child's pid. It is a zombie behind its end unless `reap`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{micros} {code} {int(reap)}\n".encode())
        return int(await self._line())

    async def ended(self, *, reaped: bool) -> None:
        """Until the child has ended; then it is reaped in any case."""
        assert await self._line() == b"ended\n"
        if not reaped:
            assert self._process.stdin is not None
            self._process.stdin.write(b"reap\n")

    async def _line(self) -> bytes:
        assert self._process.stdout is not None
        async with asyncio.timeout(LIMIT):
            return await self._process.stdout.readline()

    async def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert await self._process.wait() == 0


async def one_death(forker: Forker, monitor: Monitor, ends: Ends, node: str, rng: random.Random) -> tuple[RegistrationState, int]:
    """Register for a process that ends at about that time."""
    code, reap = rng.randrange(256), rng.random() < 0.5
    pid = await forker.fork(rng.randrange(LONGEST_US), code, reap=reap)
    async with asyncio.timeout(LIMIT):
        state = (await monitor.register(node=node, pid=pid, events="exit")).states[node]
    if state is RUNNING:
        event = await ends.of(pid)
        assert (event.exit_code, event.inferred, event.node) == (code, False, node)
    else:
        # The pid of a zombie is in use: that it ended is known. One that was reaped may never have been.
        assert state is EXITED or (state is NOT_FOUND and reap), state
    await forker.ended(reaped=reap)
    return state, pid


@pytest.mark.timeout(150)
async def test_registering_while_the_process_dies(service: tuple[str, str], programs: Programs) -> None:
    address, node = service
    seed = random.randrange(1 << 32)
    print(f"\nseed {seed}")

    async def several(number: int, monitor: Monitor, ends: Ends) -> list[tuple[RegistrationState, int]]:
        rng = random.Random(seed + number)
        forker = await Forker.start(programs.brief)
        told = [await one_death(forker, monitor, ends, node, rng) for _ in range(ROUNDS // FORKERS)]
        await forker.stop()
        return told

    async with connect(address) as monitor:
        ends = Ends(monitor)
        told = [one for part in await asyncio.gather(*(several(number, monitor, ends) for number in range(FORKERS))) for one in part]
        # One more, seen to its end: what was to come before has come.
        forker = await Forker.start(programs.brief)
        pid = await forker.fork(100_000, 1, reap=True)
        assert (await monitor.register(node=node, pid=pid, events="exit")).states == {node: RUNNING}
        await ends.of(pid)
        await forker.ended(reaped=True)
        await forker.stop()
        await ends.stop()
    states = Counter(state for state, _ in told)
    print(dict(states))
    # Both sides of the race were tried, or the test has shown nothing.
    assert states[RUNNING] > ROUNDS / 20
    assert states[EXITED] + states[NOT_FOUND] > ROUNDS / 20
    for state, number in told:
        assert len(ends.seen[number]) == (1 if state is RUNNING else 0), (state, number, ends.seen[number])


async def test_a_process_of_the_past_has_exited(service: tuple[str, str], programs: Programs) -> None:
    """A pid with another start time is another process: never the one that has the pid now."""
    address, node = service
    forker = await Forker.start(programs.brief)
    pid = await forker.fork(200_000, 3, reap=True)
    async with connect(address) as monitor:
        other = await monitor.register(node=node, pid=pid, start_time=1, events="exit")
        assert other.states[node] in (EXITED, NOT_FOUND)
        right = await monitor.register(node=node, pid=pid, events="exit")
        found = right.process(node)
        assert found is not None
        again = await monitor.register(node=node, pid=pid, start_time=found.start_time, events="abort")
        assert again.states == {node: RUNNING}
        ends = Ends(monitor)
        event = await ends.of(pid)
        assert (event.start_time, event.exit_code) == (found.start_time, 3)
        await ends.stop()
        assert len(ends.seen[pid]) == 1
    await forker.ended(reaped=True)
    await forker.stop()


def test_one_pid_on_one_of_several_nodes(lab: Lab, source: str, programs: Programs, tmp_path: Path) -> None:
    """Three agents see the same processes. One is asked for one: the others' kernels send nothing."""
    broker = lab.broker()
    for node in ("alpha", "beta", "gamma"):
        lab.agent(node, broker.address, source=source)
    stage = Stage(lab, broker.address, "beta", programs, tmp_path, knowledge.of(source))
    watched, other = stage.start("codes", "1", "2"), stage.start("mixed")
    watch = stage.watch(watched.root_pid, options=["--events", "exit"])
    other.say("go")
    other.truth()
    watched.say("go")
    watched.truth()
    watch.wait_end_of(watched.root_pid)
    nodes = {line["name"]: line for line in lab.json_lines("nodes", "--json", "--broker", broker.address)}
    lab.stop(watch)
    assert [(line["node"], line["pid"], line["exit_code"]) for line in watch.events()] == [("beta", watched.root_pid, 0)]
    assert watch.of_kind("gap") == []
    assert nodes["alpha"]["received_bytes"] == nodes["gamma"]["received_bytes"] == 0
    # One record, of one slot: nor did beta's kernel let through what nobody had asked for.
    assert nodes["beta"]["received_bytes"] == 128


async def test_the_end_of_the_stream_removes_what_it_registered(service: tuple[str, str], programs: Programs) -> None:
    address, node = service
    forker = await Forker.start(programs.brief)
    pid = await forker.fork(2_000_000, 0, reap=True)
    async with connect(address) as observer:
        async with connect(address) as monitor:
            await monitor.register(node=node, pid=pid, events="exit")
            (before,) = await observer.list_nodes(node)
            assert before.watched_processes == 1
        async with asyncio.timeout(LIMIT):
            while (await observer.list_nodes(node))[0].watched_processes:  # noqa: ASYNC110 -- nothing tells when the broker noticed
                await asyncio.sleep(0.01)
    await forker.ended(reaped=True)
    await forker.stop()


async def test_masks_are_added_and_cleared(service: tuple[str, str], stage: Stage) -> None:
    address, node = service
    root = stage.start("mixed")
    pid = root.root_pid
    async with connect(address) as monitor:
        await monitor.register(node=node, pid=pid, events="exit")
        both = await monitor.register(node=node, pid=pid, events="fork,thread-create")
        assert int(both.event_mask) == 0x49
        left = await monitor.deregister(node=node, pid=pid, events="thread-create")
        assert int(left.event_mask) == 0x48
        root.say("go")
        await asyncio.to_thread(root.truth)
        types: list[int] = []
        async with asyncio.timeout(LIMIT):
            async for item in monitor:
                if isinstance(item, Event):
                    types.append(int(item.type))
                    if item.pid == pid and item.type == 0x40:
                        break
        assert types == [0x08, 0x08, 0x40]
