# SPDX-License-Identifier: Apache-2.0
"""Source netlink without a kernel: what it makes of messages, in whatever order and shape, and its ring and tables."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmonitor.agent.errors import BpfError, CaptureError, ConnectorMessageError, MissingCapabilityError
from kmonitor.agent.libbpf import BPF_EXIST, BPF_NOEXIST
from kmonitor.agent.maps import LOST_NODE, LOST_PROCESS, WATCHED_SIZE, Watched, pid_key
from kmonitor.agent.procfs import TICK_NS
from kmonitor.agent.sources import proc_messages as pm
from kmonitor.agent.sources.connector import refusal
from kmonitor.agent.sources.lineage import Kin
from kmonitor.agent.sources.memory_ring import MemoryRing, Pause
from kmonitor.agent.sources.memory_tables import MemoryControl, WatchedTable
from kmonitor.agent.sources.proc_events import ProcEvents
from kmonitor.wire.record import F_MATCH_NODE, F_MATCH_PROCESS, Slots, check_records, slots_of

ALL = 0x7F
CREATE, T_ABORT, T_EXIT, FORK, ABORT, EXEC, EXIT = (1 << bit for bit in range(7))
PID = 1 << 22  # no pid of a process that there is (PID_MAX_LIMIT)

GOLDEN_FORK = bytes.fromhex(
    "4c000000" "0300" "0000" "00000000" "00000000" "01000000" "01000000" "07000000" "00000000" "2800" "0000"
    "01000000" "01000000" "1122334455000000" "0a000000" "0a000000" "0b000000" "0b000000" + "00" * 8
)  # fmt: skip
"""As the kernel sent it (6.18), but for the ids and the time."""


def datagram(what: int, *words: int, cpu: int = 0, number: int = 0, ns: int = 0) -> bytes:
    event = struct.pack("=IIQ6I", what, cpu, ns, *words, *(0,) * (6 - len(words)))
    return struct.pack("=IHHII", 36 + len(event), 3, 0, 0, 0) + struct.pack("=IIIIHH", 1, 1, number, 0, len(event), 0) + event


def parse(*datagrams: bytes) -> pm.Messages:
    lengths = np.array([len(each) for each in datagrams])
    return pm.messages_of(b"".join(each[:128].ljust(128, b"\0") for each in datagrams), lengths)


# -- the messages' form


def test_golden() -> None:
    (message,) = parse(GOLDEN_FORK)
    assert (int(message["what"]), int(message["cpu"]), int(message["sequence"])) == (pm.FORK, 1, 7)
    assert int(message["monotonic_ns"]) == 0x5544332211
    assert message["words"].tolist()[:4] == [10, 10, 11, 11]
    assert datagram(pm.FORK, 10, 10, 11, 11, cpu=1, number=7, ns=0x5544332211) == GOLDEN_FORK


def test_the_command_is_a_message() -> None:
    data = pm.command(pm.LISTEN, 5)
    assert data == bytes.fromhex("28000000" "0300" "0000" "00000000" "00000000" "01000000" "01000000" "00000000" "04000000" "0400" "0000" "01000000")  # fmt: skip  # noqa: E501


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_any_bytes_are_messages_or_the_typed_error(datagrams: list[bytes]) -> None:
    with contextlib.suppress(ConnectorMessageError):
        assert len(parse(*datagrams)) == len(datagrams)


@given(st.data())
def test_a_message_with_any_bytes_changed(data: st.DataObject) -> None:
    raw = bytearray(GOLDEN_FORK[: data.draw(st.integers(0, len(GOLDEN_FORK)))])
    for _ in range(data.draw(st.integers(0, 4)) if raw else 0):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        (message,) = parse(bytes(raw))
    except ConnectorMessageError:
        return
    assert message["words"].shape == (6,)


@pytest.mark.parametrize("size", [0, 16, 51, 52, 67])
def test_a_fork_that_is_cut_off(size: int) -> None:
    with pytest.raises(ConnectorMessageError, match="please report"):
        parse(GOLDEN_FORK[:size])


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.EPERM, MissingCapabilityError, "CAP_NET_ADMIN"),
        (errno.ECONNREFUSED, CaptureError, "initial network namespace"),
        (errno.EPROTONOSUPPORT, CaptureError, "CONFIG_PROC_EVENTS"),
        (errno.EMFILE, CaptureError, "Too many open files"),
    ],
)
def test_what_is_said_of_a_refusal(number: int, kind: type[Exception], words: str) -> None:
    said = refusal(OSError(number, os.strerror(number)))
    assert type(said) is kind
    assert words in str(said)


# -- from messages to records


class Bench:
    """A ProcEvents with one watched process of pid PID, which began at boot time 0."""

    def __init__(self, mask: int = ALL, *, flags: int = 0, node_mask: int = 0, ring: int = 1 << 20) -> None:
        self.control = MemoryControl(lambda: None)
        self.control.all_mask = node_mask
        self.watched = WatchedTable(4, lambda _pid, _entry: None)
        self.ring = MemoryRing(ring, self.control, Pause)
        self.events = ProcEvents(self.ring, self.control, self.watched)
        if mask:
            self.watched.put(PID, Watched(0, mask, flags))
        self.kin = self.events.kins[PID] = Kin(PID, 0, 1, 2, 3, b"work", {PID})
        self._now = 1_000_000_000_000

    def say(self, *messages: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """Take messages (what, words...) in one batch; (type, tid, status) of the records."""
        self._now += 1_000_000
        self.events.take(parse(*(datagram(what, *words, ns=self._now) for what, *words in messages)), 0)
        return [(int(row["type"]), int(row["tid"]), int(row["status"])) for row in self.rows()]

    def rows(self) -> Slots:
        slots = slots_of(self.ring.read(1 << 20) or b"")
        found: Slots = slots[check_records(slots)]
        return found

    def close(self) -> None:
        self.ring.close()


@pytest.fixture
def bench() -> Bench:
    return Bench()


def exit_of(tid: int, status: int, tgid: int = PID) -> tuple[int, ...]:
    return (pm.EXIT, tid, tgid, status, 17, 1, 1)


def thread(tid: int) -> tuple[int, ...]:
    return (pm.FORK, 1, 1, tid, PID)


T1, T2 = PID + 1, PID + 2


def test_the_last_thread_is_the_end() -> None:
    bench = Bench()
    assert bench.say(thread(T1)) == [(CREATE, 0, 0)]
    assert bench.say(exit_of(PID, 5 << 8)) == []
    assert bench.say(exit_of(T1, 3 << 8)) == [(T_EXIT, T1, 3 << 8), (EXIT, T1, 3 << 8)]
    assert not bench.events.kins
    assert not bench.watched.entries
    assert bench.say(exit_of(PID, 5 << 8)) == []
    bench.close()


def test_a_thread_that_was_listed_before_its_creation_was_read() -> None:
    bench = Bench()
    bench.kin.live.add(T1)
    assert bench.say(thread(T1), exit_of(T1, 0)) == [(CREATE, 0, 0), (T_EXIT, T1, 0)]
    # And one that had begun to end when the threads were listed: its end is told, and counts for nothing.
    assert bench.say(exit_of(T2, 0)) == [(T_EXIT, T2, 0)]
    assert bench.say(exit_of(PID, 0)) == [(EXIT, PID, 0)]
    bench.close()


@pytest.mark.parametrize("order", [(T1, T2, PID), (PID, T1, T2), (T2, PID, T1)])
def test_one_of_the_threads_dumped_core(order: tuple[int, ...]) -> None:
    bench = Bench(ABORT | EXIT)
    bench.say(thread(T1), thread(T2))
    assert bench.say(*(exit_of(tid, 11 | 0x80 if tid == T1 else 11) for tid in order)) == [
        (ABORT, order[-1], 139),
        (EXIT, order[-1], 139),
    ]
    bench.close()


def test_a_signal_counts_for_more_than_the_code_of_a_thread_that_just_ended() -> None:
    bench = Bench(EXIT)
    bench.say(thread(T1))
    assert bench.say(exit_of(PID, 15), exit_of(T1, 2 << 8)) == [(EXIT, T1, 15)]
    bench.close()


def test_exec_by_another_thread_keeps_the_process() -> None:
    bench = Bench()
    bench.say(thread(T1), thread(T2))
    assert bench.say(exit_of(T2, 0), exit_of(PID, 0)) == [(T_EXIT, T2, 0)]
    assert bench.say((pm.EXEC, PID, PID)) == [(EXEC, PID, 0)]
    assert bench.kin.live == {PID}
    assert bench.say(exit_of(PID, 7 << 8)) == [(EXIT, PID, 7 << 8)]
    bench.close()


def test_exec_by_another_thread_that_dies_of_it() -> None:
    """The first thread's id ends twice, and the other's never."""
    bench = Bench()
    bench.say(thread(T1))
    assert bench.say(exit_of(PID, 0)) == []
    assert bench.say(exit_of(PID, 9)) == [(ABORT, PID, 9), (EXIT, PID, 9)]
    bench.close()


def test_an_end_that_was_inferred_is_not_told_again() -> None:
    bench = Bench(EXIT, node_mask=EXIT)
    bench.events.wide = True
    bench.events.infer(bench.kin, 5)
    (row,) = bench.rows()
    assert int(row["flags"]) == 0x80 | F_MATCH_PROCESS | F_MATCH_NODE
    assert bench.say(exit_of(PID, 3 << 8)) == []
    bench.close()


def test_the_end_of_who_had_the_pid_before() -> None:
    bench = Bench()
    bench.kin.start_ns = 1 << 60
    bench.watched.put(PID, Watched(1 << 60, ALL, 0))
    assert bench.say(exit_of(PID, 0)) == []
    assert PID in bench.watched.entries
    bench.close()


def test_an_entry_for_another_start_time_matches_nothing() -> None:
    bench = Bench()
    bench.watched.put(PID, Watched(10, ALL, 0))
    assert bench.say(exit_of(PID, 0)) == []
    assert bench.watched.entries[PID] == Watched(10, ALL, 0)
    bench.close()


def test_children_are_followed_within_a_batch() -> None:
    bench = Bench(EXIT, flags=1)
    child, grandchild, stranger = PID + 10, PID + 11, PID + 12
    told = bench.say(
        (pm.FORK, PID, PID, child, child),
        (pm.FORK, stranger, stranger, stranger + 1, stranger + 1),
        (pm.FORK, child, child, grandchild, grandchild),
        exit_of(stranger, 0, stranger),
        exit_of(grandchild, 2 << 8, grandchild),
        exit_of(child, 1 << 8, child),
    )
    assert told == [(EXIT, grandchild, 2 << 8), (EXIT, child, 1 << 8)]
    assert list(bench.watched.entries) == [PID]
    bench.close()


def test_a_full_table_of_children() -> None:
    bench = Bench(EXIT, flags=1)
    bench.say(*((pm.FORK, PID, PID, PID + more, PID + more) for more in range(1, 6)))
    assert bench.control.lost()[LOST_PROCESS][7] == 2
    bench.close()


def test_ids_and_names_are_learnt() -> None:
    bench = Bench()
    name = struct.unpack("=4I", b"other".ljust(16, b"\0"))
    bench.say((pm.UID, PID, PID, 77, 78), (pm.GID, PID, PID, 88, 89), (pm.COMM, PID, PID, *name), thread(T1), (pm.COMM, T1, PID, *name))
    bench.say(exit_of(T1, 0))
    bench.events.take(parse(datagram(pm.EXIT, PID, PID, 0, 17, 9, 5, ns=1 << 50)), 7)
    (row,) = bench.rows()
    assert [int(row[field]) for field in ("uid", "gid", "ppid", "boottime_ns")] == [77, 88, 5, (1 << 50) + 7]
    assert row["comm"] == b"other"
    bench.close()


@given(
    st.lists(
        st.tuples(st.sampled_from([pm.FORK, pm.EXEC, pm.UID, pm.COMM, pm.EXIT, pm.SID]), *[st.integers(PID, PID + 3)] * 4), max_size=40
    )
)
def test_any_order_of_messages_gives_whole_records_and_each_end_once(messages: list[tuple[int, ...]]) -> None:
    bench = Bench(ALL, flags=1, node_mask=EXIT)
    bench.events.wide = True
    now = 1_000_000_000_000
    # Each in a clock tick of its own, so that whoever gets a pid anew has another start time.
    told = [datagram(what, *words, ns=now + 2 * TICK_NS * at) for at, (what, *words) in enumerate(messages)]
    bench.events.take(parse(*told), 0) if told else None
    ended: set[tuple[int, int]] = set()
    for row in bench.rows():
        if row["type"] == EXIT and int(row["tgid"]) == PID:
            process = (PID, int(row["start_boottime_ns"]))
            assert process not in ended
            ended.add(process)
    bench.close()


# -- ring and tables


def test_a_full_ring_keeps_what_watched_processes_said() -> None:
    bench = Bench(EXIT, node_mask=FORK, ring=64 << 10)  # 512 slots, of which 384 for what may be dropped
    bench.events.wide = True
    for number in range(600):
        bench.events.take(parse(datagram(pm.FORK, PID, PID, PID + number + 1, PID + number + 1, ns=number)), 0)
    assert bench.control.lost()[LOST_NODE] == (0, 0, 0, 600 - 385, 0, 0, 0, 0)
    assert bench.control.lost()[LOST_PROCESS] == (0,) * 8
    assert bench.say(exit_of(PID, 0))[-1] == (EXIT, PID, 0)
    bench.close()


def test_a_ring_that_is_full_of_watched_ones_counts_them_too() -> None:
    bench = Bench(FORK, ring=64 << 10)
    for number in range(600):
        bench.events.take(parse(datagram(pm.FORK, PID, PID, PID + number + 1, PID + number + 1, ns=number)), 0)
    # Of 512 slots the last quarter is for ends.
    assert bench.control.lost()[LOST_PROCESS] == (0, 0, 0, 600 - 385, 0, 0, 0, 0)
    for number in range(600):
        bench.ring.append(EXIT, F_MATCH_PROCESS, number, 1, PID, PID, 1, 0, 0, b"")
    assert bench.control.lost()[LOST_PROCESS] == (0, 0, 0, 600 - 385, 0, 0, 600 - (512 - 385), 0)
    assert bench.ring.producer - bench.ring.consumer == bench.ring.size
    bench.close()


@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 3000), st.booleans()), max_size=120), st.integers(128, 20_000))
def test_the_ring_gives_what_was_put_in(execs: list[tuple[int, int, bool]], limit: int) -> None:
    """Around its end many times; what was not released is read again."""
    control = MemoryControl(lambda: None)
    ring = MemoryRing(64 << 10, control, Pause)
    put: list[tuple[int, bytes, bytes]] = []
    got: list[tuple[int, bytes, bytes]] = []

    def take() -> None:
        while (data := ring.read(limit)) is not None:
            slots = slots_of(data)
            for at in check_records(slots).tolist():
                row, tail = slots[at], at * 128 + 128
                middle = tail + int(row["filename_len"])
                got.append((int(row["tgid"]), data[tail:middle], data[middle : middle + int(row["args_len"])]))

    for number, (name, args, release) in enumerate(execs):
        item = (number, b"n" * min(name, 1024), b"a" * min(args, 2944))
        before = ring.producer
        ring.append(EXEC, F_MATCH_PROCESS, 1, 2, number, number, 3, 4, 5, b"c", filename=b"n" * name, args=b"a" * args)
        if ring.producer > before:
            put.append(item)
        if release:
            take()
            ring.release(ring.position)
    take()
    assert got == put
    assert sum(control.lost()[LOST_PROCESS]) == len(execs) - len(put)
    unreleased = ring.producer - ring.consumer
    ring.rewind()
    assert sum(len(data) for data in iter(lambda: ring.read(limit), None)) == unreleased
    ring.close()


def test_the_table_is_like_a_map_of_the_kernel() -> None:
    changed: list[tuple[int, bool]] = []
    table = WatchedTable(2, lambda pid, entry: changed.append((pid, entry is not None)))
    value = Watched(1, 2, 3).pack()
    assert not table.update(pid_key(1), value, BPF_EXIST)
    assert table.update(pid_key(1), value)
    assert not table.update(pid_key(1), value, BPF_NOEXIST)
    assert table.update(pid_key(1), value, BPF_EXIST)
    assert table.update(pid_key(2), value, BPF_NOEXIST)
    with pytest.raises(BpfError) as full:
        table.update(pid_key(3), value)
    assert full.value.errno == errno.E2BIG
    assert table.lookup(pid_key(1), WATCHED_SIZE) == value
    assert table.lookup(pid_key(3), WATCHED_SIZE) is None
    assert list(table.keys(4)) == [pid_key(1), pid_key(2)]
    assert table.delete(pid_key(1))
    assert not table.delete(pid_key(1))
    assert changed == [(1, True), (1, True), (2, True), (1, False)]


def test_the_ring_wakes_by_the_clock_while_much_comes() -> None:
    reader, writer = os.pipe()
    pauses = [Pause()]
    ring = MemoryRing(64 << 10, MemoryControl(lambda: None), lambda: pauses[0])
    ring.listen(reader)
    os.write(writer, b"x")
    assert ring.prepare_sleep()
    assert ring.wakeups.poll(5)
    pauses[0] = Pause(least_s=0.02)
    ring.awake()
    began = time.monotonic()
    assert ring.wakeups.poll(5)
    assert time.monotonic() - began > 0.01
    os.read(reader, 1)
    pauses[0] = Pause(most_s=0.02)
    ring.awake()
    assert ring.wakeups.poll(5), "there is something to do, though nothing comes"
    ring.listen(None)
    ring.close()
    os.close(reader)
    os.close(writer)
