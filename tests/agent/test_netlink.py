# SPDX-License-Identifier: Apache-2.0
"""Source netlink on this machine's kernel: what it does when messages are missing, and where it cannot work."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kmonitor.agent import maps
from kmonitor.agent.errors import CaptureError
from kmonitor.agent.interest import InterestTable
from kmonitor.agent.probe import ProbeOptions
from kmonitor.agent.sources.netlink import Netlink, load
from kmonitor.v1 import agent_pb2, monitor_pb2
from kmonitor.wire.record import F_INFERRED, F_MATCH_NODE, F_MATCH_PROCESS, Slots, check_records, slots_of
from tests.agent.interest import apply
from tests.bad_input.refusal import refused
from tests.lab.connector import Connector, connector_lack
from tests.lab.process import Running
from tests.lab.requires import Lack, need, tools_lack
from tests.lab.services import Agent, Lab
from tests.lab.watch import Line, Watch

pytestmark = pytest.mark.capture

FORK, ABORT, EXEC, EXIT = 0x08, 0x10, 0x20, 0x40
Want = agent_pb2.Interest.ProcessInterest
RUNNING = monitor_pb2.REGISTRATION_STATE_RUNNING
SMALL = 64 << 10
"""A receive buffer of twice this holds some 150 messages."""


@pytest.fixture(autouse=True)
def _needs_connector() -> None:
    need(connector_lack)


@pytest.fixture
def source(request: pytest.FixtureRequest) -> Iterator[Netlink]:
    opened = load(ProbeOptions(ring_bytes=getattr(request, "param", 1 << 20)), None)
    yield opened
    opened.close()


@pytest.fixture
def arm(source: Netlink) -> Callable[..., agent_pb2.InterestApplied]:
    table = InterestTable(source)

    def arm_some(*processes: Want, node_mask: int = 0) -> agent_pb2.InterestApplied:
        return apply(table, agent_pb2.Interest(version=1, processes=processes, node_mask=node_mask))

    return arm_some


def shell(script: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["/bin/sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def rows_of(source: Netlink) -> Slots:
    slots = slots_of(source.ring.read(1 << 20) or b"")
    found: Slots = slots[check_records(slots)]
    return found


def of(rows: Slots, pid: int) -> list[tuple[int, int, int]]:
    return [(int(row["type"]), int(row["status"]), int(row["flags"])) for row in rows if row["tgid"] == pid]


def until(source: Netlink, wanted: Callable[[Slots], bool], *, keep: bool = True) -> Slots:
    """All records from the last release on, once they are as `wanted`. Without `keep` they are released as they are read: beside other
    load what is node-wide would fill a small ring."""
    rows: Slots = slots_of(b"")
    limit = time.monotonic() + 10
    while time.monotonic() < limit:
        if keep:
            source.ring.rewind()
            source.ring.has_unread()
            rows = rows_of(source)
        else:
            rows = np.concatenate([rows, rows_of(source)])
            source.ring.release(source.ring.position)
        if wanted(rows):
            return rows
        with select.epoll() as outer:
            outer.register(source.ring.wakeups.fileno(), select.EPOLLIN)
            if source.ring.prepare_sleep():
                outer.poll(0.1)
            source.ring.awake()
    raise AssertionError(f"it did not come: {rows}")


def let_go(child: subprocess.Popen[bytes]) -> None:
    """It ends, and nobody waits for that: who does reads nothing meanwhile, and beside other load a small buffer would run over."""
    assert child.stdin is not None
    child.stdin.write(b"\n")
    child.stdin.flush()


def storm(count: int) -> None:
    for _ in range(count):
        subprocess.run(["/bin/true"], check=True)


def on_each_cpu(source: Netlink) -> None:
    """Something happens there, and is heard unless there is no room for it."""
    for cpu in os.sched_getaffinity(0):
        subprocess.run(["taskset", "--cpu-list", str(cpu), "/bin/true"], check=True)
        source.catch_up()


def missing(source: Netlink) -> int:
    return source.control.lost()[0][maps.LOST_FOLLOW]


def heard_on_each_cpu(node_mask: int) -> Netlink:
    """With a small buffer, of which nothing was missing before each CPU's numbers were known. Beside other load that may take several."""
    limit = time.monotonic() + 20
    while time.monotonic() < limit:
        opened = load(ProbeOptions(ring_bytes=SMALL), None)
        apply(InterestTable(opened), agent_pb2.Interest(version=1, node_mask=node_mask))
        on_each_cpu(opened)
        assert opened.connector is not None
        if opened.connector.missing() == 0 and opened.connector.heard.keys() >= os.sched_getaffinity(0):
            return opened
        opened.close()
    raise AssertionError("its buffer runs over before each CPU was heard")


def listeners() -> int:
    """Of the proc connector: protocol 11, group 1."""
    lines = Path("/proc/net/netlink").read_text(encoding="ascii").splitlines()[1:]
    return sum(1 for line in lines if line.split()[1] == "11" and line.split()[3] != "00000000")


# -- what is asked for


def test_nobody_listens_before_anybody_asks_nor_behind_the_last(source: Netlink, arm: Callable[..., Any]) -> None:
    before = listeners()
    assert source.connector is None
    child = shell("read x")
    arm(Want(pid=child.pid, event_mask=EXIT, look_up=True))
    assert listeners() == before + 1
    arm(Want(pid=child.pid, event_mask=0))
    assert source.control["any_mask"] == 0
    with select.epoll() as outer:
        outer.register(source.ring.wakeups.fileno(), select.EPOLLIN)
        limit = time.monotonic() + 10
        while source.connector is not None and time.monotonic() < limit:
            assert source.ring.prepare_sleep()
            outer.poll(2.0)
            source.ring.awake()
    assert listeners() == before
    child.communicate()
    assert source.ring.producer == 0


def test_a_watched_process_and_no_other(source: Netlink, arm: Callable[..., Any]) -> None:
    child, other = shell("read x; exit 3"), shell("read x")
    answer = arm(Want(pid=child.pid, event_mask=EXIT, look_up=True)).processes[0]
    assert answer.state == RUNNING
    other.communicate()
    child.communicate()
    rows = rows_of(source)
    assert [of(rows, child.pid), len(rows)] == [[(EXIT, 3 << 8, F_MATCH_PROCESS)], 1]
    assert int(rows[0]["start_boottime_ns"]) == answer.process.start_time
    assert source.watched.lookup(maps.pid_key(child.pid), maps.WATCHED_SIZE) is None


def test_states(source: Netlink, arm: Callable[..., Any]) -> None:
    child = shell("read x; exit 0")
    found = arm(Want(pid=child.pid, event_mask=EXIT, look_up=True)).processes[0].process
    other = arm(Want(pid=child.pid, start_time=found.start_time - 1, event_mask=EXIT, look_up=True)).processes[0]
    assert other.state == monitor_pb2.REGISTRATION_STATE_EXITED
    assert child.stdin is not None
    child.stdin.write(b"\n")
    child.stdin.flush()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    zombie = arm(Want(pid=child.pid, event_mask=EXIT, look_up=True)).processes[0]
    assert zombie.state == monitor_pb2.REGISTRATION_STATE_EXITED
    child.wait()
    gone = arm(Want(pid=child.pid, event_mask=EXIT, look_up=True)).processes[0]
    assert gone.state == monitor_pb2.REGISTRATION_STATE_NOT_FOUND
    assert of(rows_of(source), child.pid) == [(EXIT, 0, F_MATCH_PROCESS)]
    child.communicate()


def test_what_a_process_runs_while_it_runs(source: Netlink, arm: Callable[..., Any]) -> None:
    child = shell("read x; exec cat -")
    arm(Want(pid=child.pid, event_mask=EXEC, look_up=True))
    assert child.stdin is not None
    child.stdin.write(b"\n")
    child.stdin.flush()
    until(source, lambda rows: len(rows) > 0 and rows[-1]["comm"] == b"cat")
    source.ring.rewind()
    data = source.ring.read(1 << 20) or b""
    # The shell's own exec may be there too: Popen does not wait until all of it is done.
    at = int(check_records(slots_of(data))[-1]) * 128
    row = slots_of(data[at:])[0]
    middle = at + 128 + int(row["filename_len"])
    assert data[at + 128 : middle] == os.fsencode(os.path.realpath("/bin/cat")) + b"\0"
    assert data[middle : middle + int(row["args_len"])] == b"cat\0-\0"
    child.communicate()


def test_a_group_is_refused(arm: Callable[..., Any], source: Netlink) -> None:
    interest = agent_pb2.Interest(version=1, groups=[agent_pb2.Interest.GroupInterest(cgroup="/", event_mask=EXIT)])
    answer = apply(InterestTable(source), interest)
    assert "source netlink does not know in which control group" in answer.groups[0].error


# -- when messages are missing


def test_missing_messages_are_counted_one_by_one() -> None:
    """Against a second listener with room for all."""
    with Connector() as witness, contextlib.closing(heard_on_each_cpu(FORK | EXIT)) as source:
        connector = source.connector
        assert connector is not None
        storm(300)
        until(source, lambda _: missing(source) > 0)
        # What the socket has dropped is in the numbers once its CPU has sent more; and beside other load that may be dropped too.
        limit = time.monotonic() + 20
        on_each_cpu(source)
        while missing(source) != connector.missing_by_sequence:
            assert time.monotonic() < limit, f"missing {missing(source)}, by the numbers {connector.missing_by_sequence}"
            on_each_cpu(source)
        heard, received = dict(connector.heard), connector.received
        with subprocess.Popen(["/bin/true"]) as fence:
            pass
        witness.until_end_of(fence.pid)
        assert witness.lost == 0
        there = sum(1 for cpu, number in witness.numbers if cpu in heard and 0 <= number - heard[cpu][0] < heard[cpu][1] - heard[cpu][0])
        print(f"\nsent {there}, received {received}, missing {missing(source)}")
        assert missing(source) == there - received
        assert missing(source) > 300
        assert source.control.lost()[1] == (0,) * 8


@pytest.mark.parametrize("source", [SMALL], indirect=True)
def test_what_ended_unseen_is_inferred_once(source: Netlink, arm: Callable[..., Any]) -> None:
    gone, stays, later = shell("read x; exit 3"), shell("read x; exit 4"), shell("read x; exit 5")
    arm(*(Want(pid=child.pid, event_mask=EXIT, look_up=True) for child in (gone, stays, later)))
    storm(300)
    gone.communicate()
    rows = until(source, lambda rows: len(of(rows, gone.pid)) > 0)
    assert of(rows, gone.pid) == [(EXIT, 0, F_MATCH_PROCESS | F_INFERRED)]
    let_go(stays)
    rows = until(source, lambda rows: len(of(rows, stays.pid)) > 0)
    stays.communicate()
    assert of(rows, stays.pid) == [(EXIT, 4 << 8, F_MATCH_PROCESS)]
    storm(300)
    later.communicate()
    rows = until(source, lambda rows: len(of(rows, later.pid)) > 0)
    assert of(rows, later.pid) == [(EXIT, 0, F_MATCH_PROCESS | F_INFERRED)]
    assert len(rows) == 3
    assert list(source.watched.keys(4)) == []


@pytest.mark.parametrize("source", [SMALL], indirect=True)
def test_node_wide_what_is_gone_is_inferred_and_what_came_is_known(source: Netlink, arm: Callable[..., Any]) -> None:
    gone = shell("read x; exit 3")
    arm(node_mask=EXIT)
    storm(300)
    came = shell("read x; exit 4")  # its creation is not told
    gone.communicate()
    rows = until(source, lambda rows: len(of(rows, gone.pid)) > 0, keep=False)
    assert of(rows, gone.pid) == [(EXIT, 0, F_MATCH_NODE | F_INFERRED)]
    let_go(came)
    rows = until(source, lambda rows: len(of(rows, came.pid)) > 0, keep=False)
    came.communicate()
    assert of(rows, came.pid) == [(EXIT, 4 << 8, F_MATCH_NODE)]
    assert {bytes(row["comm"]) for row in rows if row["tgid"] == came.pid} == {b"sh"}


@pytest.mark.parametrize("source", [SMALL], indirect=True)
def test_a_child_that_was_made_unseen_is_followed(source: Netlink, arm: Callable[..., Any]) -> None:
    parent = shell("exec 3<&0; read x; (read y <&3; exit 7) & echo; wait")
    assert parent.stdin is not None
    assert parent.stdout is not None
    arm(Want(pid=parent.pid, event_mask=FORK | ABORT | EXIT, follow=True, look_up=True))
    storm(300)
    parent.stdin.write(b"\n")
    parent.stdin.flush()
    parent.stdout.readline()
    rows = until(source, lambda rows: len(of(rows, parent.pid)) > 0)
    assert of(rows, parent.pid) == [(FORK, 0, F_MATCH_PROCESS | F_INFERRED)]
    child = int(rows[0]["child_tgid"])
    os.kill(child, signal.SIGKILL)
    rows = until(source, lambda rows: len(of(rows, child)) >= 2 and of(rows, child)[-1][0] == EXIT)
    assert of(rows, child)[-2:] == [(ABORT, 9, F_MATCH_PROCESS), (EXIT, 9, F_MATCH_PROCESS)]
    parent.communicate()


def test_a_stopped_agent(lab: Lab) -> None:
    """Everything at once, as a user sees it."""
    broker = lab.broker()
    agent = lab.agent("alpha", broker.address, "--ring-size", "64K", source="netlink")
    gone, stays, other, last = (lab.command("sh", "-c", f"read x; exit {code}") for code in (3, 4, 5, 6))
    watch = lab.watch(broker.address, *(f"--pid={each.pid}" for each in (gone, stays, last)), "--events", "exit")
    bystander = lab.watch(broker.address, *(f"--pid={each.pid}" for each in (other, last)), "--events", "exit")
    watch.wait_registered(3, "RUNNING")
    bystander.wait_registered(2, "RUNNING")
    agent.send(signal.SIGSTOP)
    storm(200)
    _end(gone)
    agent.send(signal.SIGCONT)
    watch.wait_end_of(gone.pid)
    _end(stays)
    _end(other)
    watch.wait_end_of(stays.pid)
    bystander.wait_end_of(other.pid)
    assert [_end_told(line) for line in watch.events()] == [(gone.pid, None, True), (stays.pid, 4, False)]
    assert [_end_told(line) for line in bystander.events()] == [(other.pid, 5, False)]
    assert _drops(agent) > 200
    for each in (watch, bystander):
        _wait_gaps(each, agent)
    lab.stop(watch, bystander)


def _end(process: Running) -> None:
    process.say("go")
    process.wait()


def _end_told(line: Line) -> tuple[int, int | None, bool]:
    return line["pid"], line["exit_code"], line["inferred"]


def _wait_gaps(watch: Watch, agent: Agent) -> None:
    """Until the gaps' numbers are what the kernel says. Others on this machine may make messages too: then there are several."""
    limit = time.monotonic() + 40
    while time.monotonic() < limit:
        gaps = watch.of_kind("gap")
        if gaps and sum(count["count"] for gap in gaps for count in gap["lost"]) == _drops(agent):
            assert {gap["reason"] for gap in gaps} == {"RING"}
            return
        time.sleep(0.05)  # nothing tells when the last was told
    raise AssertionError(f"the kernel dropped {_drops(agent)}, and told were {watch.of_kind('gap')}")


def _drops(agent: Agent) -> int:
    """By the kernel's own count for the agent's socket. Its port is the pid, since it is the first of the process."""
    for line in Path("/proc/net/netlink").read_text(encoding="ascii").splitlines()[1:]:
        fields = line.split()
        if fields[1:3] == ["11", str(agent.pid)]:
            return int(fields[8])
    raise AssertionError("the agent does not listen")


def test_a_small_agent_loses_nothing_while_its_broker_is_away(lab: Lab) -> None:
    """What was asked for is still matched, and kept: the socket's buffer would not hold it."""
    broker = lab.broker()
    agent = lab.agent("alpha", broker.address, "--ring-size", "128K", source="netlink")
    parent = lab.command("sh", "-c", "read x; for i in $(seq 250); do /bin/true; done")
    watch = lab.watch(broker.address, "--pid", str(parent.pid), "--follow", "--events", "exit")
    watch.wait_registered(1, "RUNNING")
    broker.send(signal.SIGSTOP)
    _end(parent)  # 750 messages, of which the socket's buffer holds 300
    assert _drops(agent) == 0
    broker.send(signal.SIGCONT)
    watch.wait_end_of(parent.pid)
    assert watch.of_kind("gap") == []
    assert len(watch.events()) == 250 + 1 + 1  # and the one that counts for the loop
    lab.stop(watch)


# -- where it cannot work


@pytest.mark.parametrize(
    ("unshare", "words"),
    [
        (("--pid", "--fork", "--mount-proc"), ("initial pid namespace", "on the host")),
        (("--user", "--map-root-user"), ("initial user namespace", "on the host")),
        (("--net",), ("initial network namespace", "host's network")),
    ],
    ids=["pid", "user", "network"],
)
def test_in_another_namespace(lab: Lab, unshare: tuple[str, ...], words: tuple[str, ...]) -> None:
    need(lambda: tools_lack(Lack.NAMESPACES, "unshare"))
    done = lab.run("unshare", *unshare, *lab.agent_command("bad", "127.0.0.1:1", source="netlink"), limit=8.0)
    refused(done, 2, *words)


def test_without_the_capability_for_a_large_buffer(lab: Lab) -> None:
    """Linux 6.6 and later let everybody listen."""
    need(lambda: tools_lack(Lack.SETPRIV, "setpriv"))
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    prefix = ("setpriv", "--bounding-set", "-net_admin")
    if release < (6, 6):
        done = lab.run(*prefix, *lab.agent_command("bad", "127.0.0.1:1", source="netlink"), limit=8.0)
        refused(done, 4, "CAP_NET_ADMIN")
        return
    broker = lab.broker()
    agent = lab.agent("alpha", broker.address, "--ring-size", "1G", source="netlink", prefix=prefix)
    lab.stop(agent)
    assert "give CAP_NET_ADMIN, or raise sysctl net.core.rmem_max" in agent.stderr_text()


def test_a_namespace_cannot_be_its_scope() -> None:
    with pytest.raises(CaptureError, match="--scope host"):
        load(ProbeOptions(scope="pidns"), None)


def test_no_descriptor_is_left_behind() -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def once() -> None:
        source = load(ProbeOptions(ring_bytes=1 << 20), None)
        apply(InterestTable(source), agent_pb2.Interest(version=1, node_mask=EXIT))
        source.close()

    once()
    before = descriptors()
    for _ in range(3):
        once()
    assert descriptors() == before
