# SPDX-License-Identifier: Apache-2.0
"""Ends that are told because a process was found gone: the record that each source makes, and the agent that asks for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass

import pytest

from kmonitor.agent import maps
from kmonitor.agent.inference import Inference
from kmonitor.agent.interest import InterestTable
from kmonitor.agent.probe import ProbeOptions
from kmonitor.agent.processes import Found
from kmonitor.agent.source import Source
from kmonitor.agent.sources import SOURCES, open_source
from kmonitor.v1 import agent_pb2
from kmonitor.wire.masks import EventType
from kmonitor.wire.record import F_INFERRED, F_MATCH_PROCESS, SLOT_SIZE, Slots, check_records, slots_of
from tests.agent.fake_broker import FakeBroker
from tests.agent.interest import apply
from tests.lab.connector import connector_lack
from tests.lab.privileges import as_nobody, need_another_user
from tests.lab.requires import capture_lack, need
from tests.lab.services import Lab

pytestmark = pytest.mark.capture

EXIT = int(EventType.PROCESS_EXIT)
RING = 64 << 10
Want = agent_pb2.Interest.ProcessInterest
Gone = agent_pb2.InferExits.Process


@dataclass
class Child:
    """A process that lives until it is told to end."""

    process: subprocess.Popen[bytes]
    start: int = 0

    @property
    def pid(self) -> int:
        return self.process.pid

    def let_go(self) -> None:
        """It ends, and is a zombie."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def end(self) -> None:
        self.let_go()
        self.process.wait()


class Bench:
    """A source, what was read from it, and processes to end."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.table = InterestTable(source)
        self.children: list[Child] = []

    def child(self, *, watched: bool = True) -> Child:
        """One that runs."""
        made = Child(subprocess.Popen(["/bin/sh", "-c", "read line"], stdin=subprocess.PIPE))
        self.children.append(made)
        made.start = self.source.processes.look_up([made.pid])[made.pid].start_boottime_ns
        if watched:
            apply(self.table, agent_pb2.Interest(version=1, processes=[Want(pid=made.pid, event_mask=EXIT, look_up=True)]))
        return made

    def missed(self, root: maps.Root = maps.NO_ROOT) -> Child:
        """One that is gone, and watched, and whose end was not told: as if it had ended while nobody captured."""
        made = self.child(watched=False)
        made.end()
        entry = maps.Watched(made.start, EXIT, maps.WATCHED_FOLLOW, root)
        self.source.watched.update(maps.pid_key(made.pid), entry.pack())
        return made

    def is_watched(self, child: Child) -> bool:
        return self.source.watched.lookup(maps.pid_key(child.pid), maps.WATCHED_SIZE) is not None

    def rows(self) -> Slots:
        """All that was not read yet."""
        self.source.catch_up()
        slots = slots_of(self.source.ring.read(1 << 20) or b"")
        found: Slots = slots[check_records(slots)]
        return found

    def told(self) -> list[tuple[int, bool]]:
        """Pid and whether it is inferred, of all exits."""
        return [(int(row["tgid"]), bool(row["flags"] & F_INFERRED)) for row in self.rows() if row["type"] == EXIT]

    def fill(self) -> int:
        """Until nothing gets in any more; how many got in."""
        made = 0
        while self.source.infer_exit(4_000_000 + made, 1):
            made += 1
        return made


@pytest.fixture(params=SOURCES)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    need(connector_lack if request.param == "netlink" else capture_lack)
    source = open_source(request.param, ProbeOptions(ring_bytes=RING), None)
    made = Bench(source)
    yield made
    for child in made.children:
        child.process.kill()
        child.process.communicate()
    source.close()


def test_one_record_and_no_entry(bench: Bench) -> None:
    root = maps.Root(5, 6, 7)
    child = bench.missed(root)
    lost = bench.source.control.lost()
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    assert bench.source.infer_exit(child.pid, child.start)
    assert not bench.is_watched(child)
    [row] = bench.rows()
    assert (row["type"], row["flags"], row["status"]) == (EXIT, F_INFERRED | F_MATCH_PROCESS, 0)
    assert (row["tgid"], row["tid"], row["start_boottime_ns"]) == (child.pid, child.pid, child.start)
    assert before <= row["boottime_ns"] <= time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    unknown = ["ppid", "uid", "gid", "cgroup_id", "match_cgroup_id", "killer_tgid", "killer_uid", "filename_len", "args_len"]
    assert {name: int(row[name]) for name in unknown} == dict.fromkeys(unknown, 0)
    assert (bytes(row["comm"]), bytes(row["killer_comm"])) == (b"", b"")
    found = maps.Root(*(int(row[f"root_{name}"]) for name in ("start_boottime_ns", "tgid", "armed")))
    assert found == (maps.NO_ROOT if bench.source.name == "netlink" else root)
    assert bench.source.control.lost() == lost


def test_what_is_known_of_it(bench: Bench) -> None:
    known = Found(4_000_000, 2, 3, 4, "exactly15bytes_", 5, 6, 0)
    assert bench.source.infer_exit(known.pid, known.start_boottime_ns, known)
    [row] = bench.rows()
    assert (row["ppid"], row["uid"], row["gid"], row["comm"]) == (2, 3, 4, b"exactly15bytes_")
    assert row["cgroup_id"] == (0 if bench.source.name == "netlink" else 6)


def test_in_order_with_what_was_seen(bench: Bench) -> None:
    first, gone, last = bench.child(), bench.missed(), bench.child()
    first.end()
    bench.source.catch_up()
    assert bench.source.infer_exit(gone.pid, gone.start)
    last.end()
    assert bench.told() == [(first.pid, False), (gone.pid, True), (last.pid, False)]


def test_the_entry_of_another_with_that_pid_stays(bench: Bench) -> None:
    child = bench.child()
    assert bench.source.infer_exit(child.pid, child.start - 10_000_000)
    assert bench.is_watched(child)
    child.end()
    assert bench.told() == [(child.pid, True), (child.pid, False)]


def test_a_full_ring(bench: Bench) -> None:
    child = bench.missed()
    assert bench.fill() >= RING // SLOT_SIZE - 1, "above the fill mark too"
    lost = bench.source.control.lost()
    for _ in range(3):
        assert not bench.source.infer_exit(child.pid, child.start)
    assert bench.is_watched(child)
    assert bench.source.control.lost() == lost, "nothing was lost by trying"
    bench.rows()
    bench.source.ring.release(SLOT_SIZE)
    assert bench.source.infer_exit(child.pid, child.start)
    assert bench.told() == [(child.pid, True)]


@pytest.mark.parametrize("bench", ["core", "bcc"], indirect=True)  # netlink's ring is this process's own: the agent wakes itself
def test_a_sleeping_reader_is_woken(bench: Bench) -> None:
    assert bench.source.ring.prepare_sleep()
    assert bench.source.infer_exit(4_000_000, 1)
    with select.epoll() as outer:
        outer.register(bench.source.ring.wakeups.fileno(), select.EPOLLIN)
        assert outer.poll(5.0)
    bench.source.ring.awake()


def asked(*processes: tuple[int, int]) -> agent_pb2.InferExits:
    return agent_pb2.InferExits(processes=[Gone(pid=pid, start_time=start) for pid, start in processes])


class Woken:
    """Counts."""

    def __init__(self) -> None:
        self.count = 0
        self.event = asyncio.Event()

    def __call__(self) -> None:
        self.count += 1
        self.event.set()


@contextlib.asynccontextmanager
async def inferring(bench: Bench) -> AsyncIterator[tuple[Callable[[agent_pb2.InferExits], Awaitable[None]], Woken]]:
    """What takes such requests, at work; and what it wakes."""
    woken = Woken()
    inference = Inference(bench.source, bench.table, woken)
    task = asyncio.create_task(inference.run())
    try:
        async with asyncio.timeout(30):
            yield inference.ask, woken
    finally:
        task.cancel()


async def test_only_who_is_gone_and_each_once(bench: Bench) -> None:
    alive, zombie, gone = bench.child(), bench.child(), bench.missed()
    zombie.let_go()
    assert bench.told() == [(zombie.pid, False)]
    # The zombie's own end was told and, say, lost on the way; one that has the pid of the living is another process.
    request = asked(
        (alive.pid, alive.start), (gone.pid, gone.start), (gone.pid, gone.start), (zombie.pid, zombie.start), (alive.pid, 1), (0, 1), (1, 0)
    )
    async with inferring(bench) as (ask, woken):
        await ask(request)
        await woken.event.wait()
        # Looked up after the ones before, and told: nothing is told of those who live.
        woken.event.clear()
        await ask(asked((alive.pid, alive.start), (4_000_000, 1)))
        await woken.event.wait()
        assert woken.count == 2
    expected = {(4_000_000, 1), (gone.pid, gone.start), (zombie.pid, zombie.start), (alive.pid, 1)}
    rows = bench.rows()
    assert sorted((int(row["tgid"]), int(row["start_boottime_ns"])) for row in rows) == sorted(expected)
    assert set(rows["comm"][rows["tgid"] == zombie.pid].tolist()) == {b"sh"}, "a zombie has a name still"
    assert bench.is_watched(alive)


async def test_a_zombie_that_is_about_to_be_told(bench: Bench) -> None:
    """Its entry is there: the probe, or the kernel's message, comes any moment."""
    zombie = bench.child(watched=False)
    zombie.let_go()
    entry = maps.Watched(zombie.start, EXIT, 0)
    bench.source.watched.update(maps.pid_key(zombie.pid), entry.pack())
    async with inferring(bench) as (ask, woken):
        await ask(asked((zombie.pid, zombie.start), (4_000_000, 1)))
        await woken.event.wait()
    assert bench.told() == [(4_000_000, True)]
    assert bench.is_watched(zombie)


async def test_tried_again_while_there_is_no_room(bench: Bench) -> None:
    first, second = bench.missed(), bench.missed()
    bench.fill()
    async with inferring(bench) as (ask, woken):
        await ask(asked((first.pid, first.start), (second.pid, second.start)))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await woken.event.wait()
        bench.rows()
        bench.source.ring.release(bench.source.ring.position)
        await woken.event.wait()
        woken.event.clear()
        await ask(asked((4_000_000, 1)))
        await woken.event.wait()
        assert sorted(bench.told()) == sorted([(first.pid, True), (second.pid, True), (4_000_000, True)]), "not again"


@pytest.mark.parametrize("name", SOURCES)
def test_what_the_broker_asks_for_comes_in_a_block(lab: Lab, name: str) -> None:
    """The whole agent, while nothing else happens: its reader sleeps."""
    need(connector_lack if name == "netlink" else capture_lack)
    broker = FakeBroker()
    broker.interest = agent_pb2.Interest(version=1, reset=True)
    try:
        agent = lab.agent("infers", broker.address, "--ring-size", "64K", source=name)
        stream = broker.stream(0)
        assert (stream.hello.infers_exits, stream.hello.draining, stream.hello.ring_bytes) == (True, False, 64 << 10)
        broker.wait(lambda: len(stream.of("applied")) == 1)
        request = asked(*((4_000_000 + number, 1 + number) for number in range(1200)))
        stream.send(infer_exits=request)
        broker.wait(lambda: stream.end == 1200 * SLOT_SIZE)  # far more than there is room for at once
        stream.send(infer_exits=asked((4_100_000, 7)))
        broker.wait(lambda: stream.end == 1201 * SLOT_SIZE)
        rows = broker.records(broker.epochs[0])
        assert sorted(rows["tgid"].tolist()) == [4_000_000 + number for number in range(1200)] + [4_100_000]
        assert set(rows["flags"].tolist()) == {F_INFERRED | F_MATCH_PROCESS}
        lab.stop(agent)
        assert (broker.wrong, stream.of("lost"), stream.end) == ([], [], 1201 * SLOT_SIZE)
    finally:
        broker.close()


def test_a_message_that_is_on_its_way() -> None:
    """Netlink: /proc shows the end before the message of it comes. It is waited for, and told with its status."""
    need(connector_lack)
    source = open_source("netlink", ProbeOptions(ring_bytes=RING), None)
    bench = Bench(source)
    try:
        child = bench.child()
        kin = source._events.kins[child.pid]  # type: ignore[attr-defined]
        assert kin.live
        assert not source.infer_exit(child.pid, child.start), "waited for at first"
        child.end()
        assert source.infer_exit(child.pid, child.start), "it came"
        assert bench.told() == [(child.pid, False)]
    finally:
        source.close()


SCRIPT = """
import sys
from kmonitor.agent.probe import ProbeOptions
from kmonitor.agent.sources import open_source
source = open_source(sys.argv[1], ProbeOptions(ring_bytes=1 << 16), None)
assert source.infer_exit(4000000, 1)
print(source.ring.producer)
source.close()
"""


@pytest.mark.parametrize("name", ["core", "bcc"])
def test_two_capabilities_are_enough(name: str) -> None:
    need(capture_lack)
    need_another_user()
    done = subprocess.run(
        [*as_nobody("bpf", "perfmon"), sys.executable, "-c", SCRIPT, name], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"{SLOT_SIZE}\n"), done.stderr
