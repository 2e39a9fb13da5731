# SPDX-License-Identifier: Apache-2.0
"""Runs of the probe that the kernel skips: copies make them good, and what nothing has made good is told as a gap.

A kernel that does not preempt programs skips none of the probe's. So what is skipped here is a program of the test's, which calls itself.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from kmonitor.agent import libbpf
from kmonitor.agent.interest import InterestTable
from kmonitor.agent.kernel_btf import KernelBtf
from kmonitor.agent.maps import LOST_FOLLOW, TYPE_BITS
from kmonitor.agent.misses import SKIPPED
from kmonitor.agent.probe import INFER, ITERATOR, Config, Probe, ProbeOptions, load_object, open_object, run
from kmonitor.v1 import agent_pb2
from kmonitor.wire.masks import EventType
from kmonitor.wire.record import check_records, slots_of
from tests.agent.interest import apply
from tests.lab.requires import capture_lack, need
from tests.lab.services import Lab

pytestmark = pytest.mark.capture

SKIPPER = """
#include <linux/types.h>
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
char LICENSE[] SEC("license") = "GPL";
SEC("raw_tp/bpf_trace_printk") int again(void *ctx) { bpf_printk("again"); return 0; }
SEC("raw_tp") int once(void *ctx) { bpf_printk("once"); return 0; }
"""
FIRST = frozenset(SKIPPED)
SECOND = frozenset(f"{program}_2" for program in SKIPPED)
THIRD = frozenset(f"{program}_3" for program in SKIPPED)
CHILDREN = 20


class Skipper:
    """A program that the kernel skips as often as it is wanted."""

    def __init__(self, folder: Path) -> None:
        source, made = folder / "skipper.bpf.c", folder / "skipper.bpf.o"
        source.write_text(SKIPPER)
        multiarch = subprocess.run(["cc", "-print-multiarch"], capture_output=True, text=True, check=True).stdout.strip()
        flags = ["-g", "-O2", "-target", "bpf", "-w", "-isystem", f"/usr/include/{multiarch}"]
        subprocess.run(["clang", *flags, "-c", source, "-o", made], check=True)
        self._object = libbpf.Object(made.read_bytes(), "skipper")
        self._object.load()
        self.link = self._object.attach("again")
        self.program = self._object.program_fd("again")
        self._once = self._object.program_fd("once")

    def skip(self, times: int) -> None:
        """Each time the program runs in a tracepoint, and does what has that tracepoint again."""
        for _ in range(times):
            libbpf.run_program(self._once, bytes(8))

    def close(self) -> None:
        for fd in (self.link, self.program, self._once):
            os.close(fd)
        self._object.close()


@pytest.fixture
def skipper(tmp_path: Path) -> Iterator[Skipper]:
    need(capture_lack)
    made = Skipper(tmp_path)
    yield made
    made.close()


@contextlib.contextmanager
def opened(*, without: frozenset[str] = frozenset(), counting: dict[str, int] | None = None) -> Iterator[Probe]:
    """A probe with copies, of which some are attached nowhere, and which takes the kernel's counts from other programs."""
    options = ProbeOptions(ring_bytes=1 << 20, force_copies=True)
    with KernelBtf() as btf:
        has_group_dead = btf.tracepoint_arguments("sched_process_exit") >= 2
        victim_is_task = btf.tracepoint_arguments("mark_victim") >= 2
    config = Config.of(options, has_group_dead=has_group_dead, victim_is_task=victim_is_task)
    obj = open_object(options, config)
    try:
        load_object(obj)
        programs = {program: obj.program_fd(program) for program in (ITERATOR, INFER, *SKIPPED)}
        for program, fd in (counting or {}).items():
            os.close(programs[program])
            programs[program] = os.dup(fd)
        probe = run("core", obj, config, None, lambda name: obj.program_fd(name) if name in without else obj.attach(name), programs)
    finally:
        obj.close()
    yield probe
    probe.close()


WORK = f"""
import os, sys, threading
sys.stdin.read()
for _ in range({CHILDREN}):
    if os.fork() == 0:
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
        os.execv("/bin/true", ["true"])
    os.wait()
"""


@pytest.mark.parametrize(
    "without",
    [frozenset(), FIRST, SECOND, THIRD, FIRST | SECOND, FIRST | THIRD, SECOND | THIRD],
    ids=["all", "not the first", "not the second", "not the third", "the third", "the second", "the first"],
)
def test_each_event_comes_once_whichever_copies_run(without: frozenset[str]) -> None:
    need(capture_lack)
    with opened(without=without) as probe:
        with subprocess.Popen([sys.executable, "-S", "-c", WORK], stdin=subprocess.PIPE) as parent:
            tree = agent_pb2.Interest.ProcessInterest(pid=parent.pid, event_mask=0x7F, look_up=True, follow=True, root=True)
            apply(InterestTable(probe), agent_pb2.Interest(version=1, processes=[tree]))  # not the node: others must not fill the ring
            parent.communicate(timeout=50)
        assert parent.returncode == 0
        data = probe.ring.read(1 << 20)
        slots = slots_of(data or b"")
        rows = slots[check_records(slots)]
        children = set(rows["child_tgid"][(rows["type"] == EventType.PROCESS_FORK) & (rows["tgid"] == parent.pid)].tolist())
        told = Counter((int(row["tgid"]), EventType(int(row["type"]))) for row in rows)
        del data, slots, rows
        assert probe.control.lost() == ((0,) * 8, (0,) * 8)
    assert told[parent.pid, EventType.PROCESS_FORK] == len(children) == CHILDREN
    once = (EventType.THREAD_CREATE, EventType.THREAD_EXIT, EventType.PROCESS_EXEC, EventType.PROCESS_EXIT)
    assert {(child, kind): told[child, kind] for child in children for kind in once} == {
        (child, kind): 1 for child in children for kind in once
    }


@pytest.mark.parametrize(
    ("program", "kinds"),
    [
        ("kmonitor_fork", {EventType.THREAD_CREATE, EventType.PROCESS_FORK}),
        ("kmonitor_exec", {EventType.PROCESS_EXEC}),
        ("kmonitor_exit", {EventType.THREAD_ABORT, EventType.THREAD_EXIT, EventType.PROCESS_ABORT, EventType.PROCESS_EXIT}),
    ],
)
def test_what_is_skipped_counts_as_lost(skipper: Skipper, program: str, kinds: set[EventType]) -> None:
    """Of each type that the program makes, and exactly as often."""
    skipper.skip(2)  # before: another probe's
    with opened(counting={program: skipper.program}) as probe:
        already, before = probe.control.lost()[1], libbpf.recursion_misses(skipper.program)
        skipper.skip(3)
        more = libbpf.recursion_misses(skipper.program) - before
        assert more >= 3  # whoever else on this machine writes to the kernel's trace has it skipped too
        node, watched = probe.control.lost()
        assert node == (0,) * 8
        grown = [now - then for now, then in zip(watched, already, strict=True)]
        assert {TYPE_BITS[index] for index, count in enumerate(grown) if count and index != LOST_FOLLOW} == kinds
        assert set(grown) == {0, more}
        assert bool(grown[LOST_FOLLOW]) == (program == "kmonitor_fork")
        assert probe.control.lost()[1] == watched


def test_a_gap_is_told_and_who_ended_meanwhile(lab: Lab, skipper: Skipper) -> None:
    """The exit of a watched process is one that the kernel skipped: the agent that comes next finds the count with the pinned programs."""
    broker = lab.broker()
    agent = lab.agent("skip", broker.address, pin=True)
    with subprocess.Popen(["sh", "-c", "read line"], stdin=subprocess.PIPE) as child:
        watch = lab.watch(broker.address, "--node", "skip", "--pid", str(child.pid), "--events", "exit")
        watch.wait_registered(1, "RUNNING")
        lab.kill(agent)
        folder = lab.pins / "skip@host@v1"
        for name, fd in (("prog_kmonitor_exit", skipper.program), ("link_kmonitor_exit", skipper.link)):
            (folder / name).unlink()
            libbpf.pin(fd, folder / name)
        agent = lab.agent("skip", broker.address, pin=True)
        # The agent has armed all anew, and has found the child alive: it does one after the other.
        last = lab.watch(broker.address, "--node", "skip", "--pid", str(os.getpid()), "--events", "exit")
        last.wait_registered(1, "RUNNING")
        lab.stop(last)
        start = len(watch.records)
        assert child.stdin is not None
        child.stdin.close()
        child.wait(20)
        skipper.skip(1)
        at = watch.wait_for(lambda line: line["kind"] == "gap", "the gap", start=start)
        gap = watch.records[at]
        assert gap["reason"] == "RING"
        assert [(each["type"], each["count"] > 0) for each in gap["lost"]] == [("PROCESS_EXIT", True)]
        watch.wait_end_of(child.pid)
        (end,) = [line for line in watch.events() if line["type"] == "PROCESS_EXIT"]
        assert end["inferred"]
        # What was counted is counted: not once more for an agent that comes later.
        lab.kill(agent)
        lab.agent("skip", broker.address, pin=True)
        assert [node["lost"] for node in lab.json_lines("nodes", "--json", "--broker", broker.address)] == [
            4 * libbpf.recursion_misses(skipper.program)
        ]
