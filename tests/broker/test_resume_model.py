# SPDX-License-Identifier: Apache-2.0
"""Log, router and resume together, without a transport, against a model that knows all that the nodes did.

Monitors leave without a word and come back, nodes lose their ring or their agent, brokers are started again, logs forget: what a
monitor has a right to is delivered once and in order, or lies in a gap that it was told of.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from kmonitor.broker import broker as broker_module
from kmonitor.broker import outbox, reconcile, router
from kmonitor.broker.broker import Broker
from kmonitor.broker.errors import RefusedError
from kmonitor.broker.log import EventLog, Page
from kmonitor.broker.log import sqlite as sqlite_module
from kmonitor.broker.log.memory import MemoryLog
from kmonitor.broker.log.sqlite import SqliteLog
from kmonitor.broker.sessions import Session
from kmonitor.v1 import monitor_pb2
from tests.broker.kernels import GROUPS, LATE, Kernel
from tests.broker.naive_monitor import Monitor, Wish, wish
from tests.broker.records import ABORT, EXEC

T = TypeVar("T")
NEVER = 1e6
"""Seconds. What is to happen after a time the machine does itself, at any time."""
MEMORY = "/dev/shm"
NAMES = ("a", "b")
WISHES = st.builds(
    wish,
    st.sampled_from([0x7F, 0x40, 0x68, 0x20, 0x48]),
    pid=st.sampled_from([0, 0, 1, 2, 3]),
    follow=st.booleans(),
    node=st.sampled_from(["", "", "a"]),
) | st.builds(wish, st.sampled_from([0x7F, 0x60]), group=st.sampled_from(sorted(GROUPS)))
NODE = st.integers(0, len(NAMES) - 1)
WHO = st.integers(0, 7)


class HeldLog(SqliteLog):
    """Writes, and answers, when it is told to: what a crash finds in the file, and what happens while it is read, is not left to chance."""

    held = True

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        super().__init__(path, max_bytes=max_bytes)
        self.asked: list[tuple[asyncio.Future[Page], asyncio.Future[Page]]] = []
        """What the disk was asked, and what waits for that."""

    def fetch(self, offset: int, max_bytes: int) -> Page | asyncio.Future[Page]:
        found = super().fetch(offset, max_bytes)
        if isinstance(found, Page):
            return found
        waits: asyncio.Future[Page] = asyncio.get_running_loop().create_future()
        self.asked.append((found, waits))
        return waits

    async def answer(self) -> None:
        """All that was asked so far."""
        while self.asked:
            found, waits = self.asked.pop(0)
            waits.set_result(await found)
        await asyncio.sleep(0)

    def locate(self, places: Iterable[tuple[str, int, int]]) -> None:
        """By those who ask, when they do."""

    def _hand_over(self) -> None:
        if self.held and not self._closing:
            self._busy = False
        else:
            super()._hand_over()

    async def commit(self) -> None:
        """All so far."""
        self.held = False
        await self.answer()
        await self.flush()
        await self.answer()
        self.held = True


@dataclass(eq=False)
class Stream:
    """One of a monitor's."""

    session: Session
    requests: list[monitor_pb2.WatchRequest]
    """To be sent."""


class ResumeMachine(RuleBasedStateMachine):
    """`file` and `log_bytes` are the subclass's."""

    file = False
    log_bytes = 64 << 20

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clock = itertools.count(1)
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY if Path(MEMORY).is_dir() else None))
        self.path = self.folder / "log-0"
        self.files = itertools.count(1)
        self.kernels = [Kernel(name, self.clock) for name in NAMES]
        self.monitors: dict[Monitor, Stream | None] = {}
        self.numbers = itertools.count()
        self.groups_safe: dict[str, set[int]] = {kernel.name: set() for kernel in self.kernels}
        self.start()

    # -- the broker

    def start(self) -> None:
        async def inside() -> None:
            self.log: EventLog = HeldLog(self.path, max_bytes=self.log_bytes) if self.file else MemoryLog(self.log_bytes)
            self.broker = Broker(self.log, lease=NEVER, progress_interval=NEVER, linger=NEVER)

        self.loop.run_until_complete(inside())

    def call(self, what: Callable[..., T], *given: Any, **named: Any) -> T:
        """On the event loop."""

        async def inside() -> T:
            return what(*given, **named)

        return self.loop.run_until_complete(inside())

    def turn(self) -> None:
        """Until the event loop has nothing more to do."""

        async def idle() -> None:
            for _ in range(4):
                await asyncio.sleep(0)

        self.loop.run_until_complete(idle())
        if not self.file:
            self.note_safe()

    def note_safe(self) -> None:
        for kernel in self.kernels:
            for deed in kernel.deeds:
                deed.safe = deed.known

    @rule()
    def commit(self) -> None:
        self.turn()
        self.groups_safe = {kernel.name: set(kernel.groups) for kernel in self.kernels}
        if isinstance(self.log, HeldLog):
            self.loop.run_until_complete(self.log.commit())
            self.note_safe()
        self.turn()

    @rule()
    def tick(self) -> None:
        self.call(self.broker._tick)
        self.turn()

    @rule()
    def look_again(self) -> None:
        for kernel in self.kernels:
            if kernel.name in self.broker.reconcile._looking:
                node = self.broker.nodes.get(kernel.name)
                assert node is not None
                self.call(self.broker.reconcile._look_again, node)
        self.turn()

    @precondition(lambda self: any(self.monitors))
    @rule(crashes=st.booleans(), before=st.integers(0, 3))
    def restart(self, crashes: bool, before: int) -> None:
        """`before`: how much monitors take that was sent."""
        path = self.path
        if any(kernel.groups.keys() - self.groups_safe[kernel.name] for kernel in self.kernels):
            self.commit()  # records name groups that a broker which crashes before does not know: see docs/guarantees.md
        if self.file and crashes:
            path = self.folder / f"log-{next(self.files)}"
            for suffix in ("", "-wal"):
                if Path(f"{self.path}{suffix}").exists():
                    shutil.copy(f"{self.path}{suffix}", f"{path}{suffix}")
        elif isinstance(self.log, HeldLog):
            self.commit()
        for kernel in self.kernels:
            self.call(kernel.disconnect)
        for monitor in self.monitors:
            self.leave(monitor, before)

        async def inside() -> None:
            self.broker.stop()
            await self.log.close()

        self.loop.run_until_complete(inside())
        self.path = path
        for kernel in self.kernels:
            for deed in kernel.deeds:
                deed.known = deed.known and deed.safe
                deed.forgotten = not self.file
        self.start()

    @precondition(lambda self: any(self.monitors))
    @rule(found=st.booleans())
    def restart_under_load(self, found: bool) -> None:
        """Monitors are back before agents are, whose rings hold what happened meanwhile."""
        self.commit()
        self.restart(crashes=False, before=1000)
        for kernel in self.kernels:
            for process in list(kernel.processes.values()):
                kernel.act(process, EXEC)
        for monitor in self.monitors:
            monitor.wire.clear()
            self.come(monitor, found=found)
            self.ask(monitor)
        for which in range(len(self.kernels)):
            self.flow(which)

    # -- nodes

    @initialize()
    def begin(self) -> None:
        for kernel in self.kernels:
            for pid, group in enumerate(GROUPS, 1):
                kernel.spawn(pid, group)
            self.call(kernel.connect, self.broker.agents)
        self.turn()

    @rule(
        which=NODE,
        who=WHO,
        what=st.sampled_from(["exec", "exec", "fork", "fork", "exit", "exit with a thread", "abort"]),
        lost=st.sampled_from([False] * 4 + [True]),
    )
    def do(self, which: int, who: int, what: str, lost: bool) -> None:
        kernel = self.kernels[which]
        processes = sorted(kernel.processes.values(), key=lambda each: each.pid)
        if not processes:
            return
        process = processes[who % len(processes)]
        if what == "fork":
            kernel.fork(process, lost=lost)
        elif what in {"exit", "exit with a thread"}:
            kernel.exit(process, lost=lost, late=what != "exit")
        elif what == "abort":
            kernel.act(process, ABORT)
            kernel.exit(process, lost=lost)
        else:
            kernel.act(process, EXEC, lost=lost)

    @rule(which=NODE, group=st.sampled_from(sorted(GROUPS)))
    def spawn(self, which: int, group: str) -> None:
        kernel = self.kernels[which]
        pid = next((pid for pid in range(1, 9) if pid not in kernel.processes), None)
        if pid is not None:
            kernel.spawn(pid, group)

    @rule(which=NODE, who=WHO, ticks=st.integers(0, 2))
    def end_slowly(self, which: int, who: int, ticks: int) -> None:
        """A process ends, its agent is cut off for a while, and only then a thread's end comes that the kernel has recorded right after."""
        self.do(which, who, "exit with a thread", lost=False)
        self.send(which, 1000, beats=True)
        for _ in range(ticks):
            self.tick()
        self.kernels[which].end_threads()
        self.send(which, 1000, beats=True)

    @precondition(lambda self: any(kernel.late for kernel in self.kernels))
    @rule(which=NODE)
    def end_threads(self, which: int) -> None:
        self.kernels[which].end_threads()

    @rule(which=NODE, blocks=st.integers(1, 8), each=st.integers(1, 6))
    def burst(self, which: int, blocks: int, each: int) -> None:
        for _ in range(blocks):
            for _, process in zip(range(each), itertools.cycle(list(self.kernels[which].processes.values())), strict=False):
                self.kernels[which].act(process, EXEC)
            self.call(self.kernels[which].send, 100)

    @rule(which=NODE)
    def read(self, which: int) -> None:
        self.call(self.kernels[which].read)
        self.turn()

    @rule(which=NODE, count=st.sampled_from([1, 2, 5, 1000]), beats=st.booleans())
    def send(self, which: int, count: int, beats: bool) -> None:
        self.call(self.kernels[which].send, count)
        if beats:
            self.call(self.kernels[which].beat)
        self.turn()

    @rule(which=NODE)
    def flow(self, which: int) -> None:
        """All that can go both ways does."""
        kernel = self.kernels[which]
        if kernel.link is None:
            self.call(kernel.connect, self.broker.agents)
            self.turn()
        # As an agent does: what is in the ring goes out before anything that comes from the broker is answered.
        while self.call(kernel.send, 1000) | self.call(kernel.read):
            self.turn()
        self.call(kernel.beat)
        self.turn()

    @precondition(lambda self: any(kernel.link is None for kernel in self.kernels))
    @rule(which=NODE)
    def connect(self, which: int) -> None:
        if self.kernels[which].link is None:
            self.call(self.kernels[which].connect, self.broker.agents)
            self.turn()

    @rule(which=NODE)
    def disconnect(self, which: int) -> None:
        self.call(self.kernels[which].disconnect)
        self.turn()

    @precondition(lambda self: any(self.monitors))
    @rule(which=NODE, reboot=st.booleans())
    def start_anew(self, which: int, reboot: bool) -> None:
        kernel = self.kernels[which]
        self.call(kernel.start_anew, reboot=reboot)
        if reboot:
            kernel.spawn(1, "/a")
        self.turn()

    # -- monitors

    @precondition(lambda self: len(self.monitors) < 3)
    @rule(
        wanted=st.lists(WISHES, min_size=1, max_size=3, unique_by=lambda each: each.SerializeToString()),
        names_stream=st.booleans(),
        flows=st.sampled_from([True, True, False]),
    )
    def open(self, wanted: list[monitor_pb2.Registration], names_stream: bool, flows: bool) -> None:
        # Only of a process it makes a difference whether it is followed.
        distinct = {
            (each.target.SerializeToString(), each.follow and each.target.HasField("process"), tuple(each.nodes.names)): each
            for each in wanted
        }
        deeds = {(kernel.name, deed.epoch, deed.position): deed for kernel in self.kernels for deed in kernel.deeds if deed.data}
        monitor = Monitor(next(self.numbers), [Wish(each) for each in distinct.values()], names_stream, deeds)
        for each in monitor.wishes:
            each.asked_at = next(self.clock)
        self.come(monitor, found=False)
        self.ask(monitor)
        if flows:
            for which in range(len(self.kernels)):
                self.flow(which)
            self.commit()
            self.let_take(monitor, 1000)

    def come(self, monitor: Monitor, *, found: bool) -> None:
        """Open a stream; the requests are to be sent."""
        requests = []
        for number, each in enumerate(monitor.wishes):
            if each.ended_at is None:
                register = monitor_pb2.RegisterRequest(registration=each.message)
                for node, told in each.told.items() if found else ():
                    if told[-1].key is not None:
                        register.found.add(node=node, pid=told[-1].key[0], start_time=told[-1].key[1], boot_id=told[-1].boot_id)
                requests.append(monitor_pb2.WatchRequest(request_id=number, register=register))
        cursor = monitor.cursor()
        if requests and (cursor.positions or cursor.stream_id):
            requests[0].cursor.CopyFrom(cursor)
            requests[0].resuming = len(requests)
        monitor.forget_unplaced()
        try:
            session = self.call(self.broker.open_session)
        except RefusedError:
            return
        self.monitors[monitor] = Stream(session, requests)

    def ask(self, monitor: Monitor, count: int = 1000) -> None:
        """Send requests."""
        stream = self.monitors[monitor]
        if stream is not None and stream.session.failure is None:
            for request in stream.requests[:count]:
                self.call(self.broker.watch, stream.session, request)
            del stream.requests[:count]
        self.turn()

    def pick(self, number: int) -> Monitor | None:
        return list(self.monitors)[number % len(self.monitors)] if self.monitors else None

    @precondition(lambda self: any(stream and stream.requests for stream in self.monitors.values()))
    @rule(number=WHO, count=st.integers(1, 2))
    def request(self, number: int, count: int) -> None:
        monitor = self.pick(number)
        if monitor is not None:
            self.ask(monitor, count)

    @precondition(lambda self: any(self.monitors.values()))
    @rule(number=WHO, count=st.sampled_from([1, 2, 3, 10, 1000, 1000, 1000]))
    def take(self, number: int, count: int) -> None:
        monitor = self.pick(number)
        if monitor is not None:
            self.let_take(monitor, count)

    def let_take(self, monitor: Monitor, count: int) -> bool:
        stream = self.monitors[monitor]
        took = False
        self.index(monitor)
        for _ in range(count):
            while not monitor.wire and stream is not None and stream.session.failure is None and stream.session.outbox.filled.is_set():
                self.read_stream(monitor, stream)
            if not monitor.wire:
                break
            monitor.take()
            took = True
        self.turn()
        return took

    def read_stream(self, monitor: Monitor, stream: Stream, *, answers: bool = True) -> int:
        """What is to be sent next goes out. `answers`: the log's disk does."""
        if answers and isinstance(self.log, HeldLog):
            self.loop.run_until_complete(self.log.answer())
        found = self.call(stream.session.outbox.take)
        if not found and answers and isinstance(self.log, HeldLog) and self.log.asked:
            self.loop.run_until_complete(self.log.answer())
            found = self.call(stream.session.outbox.take)
        for raw in found:
            monitor.sent(raw)
        return len(found)

    @precondition(lambda self: self.file and any(self.monitors.values()))
    @rule(number=WHO)
    def begin_to_read(self, number: int) -> None:
        """The log's disk takes its time."""
        monitor = self.pick(number)
        stream = self.monitors[monitor] if monitor is not None else None
        if monitor is None or stream is None or monitor.wire or stream.session.failure is not None:
            return
        if stream.session.outbox.filled.is_set():
            self.index(monitor)
            self.read_stream(monitor, stream, answers=False)

    def index(self, monitor: Monitor) -> None:
        monitor.deeds = {(kernel.name, deed.epoch, deed.position): deed for kernel in self.kernels for deed in kernel.deeds if deed.data}

    def leave(self, monitor: Monitor, before: int) -> None:
        """Without a word, and with something sent that is not taken."""
        stream = self.monitors[monitor]
        if stream is None:
            return
        self.let_take(monitor, before)
        while stream.session.failure is None and stream.session.outbox.filled.is_set():
            if not self.read_stream(monitor, stream):
                break
        monitor.wire.clear()
        self.call(self.broker.close_session, stream.session)
        self.monitors[monitor] = None
        self.turn()

    @precondition(lambda self: any(self.monitors.values()))
    @rule(number=WHO, before=st.sampled_from([0, 1, 2, 1000]), stays=st.sampled_from([True, True, True, False]))
    def go(self, number: int, before: int, stays: bool) -> None:
        """`stays`: its place is kept."""
        monitor = self.pick(number)
        stream = self.monitors[monitor] if monitor is not None else None
        if monitor is not None and stream is not None:
            self.leave(monitor, before)
            if not stays:
                self.call(self.broker.lingering.drop, stream.session)
                self.commit()  # a broker that crashes before takes it for kept: see docs/guarantees.md

    @precondition(lambda self: self.monitors)
    @rule(number=WHO, found=st.booleans(), at_once=st.booleans(), before=st.integers(0, 2))
    def come_back(self, number: int, found: bool, at_once: bool, before: int) -> None:
        """Also while the broker has not noticed that the stream before has ended."""
        monitor = self.pick(number)
        if monitor is None:
            return
        old = self.monitors[monitor]
        self.let_take(monitor, before)
        monitor.wire.clear()
        if old is not None and not (monitor.names_stream and monitor.stream_id):
            self.leave(monitor, 0)
            old = None
        self.come(monitor, found=found)
        self.ask(monitor, 1000 if at_once else 1)
        if old is not None:
            self.call(self.broker.close_session, old.session)
            self.turn()

    @precondition(lambda self: any(self.monitors.values()))
    @rule(number=WHO)
    def close(self, number: int) -> None:
        monitor = self.pick(number)
        stream = self.monitors[monitor] if monitor is not None else None
        if monitor is not None and stream is not None:
            self.call(self.broker.close_session, stream.session, for_good=True)
            del self.monitors[monitor]
            self.commit()

    @precondition(lambda self: any(self.monitors.values()))
    @rule(number=WHO, which=WHO)
    def deregister(self, number: int, which: int) -> None:
        monitor = self.pick(number)
        stream = self.monitors[monitor] if monitor is not None else None
        if monitor is None or stream is None or stream.requests or stream.session.failure is not None:
            return
        standing = [each for each in monitor.wishes if each.ended_at is None]
        if len(standing) > 1:
            ending = standing[which % len(standing)]
            request = monitor_pb2.WatchRequest(request_id=1000, deregister=monitor_pb2.DeregisterRequest(registration=ending.message))
            self.call(self.broker.watch, stream.session, request)
            ending.ended_at = next(self.clock)
            self.commit()

    # -- in the end

    def settle(self) -> None:
        """All that is to be told is told."""
        for _ in range(50):
            news = False
            for which, kernel in enumerate(self.kernels):
                news |= kernel.link is None
                self.flow(which)
            self.commit()
            self.look_again()
            self.tick()
            for monitor, stream in list(self.monitors.items()):
                if stream is None or stream.session.failure is not None:
                    self.leave(monitor, 1000)
                    self.come(monitor, found=False)
                    news = True
                self.ask(monitor)
                while self.let_take(monitor, 1):
                    item = monitor.notes[-1]
                    news |= not item.startswith("progress")
            if not news:
                return
        raise AssertionError("it does not come to rest")

    def teardown(self) -> None:
        try:
            self.settle()
            for kernel in self.kernels:
                kernel.end_threads()
                for process in list(kernel.processes.values()):
                    kernel.act(process, EXEC)
                    kernel.exit(process)
            self.settle()
            for monitor in self.monitors:
                for kernel in self.kernels:
                    monitor.judge(kernel)
        finally:

            async def inside() -> None:
                self.broker.stop()
                await self.log.close()

            self.loop.run_until_complete(inside())
            self.loop.close()
            shutil.rmtree(self.folder, ignore_errors=True)


class MemoryMachine(ResumeMachine):
    """The log in memory."""


class SmallMachine(ResumeMachine):
    """... that soon forgets."""

    log_bytes = 12_000


class SqliteMachine(ResumeMachine):
    """The log in a file."""

    file = True
    log_bytes = 200_000


MORE = int(os.environ.get("KMONITOR_TEST_MORE", "1"))
"""So many times as many examples: to look for what is rare."""


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "_LOOK_AGAIN_SECONDS", NEVER)
    monkeypatch.setattr(outbox, "MARK_WAIT", NEVER)
    monkeypatch.setattr(router, "LATE_NS", LATE)
    # Small, so that streams fall behind, and forget, after little.
    monkeypatch.setattr(outbox, "ROWS_LIMIT", 4_000)
    monkeypatch.setattr(outbox, "READ_SIZE", 3_000)
    monkeypatch.setattr(sqlite_module, "TAIL_BYTES", 6_000)
    for module in (outbox, broker_module):
        monkeypatch.setattr(module, "PAST", 6)


@pytest.mark.parametrize("machine", [MemoryMachine, SmallMachine, SqliteMachine])
@pytest.mark.usefixtures("_small")
def test_same_as_the_model(machine: type[ResumeMachine]) -> None:
    chosen = settings(
        max_examples=25 * MORE,
        stateful_step_count=40,
        deadline=None,
        database=None,
        derandomize=MORE == 1,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=chosen)


@pytest.mark.parametrize("machine", [MemoryMachine, SqliteMachine])
@pytest.mark.usefixtures("_small")
def test_a_thread_that_ends_late(machine: type[ResumeMachine]) -> None:
    """The machine plays what it hardly ever draws: the broker's clock goes on, and the node's does not."""
    state = machine()
    state.begin()
    state.open(wanted=[wish(0x7F, pid=3, node="a")], names_stream=True, flows=True)
    state.end_slowly(which=0, who=2, ticks=2)
    state.teardown()


@pytest.mark.usefixtures("_small")
def test_groups_within_one_another_and_a_broker_that_is_started_again() -> None:
    """... and that agents send their rings first."""
    state = SqliteMachine()
    state.begin()
    state.open(wanted=[wish(0x60, group="/a")], names_stream=True, flows=True)
    state.open(wanted=[wish(0x60, group="/a/b")], names_stream=True, flows=True)
    state.restart_under_load(found=False)
    state.teardown()
