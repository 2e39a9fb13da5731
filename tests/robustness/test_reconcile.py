# SPDX-License-Identifier: Apache-2.0
"""Watched processes whose ends nobody saw: each is told as PROCESS_EXIT, inferred, once; and none that lives."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from tests.lab.namespaces import Idler
from tests.lab.services import Lab
from tests.robustness.conftest import SMALL_RING, Maker
from tests.robustness.listener import Listener
from tests.robustness.rig import PATIENT, SQLITE, Rig

COUNT = 8


@pytest.fixture(scope="module")
def unpinned(make_rig: Maker) -> Iterator[Rig]:
    """Nodes u and v, whose agents pin nothing, and node s with pins and a small ring."""
    with make_rig(*PATIENT, nodes={"s": SMALL_RING}, log=SQLITE) as made:
        for name in ("u", "v"):
            made.node(name, pin=False)
        yield made


def watched(rig: Rig, lab: Lab, node: str) -> tuple[list[Idler], Listener]:
    """Processes, and who watches each."""
    idlers = [rig.idler(lab, node) for _ in range(COUNT)]
    return idlers, rig.listener(lab, *({"node": node, "pid": idler.pid, "events": "exit"} for idler in idlers))


def end(lab: Lab, idlers: list[Idler]) -> None:
    """With a code of its own each."""
    for number, idler in enumerate(idlers, 1):
        idler.end(number)
        lab.stop(idler)


def check(lab: Lab, listener: Listener, node: str, unseen: list[Idler], alive: list[Idler]) -> None:
    """Of the unseen each end was told once, without a status; and of those that live each when it ends, with it."""
    for idler in unseen:
        listener.wait_end_of(idler.pid)
    assert set(listener.account.read().inferred.get(node, {})) == {idler.pid for idler in unseen}
    end(lab, alive)
    for idler in alive:
        listener.wait_end_of(idler.pid)
    listener.settle()
    account = listener.account.read()
    assert account.wrong == []
    assert sorted(account.ends[node].elements(), key=str) == sorted(
        [*((idler.pid, None) for idler in unseen), *((idler.pid, code) for code, idler in enumerate(alive, 1))], key=str
    )
    listener.stop()


def test_pins_that_were_lost(unpinned: Rig, lab: Lab) -> None:
    """The agent was killed, and its probe with it."""
    idlers, listener = watched(unpinned, lab, "u")
    unseen, alive = idlers[: COUNT // 2], idlers[COUNT // 2 :]
    unpinned.kill_agent("u")
    end(lab, unseen)
    unpinned.restart_agent("u")
    check(lab, listener, "u", unseen, alive)


def test_pins_that_were_lost_while_the_broker_was_away(unpinned: Rig, lab: Lab) -> None:
    """A broker knows from its log what was watched."""
    idlers, listener = watched(unpinned, lab, "v")
    unseen, alive = idlers[: COUNT // 2], idlers[COUNT // 2 :]
    listener.settle()  # a broker that is killed before it has written down what was just registered does not know of it
    unpinned.kill_broker()
    unpinned.kill_agent("v")
    end(lab, unseen)
    unpinned.start_broker()
    unpinned.restart_agent("v")
    check(lab, listener, "v", unseen, alive)


def test_a_ring_that_was_full(unpinned: Rig, lab: Lab) -> None:
    """Their ends found no room."""
    rig = unpinned
    idlers, listener = watched(rig, lab, "s")
    unseen, alive = idlers[: COUNT // 2], idlers[COUNT // 2 :]
    # What a process's own entry asks for fills the ring to its end.
    flood = rig.pace(lab, "s", count=600, mix="f")
    follow = rig.listener(lab, flood.tree)
    with rig.agent_stopped("s"):
        flood.go()
        truth = flood.done()
        end(lab, unseen)
    check(lab, listener, "s", unseen, alive)
    assert {gap["reason"] for gap in listener.account.gaps} == {"RING"}
    follow.wait_end_of(flood.pid)
    account = follow.account.read()
    assert account.wrong == []
    assert account.told["s"] <= truth.counts


def test_a_reboot(unpinned: Rig, lab: Lab) -> None:
    """Another boot id: all that was watched is gone, though another process may have its pid."""
    rig = unpinned
    rig.node("r", pin=False)
    idlers, listener = watched(rig, lab, "r")
    start = listener.said
    rig.kill_agent("r")
    # For the processes of the machine it is no reboot: they are strangers now, who have the pids of those that were watched.
    rig.reboot("r", str(uuid.UUID(int=0x0B00_7 << 64, version=4)))
    listener.wait_change("r", "REBOOTED", start=start)
    for idler in idlers:
        listener.wait_end_of(idler.pid)
    end(lab, idlers)
    fence = rig.idler(lab, "r")
    last = rig.listener(lab, {"node": "r", "pid": fence.pid, "events": "exit"})
    fence.end(9)
    lab.stop(fence)
    last.wait_end_of(fence.pid)
    listener.settle()
    account = listener.account.read()
    assert account.wrong == []
    assert sorted(account.ends["r"]) == sorted((idler.pid, None) for idler in idlers)
    assert account.ends["r"].total() == COUNT
