# SPDX-License-Identifier: Apache-2.0
"""How far a monitor has come: what moves a cursor, and what its file holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kmonitor.clients import Batch, Cursor, Deregistered, Gap, GapReason, NodeProgress, Process, Progress, Registered, UsageError
from kmonitor.clients import RegistrationState as State
from kmonitor.clients.identity import Identity
from kmonitor.clients.selection import Selection, key, registration
from tests.clients.fake_broker import ABORT, EXIT, event

U64 = st.integers(0, 2**64 - 1)
NAMES = st.sampled_from(["web1", "web2", "db1"])
PROCESSES = st.builds(Identity, st.sampled_from(["", "boot-1", "boot-2"]), st.integers(1, 2**31), U64)
SELECTIONS: list[Selection] = [
    {"node": "web1", "pid": 5},
    {"pid": 5, "start_time": 2**64 - 1},
    {"node": "web*", "pidfile": "/run/x.pid", "follow": True},
    {"node": "web1", "labels": {"a": "b"}, "pid": 5, "comms": ["a*"], "uids": [0, 2**32 - 1]},
]


def batch(*positions: int, node: str = "web1", epoch: int = 7) -> Batch:
    return Batch(node, epoch, [event(position, EXIT, 5) for position in positions])


def gap(to_position: int, *, number: int = 0, log_id: int = 0) -> Gap:
    return Gap("web1", GapReason.RING, 7, 1, to_position, 0, 0, (), number, log_id)


def running(what: Selection, node: str, process: Identity) -> Registered:
    found = Process(process.pid, 1, 0, 0, "sleep", process.start_time, 0, 1, process.boot_id)
    return Registered(1, 1, node, State.RUNNING, found, 7, 100, 0, 0x40, "", None, process.boot_id, registration(what))


@st.composite
def cursors(draw: st.DrawFn) -> Cursor:
    cursor = Cursor(draw(st.dictionaries(NAMES, st.tuples(U64, U64))), log_id=draw(U64), number=draw(U64), stream_id=draw(U64))
    for what in draw(st.lists(st.sampled_from(SELECTIONS))):
        cursor._is_of(registration(what), draw(NAMES), draw(PROCESSES))
    return cursor


@given(cursor=cursors())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_gives_back_what_was_saved(cursor: Cursor, tmp_path: Path) -> None:
    path = tmp_path / "cursor"
    cursor.save(path)
    again = Cursor.load(path)
    assert again == cursor == cursor.copy()
    assert (again.log_id, again.number, again.found()) == (cursor.log_id, cursor.number, cursor.found())
    assert again._ends_with == cursor._ends_with
    assert [file.name for file in tmp_path.iterdir()] == ["cursor"]


ITEMS = st.one_of(
    st.builds(lambda node, epoch, position: batch(position, node=node, epoch=epoch), NAMES, st.just(7), U64),
    st.builds(lambda position, number, log_id: gap(position, number=number, log_id=log_id), U64, U64, st.just(9)),
    st.builds(
        lambda node, position, number, log_id: Progress((NodeProgress(node, 7, position, 1),), number, log_id), NAMES, U64, U64, st.just(9)
    ),
    st.builds(
        lambda node, position: Registered(1, 1, node, State.ARMED, None, 7, position, 0, 0x40, "everything"),
        NAMES,
        st.integers(1, 2**64 - 1),
    ),
)


@given(items=st.lists(ITEMS))
def test_it_only_moves_forward(items: list[Batch | Gap | Progress | Registered]) -> None:
    """Within a node's epoch and within a log."""
    cursor = Cursor()
    for item in items:
        before = cursor.copy()
        cursor.take(item)
        assert cursor.number >= before.number
        assert all(cursor.positions()[node] >= at for node, at in before.positions().items())
        if isinstance(item, Batch):
            assert cursor.positions()[item.node][1] >= item.events[-1].position
        if isinstance(item, Gap) and item.number:
            assert (cursor.log_id, cursor.number >= item.number) == (9, True)


def test_the_number_of_another_log_starts_anew() -> None:
    cursor = Cursor()
    cursor.take(gap(512, number=40, log_id=9))
    cursor.take(Progress((), 30, 9))
    assert (cursor.log_id, cursor.number) == (9, 40)
    cursor.take(gap(600))  # of this stream alone
    assert (cursor.log_id, cursor.number, cursor.positions()) == (9, 40, {"web1": (7, 599)})
    cursor.take(Progress((), 3, 10))
    assert (cursor.log_id, cursor.number) == (10, 3)
    cursor.take(gap(700, number=2, log_id=11))
    proto = cursor.to_proto()
    assert (proto.log_id, proto.number, [at.position for at in proto.positions]) == (11, 2, [699])
    assert Cursor(log_id=11)  # a progress without nodes: that is something to go on behind
    assert not Cursor()


def test_inferred_events_move_it_as_others_do() -> None:
    cursor = Cursor({"web1": (7, 128)})
    cursor.take(Batch("web1", 7, [event(256, EXIT, 5, inferred=True)]))
    assert cursor.positions() == {"web1": (7, 256)}


def test_processes_are_forgotten_when_they_have_ended() -> None:
    """Where the registration is over with its process. Another boot's process is another one."""
    one, glob, follow = SELECTIONS[0], SELECTIONS[1], Selection(node="web1", pid=5, follow=True)
    cursor = Cursor()
    for what in (one, glob, follow):
        cursor.take(running(what, "web1", Identity("boot-1", 5, 5000)))
    cursor.forget_ended(Batch("web1", 7, (), "boot-2"), [event(128, EXIT, 5)])
    cursor.forget_ended(Batch("web2", 7, (), "boot-1"), [event(128, EXIT, 5)])
    cursor.forget_ended(Batch("web1", 7, (), "boot-1"), [event(128, ABORT, 5), event(128, EXIT, 5, start_time=1)])
    assert len(cursor.found()) == 3
    cursor.forget_ended(Batch("web1", 7, (), "boot-1"), [event(256, EXIT, 5)])
    assert cursor.found().keys() == {key(registration(glob)), key(registration(follow))}
    cursor.forget_deregistered(Deregistered(3, 1, 0x10, registration=registration(glob)))
    cursor.forget_deregistered(Deregistered(4, 1, 0, registration=registration(glob)))
    assert cursor.found().keys() == {key(registration(follow))}
    cursor.keep_only([registration(one)])
    assert (cursor.found(), cursor._ends_with) == ({}, {})


def test_files_of_other_versions(tmp_path: Path) -> None:
    path = tmp_path / "cursor"
    assert not Cursor.load(path)
    path.write_text('{"version": 1, "positions": [{"node": "web1", "epoch": 7, "position": 128}]}', encoding="utf-8")
    assert Cursor.load(path) == Cursor({"web1": (7, 128)})
    Cursor({"web1": (2**64 - 1, 2**63)}).save(path)
    good = json.loads(path.read_text())
    assert good["version"] == 2
    log, found = {"id": 1, "number": 1}, {"node": "a", "boot_id": "", "pid": 1, "start_time": 1}
    changes: list[dict[str, object]] = [
        {"version": 3},
        {"log": None},
        {"log": log | {"id": -1}},
        {"log": log | {"number": 2**64}},
        {"found": [{}]},
        {"found": 1},
        {"positions": [{"node": "a", "epoch": "x", "position": 1}]},
        {"positions": [{"node": "\ud800", "epoch": 1, "position": 1}]},
        {"found": [{"registration": {"no_such": 1}, "processes": []}]},
        {"found": [{"registration": {"target": {"pidfile": "/x"}}, "processes": [found | {"pid": 0}]}]},
        {"found": [{"registration": {"target": {"pidfile": "/x"}}, "processes": [found | {"pid": 2**63}]}]},
    ]
    damaged = ["", "{}", "[]", "null", '{"version": 1, "positions": [{"node": "a"}]}']
    damaged += [json.dumps(good | change) for change in changes]
    for text in damaged:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UsageError, match="holds no cursor"):
            Cursor.load(path)
    with pytest.raises(UsageError, match="cannot save the cursor"):
        Cursor().save(tmp_path / "none" / "cursor")
