# SPDX-License-Identifier: Apache-2.0
"""What a guard makes of what it is told, case by case: one subject, notices in, verdicts out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from kmonitor.clients import (
    Blindness,
    Certainty,
    Death,
    Disconnected,
    Event,
    Fresh,
    Gap,
    GapReason,
    KilledBy,
    Life,
    Members,
    NodeChange,
    NodeProgress,
    NodeState,
    Process,
    Progress,
    Reconnected,
    Registered,
    RegistrationState,
    Stale,
    Subject,
    Verdict,
)
from kmonitor.clients.guard_queue import VerdictQueue
from kmonitor.clients.guarded import Clocks, Guarded, Look
from kmonitor.clients.guarded_group import LIST_EVERY, GuardedGroup
from kmonitor.clients.guarded_process import GuardedProcess
from kmonitor.clients.identity import Identity
from tests.clients.fake_broker import ABORT, BOOT, EPOCH, EXEC, EXIT, FORK
from tests.clients.fake_broker import event as raw_event

State = RegistrationState
PID = Subject("s", "web1", pid=11)
FILE = Subject("s", "web1", pidfile="/run/x.pid")
UNIT = Subject("s", "web1", unit="x.service")
GROUP_ID, BELOW = 55, 56

_seconds = itertools.count(1)
CLOCKS = Clocks(lambda: float(next(_seconds)), lambda: 1000, lambda boot_id: 7 if boot_id == BOOT else None)


def process(pid: int, *, start: int = 0, comm: str = "sleep", boot_id: str = BOOT, threads: int = 1, cgroup_id: int = GROUP_ID) -> Process:
    return Process(pid, 1, 0, 0, comm, start or pid * 1000, cgroup_id, threads, boot_id)


def answer(state: State, found: Process | None = None, *, error: str | None = None, position: int = 100) -> Registered:
    return Registered(1, 1, "web1", state, found, EPOCH, position, 0, 0x40, "", error, BOOT)


def event(kind: int, pid: int, *, boot_id: str = BOOT, **fields: Any) -> Event:
    return Event("web1", EPOCH, raw_event(200, kind, pid, **fields), boot_id)


def progress(position: int = 1000) -> Progress:
    return Progress((NodeProgress("web1", EPOCH, position, 5000),))


def change(state: NodeState) -> NodeChange:
    return NodeChange("web1", state, 1, BOOT, "a reason", ())


GAP = Gap("web1", GapReason.RING, EPOCH, 1, 2, 3, 4, ())
CUT = Disconnected("b:1", "gone")
BACK = Reconnected("b:1", 1, 1.0)


def play(guarded: Guarded, *items: Any) -> list[Verdict]:
    return [verdict for item in items for verdict in guarded.take(item)]


def short(verdicts: Iterable[Verdict]) -> list[str]:
    """`alive`, `dead inferred`, `alive (gap)`."""
    return [
        verdict.life.value
        + (" inferred" if verdict.certainty is Certainty.INFERRED else "")
        + (f" ({verdict.blind.value})" if verdict.blind else "")
        for verdict in verdicts
    ]


def running(subject: Subject = PID, pid: int = 11) -> GuardedProcess:
    guarded = GuardedProcess(subject, CLOCKS)
    assert short(play(guarded, answer(State.RUNNING, process(pid)))) == ["alive"]
    return guarded


# ---- deaths, for people


def death(**fields: Any) -> Death:
    return Death(Identity(BOOT, 1, 2), "x", 3, **fields)


@pytest.mark.parametrize(
    ("told", "text", "failed"),
    [
        (death(exit_code=3), "exit code 3", True),
        (death(exit_code=0), "exit code 0", False),
        (death(exit_signal=9, killed_by=KilledBy(4711, "bash", 0)), "killed by SIGKILL from pid 4711 (bash), uid 0", True),
        (death(exit_signal=9, killed_by=KilledBy(0, "bash", 5)), "killed by SIGKILL from bash outside, uid 5", True),
        (death(exit_signal=11, core_dumped=True, killed_by=KilledBy(0, "", 0)), "killed by SIGSEGV, core dumped", True),
        (death(exit_signal=9, oom_killed=True), "killed by SIGKILL: out of memory", True),
        (death(exit_signal=40), "killed by signal 40", True),
        (death(inferred=True), "end not seen", True),
    ],
)
def test_a_death_in_words(told: Death, text: str, failed: bool) -> None:
    assert (str(told), told.failed) == (text, failed)


# ---- a pid


def test_a_pid_to_its_end() -> None:
    guarded = running()
    first = guarded.verdict
    assert (first.since_unix_nano, first.alive, first.number) == (11_007, 1, 1)
    [dead] = play(guarded, event(ABORT, 11, exit_signal=9), event(EXIT, 11, exit_signal=9, killed_by=None))
    assert (dead.life, dead.certainty, dead.alive, dead.process) == (Life.DEAD, Certainty.SEEN, 0, first.process)
    assert dead.death is not None
    assert (dead.death.exit_signal, dead.death.process, dead.since_unix_nano) == (9, Identity(BOOT, 11, 11000), dead.death.time_unix_nano)
    assert guarded.over
    after = (CUT, BACK, GAP, change(NodeState.UNREACHABLE), answer(State.RUNNING, process(11, start=9)), progress(), event(EXIT, 11))
    assert play(guarded, *after) == []


@pytest.mark.parametrize("item", [event(EXIT, 11, start_time=5), event(EXIT, 11, boot_id="other"), event(EXIT, 12), event(EXEC, 11)])
def test_the_end_of_another_process_is_no_death(item: Event) -> None:
    assert play(running(), item) == []


@pytest.mark.parametrize("state", [State.EXITED, State.NOT_FOUND])
def test_a_pid_that_is_not_there(state: State) -> None:
    guarded = GuardedProcess(PID, CLOCKS)
    [verdict] = play(guarded, answer(state))
    assert (verdict.life, verdict.blind, guarded.over) == (Life.ABSENT, None, True)
    assert verdict.reason


def test_gone_while_nobody_looked_and_its_exit_is_in_the_log() -> None:
    for order in ((event(EXIT, 11), answer(State.EXITED)), (answer(State.EXITED), progress(), event(EXIT, 11), progress())):
        guarded = running()
        assert short(play(guarded, CUT, BACK, *order))[-1] == "dead"
        assert guarded.verdict.death == Death.of(event(EXIT, 11))


def test_gone_while_nobody_looked_and_nobody_knows_how() -> None:
    guarded = running()
    assert short(play(guarded, CUT, BACK, answer(State.EXITED), progress())) == ["alive (disconnected)", "alive (gap)"]
    assert short(play(guarded, progress())) == ["dead inferred"]
    assert str(guarded.verdict.death) == "end not seen"
    # An exit that comes after all says more of the same death.
    assert play(guarded, event(EXIT, 11, inferred=True)) == []
    assert short(play(guarded, event(EXIT, 11, exit_code=3))) == ["dead"]
    assert play(guarded, event(EXIT, 11, exit_code=3)) == []


def test_another_process_has_the_pid_when_sight_is_back() -> None:
    guarded = running()
    assert short(play(guarded, CUT, BACK, answer(State.RUNNING, process(11, start=99)))) == ["alive (disconnected)", "dead inferred"]
    assert (guarded.over, guarded.leave) == (True, True)


def test_the_node_was_rebooted() -> None:
    guarded = running()
    told = play(guarded, change(NodeState.REBOOTED), event(EXIT, 11, inferred=True), answer(State.EXITED))
    assert short(told) == ["dead inferred"]
    # The same pid and start time in the next boot: another process.
    guarded = running()
    assert short(play(guarded, answer(State.RUNNING, process(11, boot_id="next")))) == ["dead inferred"]


# ---- a pidfile


@pytest.mark.parametrize("subject", [PID, FILE])
def test_an_exit_that_comes_before_the_answer(subject: Subject) -> None:
    """Behind a cursor that may be: it ran when its node was asked, and had ended when the log was read."""
    guarded = GuardedProcess(subject, CLOCKS)
    other = [event(EXIT, pid) for pid in range(100, 200)]
    told = play(guarded, event(EXIT, 11, start_time=5), event(EXIT, 11, exit_code=3), *other, answer(State.RUNNING, process(11)))
    assert short(told) == ["alive", "dead"]
    assert str(guarded.verdict.death) == "exit code 3"
    assert guarded.over == (subject is PID)


def test_a_pidfile_that_is_written_again_and_again() -> None:
    guarded = GuardedProcess(FILE, CLOCKS)
    assert short(play(guarded, answer(State.NOT_FOUND))) == ["absent"]
    assert guarded.look is Look.LATER
    assert guarded.refused("node web1: pidfile '/run/x.pid' is empty", by_node=True) == []
    assert guarded.verdict.reason == "node web1: pidfile '/run/x.pid' is empty"
    assert short(play(guarded, answer(State.RUNNING, process(11)), event(EXIT, 11, exit_code=1))) == ["alive", "dead"]
    guarded.look = Look.NO
    # The file names the dead one still; then another's pid; then the same pid again.
    assert play(guarded, answer(State.RUNNING, process(11))) == []
    assert guarded.look is Look.LATER
    assert play(guarded, answer(State.EXITED), answer(State.NOT_FOUND)) == []
    assert short(play(guarded, answer(State.RUNNING, process(11, start=20_000)))) == ["alive"]
    assert guarded.verdict.death is None
    assert not guarded.over


def test_a_pidfile_that_names_another_while_nobody_looked() -> None:
    told = play(running(FILE), CUT, answer(State.RUNNING, process(12)))
    assert short(told) == ["alive (disconnected)", "dead inferred", "alive"]
    assert [verdict.process and verdict.process.pid for verdict in told] == [11, 11, 12]


def test_a_daemon_that_restarts_for_months_leaves_nothing() -> None:
    guarded = running(FILE)

    def size() -> int:
        values = [getattr(guarded, name) for name in vars(guarded)]
        return sum(len(value) for value in values if isinstance(value, dict | list | set))

    before = size()
    for start in range(20_000, 24_000):
        pid = start % 30_000 + 1
        last = guarded.process
        assert last is not None
        guarded.take(event(EXIT, last.pid, start_time=last.start_time))
        guarded.take(answer(State.RUNNING, process(pid, start=start)))
    assert guarded.verdict.number == 8_001
    assert size() == before


# ---- sight


def test_the_gravest_of_several_causes_is_told() -> None:
    guarded = running()
    told = play(guarded, GAP, Stale("web1", 3.0), change(NodeState.UNREACHABLE), CUT)
    assert short(told) == ["alive (gap)", "alive (stale)", "alive (unreachable)", "alive (disconnected)"]
    assert len({verdict.blind_since for verdict in told}) == 1
    assert short(play(guarded, BACK, answer(State.RUNNING, process(11)), Fresh("web1", 4.0))) == ["alive (stale)", "alive"]
    assert (guarded.verdict.blind_since, guarded.verdict.reason) == (0.0, "")


def test_a_node_that_is_back_is_not_seen_before_it_has_answered() -> None:
    guarded = running()
    assert short(play(guarded, change(NodeState.UNREACHABLE), change(NodeState.UP), progress())) == ["alive (unreachable)"]
    assert guarded.look is Look.NOW
    assert guarded.verdict.reason == "a reason"
    assert short(play(guarded, answer(State.RUNNING, process(11)))) == ["alive"]


def test_a_gap_hides_an_end_until_it_was_looked_for() -> None:
    guarded = running()
    assert short(play(guarded, GAP, progress())) == ["alive (gap)"]
    assert guarded.look is Look.NOW
    assert short(play(guarded, answer(State.EXITED), progress(), progress())) == ["dead inferred"]


def test_nobody_has_answered() -> None:
    guarded = GuardedProcess(PID, CLOCKS)
    assert (guarded.verdict.life, guarded.verdict.blind, guarded.answered) == (Life.UNKNOWN, Blindness.STARTING, False)
    assert short(play(guarded, answer(State.NODE_UNREACHABLE))) == ["unknown (unreachable)"]
    assert guarded.answered
    assert short(play(guarded, answer(State.RUNNING, process(11)))) == ["alive"]


def test_a_broker_that_does_not_know_the_node_is_asked_again() -> None:
    guarded = running()
    assert short(guarded.refused("there is no node web1", by_node=False)) == ["alive (unreachable)"]
    assert guarded.look is Look.LATER
    # A pidfile that was not looked at is not a missing one.
    assert short(GuardedProcess(FILE, CLOCKS).refused("there is no node web1", by_node=False)) == ["unknown (unreachable)"]


def test_a_node_that_was_removed() -> None:
    guarded = running(FILE)
    assert short(play(guarded, change(NodeState.GONE), CUT)) == ["alive (gone)"]
    guarded.refused("there is no such node", by_node=False)
    assert not guarded.wants_something


# ---- a group


def group(*members: Process, subject: Subject = UNIT) -> GuardedGroup:
    guarded = GuardedGroup(subject, CLOCKS)
    assert play(guarded, answer(State.ARMED)) == []
    assert (guarded.wants_list, guarded.answered) == (Look.NOW, False)
    guarded.listing()
    guarded.listed(listed(*members))
    assert guarded.answered
    return guarded


def listed(*members: Process, position: int = 500) -> Members:
    return Members(members, (GROUP_ID,), EPOCH, position)


def fork(pid: int, child: int, **fields: Any) -> Event:
    return event(FORK, pid, child_pid=child, child_tid=child, child_start_time=child * 1000, **fields)


def counts(verdicts: Iterable[Verdict]) -> list[tuple[str, int, int]]:
    return [(verdict.life.value, verdict.alive, verdict.process.pid if verdict.process else 0) for verdict in verdicts]


def test_an_empty_group_and_one_that_is_not_there() -> None:
    assert short(group().told()) == ["absent"]
    guarded = GuardedGroup(UNIT, CLOCKS)
    assert short(play(guarded, answer(State.NOT_FOUND))) == ["absent"]
    assert (guarded.verdict.reason, guarded.look) == ("the unit does not run", Look.LATER)


def test_members_come_and_go() -> None:
    guarded = group(process(20), process(11), process(30, threads=0))
    assert counts(guarded.told()) == [("alive", 2, 11)]
    told = play(guarded, fork(20, 40), event(EXIT, 20), event(EXIT, 11, exit_code=3), event(EXIT, 40, exit_signal=15))
    assert counts(told) == [("alive", 3, 11), ("alive", 2, 11), ("alive", 1, 40), ("dead", 0, 40)]
    assert str(told[-1].death) == "exit code 3"  # of the oldest, which ended before the last
    # Nobody has removed the group: it comes to life with the next.
    assert counts(play(guarded, event(EXEC, 50))) == [("alive", 1, 50)]
    assert guarded.verdict.death is None


def test_what_happens_while_the_list_is_made() -> None:
    """An exit of one that the list still has; a fork whose child the list has, too; a child that it does not have yet."""
    guarded = GuardedGroup(UNIT, CLOCKS)
    play(guarded, answer(State.ARMED))
    guarded.listing()
    assert play(guarded, event(EXIT, 12), fork(11, 13), fork(11, 14), event(EXIT, 14), fork(77, 78, cgroup_id=99)) == []
    guarded.listed(listed(process(11), process(12), process(13), process(14)))
    assert counts(guarded.told()) == [("alive", 2, 11)]
    # The same once it is known whose events are whose.
    guarded.listing()
    assert counts(play(guarded, event(EXIT, 13), fork(11, 15), event(EXEC, 11, comm="new"))) == [("alive", 1, 11), ("alive", 2, 11)]
    guarded.listed(listed(process(11, comm="old"), process(13)))
    assert guarded.told() == []
    play(guarded, progress())
    assert guarded.wants_pids == ()
    assert guarded.verdict.alive == 2


def test_who_is_missing_has_ended_or_has_left() -> None:
    guarded = group(process(11), process(12), process(13))
    guarded.told()
    guarded.listing()
    guarded.listed(listed(process(12), position=500))
    assert play(guarded, progress(499)) == []
    assert guarded.wants_pids == ()
    assert play(guarded, progress(500)) == []
    assert set(guarded.wants_pids) == {11, 13}
    guarded.found([process(13, cgroup_id=99), process(11, start=5)])
    assert counts(guarded.told()) == [("alive", 1, 12)]
    guarded.listing()
    guarded.listed(listed())
    play(guarded, progress())
    guarded.found([process(12, cgroup_id=99)])
    [left] = guarded.told()
    assert (left.life, left.reason) == (Life.ABSENT, "its processes are in another control group now")


def test_an_exit_that_comes_after_the_list() -> None:
    guarded = group(process(11))
    guarded.told()
    guarded.listing()
    guarded.listed(listed())
    assert short(guarded.told()) == ["alive (gap)"]  # it is not there any more, and nobody knows how it ended
    [ended] = play(guarded, event(EXIT, 11, exit_code=3))
    assert (short([ended]), str(ended.death)) == (["dead"], "exit code 3")
    assert play(guarded, progress()) == []
    assert guarded.wants_pids == ()


def test_a_gap_is_not_over_when_the_missing_are_accounted_for() -> None:
    guarded = group(process(11), process(12))
    guarded.told()
    guarded.listing()
    assert short(play(guarded, GAP)) == ["alive (gap)"]
    guarded.listed(listed())
    assert short(play(guarded, event(FORK, 12, child_pid=13, child_start_time=13000))) == ["alive (gap)"]  # one more
    assert guarded.look is Look.NOW


def test_a_unit_that_is_started_again() -> None:
    guarded = group(process(11))
    guarded.told()
    assert counts(play(guarded, event(EXIT, 11), answer(State.ARMED))) == [("dead", 0, 11)]
    guarded.listing()
    guarded.listed(Members((process(21, cgroup_id=66),), (66,), EPOCH, 900))
    assert counts(guarded.told()) == [("alive", 1, 21)]
    # It is stopped for good, and one of it was not seen to end.
    play(guarded, answer(State.EXITED), progress())
    assert (guarded.look, guarded.wants_pids) == (Look.LATER, (21,))
    guarded.found([])
    assert short(guarded.told()) == ["dead inferred"]


def test_groups_below_that_are_new() -> None:
    guarded = group(process(11))
    guarded.told()
    assert play(guarded, event(EXEC, 90, cgroup_id=BELOW)) == []
    assert guarded.wants_list is Look.LATER
    guarded.listing()
    guarded.listed(Members((process(11), process(90, cgroup_id=BELOW)), (GROUP_ID, BELOW), EPOCH, 500))
    assert counts(guarded.told()) == [("alive", 2, 11)]
    assert counts(play(guarded, event(EXEC, 91, cgroup_id=BELOW))) == [("alive", 3, 11)]
    # What belongs to another registration makes for one list, not for one each.
    play(guarded, event(EXEC, 95, cgroup_id=99))
    guarded.listing()
    guarded.listed(Members((process(11), process(90), process(91)), (GROUP_ID, BELOW), EPOCH, 500))
    play(guarded, event(EXEC, 95, cgroup_id=99))
    assert not guarded.wants_something


def test_names_count_as_they_are_at_the_time() -> None:
    guarded = group(process(11, comm="nginx"), process(12, comm="sh"), subject=Subject("s", "web1", cgroup="/x", comms=("ngin*",)))
    assert counts(guarded.told()) == [("alive", 1, 11)]
    told = play(
        guarded, fork(11, 13, comm="nginx"), event(EXEC, 13, comm="logger"), event(EXEC, 12, comm="nginx"), event(EXIT, 11, comm="nginx")
    )
    assert [verdict.alive for verdict in told] == [2, 1, 2, 1]
    [left] = play(guarded, event(EXEC, 12, comm="other"))
    assert (left.life, left.reason) == (Life.ABSENT, "its processes have other names now")


def test_a_group_and_its_sight() -> None:
    guarded = group(process(11))
    guarded.told()
    assert short(play(guarded, CUT, BACK, answer(State.ARMED))) == ["alive (disconnected)"]
    guarded.listing()
    # A gap behind the answer is not made good by the list that the answer asked for.
    play(guarded, GAP)
    guarded.listed(listed(process(11)))
    assert short(guarded.told()) == ["alive (gap)"]
    assert guarded.look is Look.NOW
    play(guarded, answer(State.ARMED))
    guarded.listing()
    guarded.listed(listed(process(11)))
    assert short(guarded.told()) == ["alive"]


def test_the_node_of_a_group_was_rebooted() -> None:
    guarded = group(process(11), process(12))
    guarded.told()
    assert short(play(guarded, change(NodeState.REBOOTED))) == ["dead inferred"]


def test_members_are_listed_now_and_then() -> None:
    guarded = group(process(11))
    wanted = []
    for _ in range(LIST_EVERY):
        play(guarded, progress())
        wanted.append(guarded.wants_list)
    assert wanted == [Look.NO] * (LIST_EVERY - 1) + [Look.LATER]
    # Whoever starts a process and then moves it there is not made to wait for so long.
    nobody = group()
    play(nobody, progress())
    assert nobody.wants_list is Look.LATER


def test_a_list_that_cannot_be_had_is_asked_for_again() -> None:
    guarded = GuardedGroup(UNIT, CLOCKS)
    play(guarded, answer(State.ARMED))
    guarded.listing()
    guarded.not_listed()
    assert (guarded.wants_list, guarded.answered) == (Look.LATER, False)


def test_a_group_that_forks_for_months_leaves_nothing() -> None:
    guarded = group(process(11))
    sizes: Callable[[], list[int]] = lambda: [len(value) for value in vars(guarded).values() if isinstance(value, dict | list | set)]  # noqa: E731
    before = sizes()
    for pid in range(20_000, 23_000):
        guarded.take(fork(11, pid))
        guarded.take(event(EXIT, pid))
    assert sizes() == before


# ---- the queue


def test_who_does_not_look_gets_the_last_count() -> None:
    guarded, queue = group(process(11)), VerdictQueue()
    said = [*guarded.told(), *play(guarded, *(fork(11, pid) for pid in range(20, 5_000)), GAP, event(EXIT, 20), event(EXIT, 21))]
    for verdict in said:
        queue.put(guarded, verdict)
    assert len(said) == 4_984
    assert [(verdict.alive, verdict.blind) for verdict in (queue.take(), queue.take())] == [(4_981, None), (4_979, Blindness.GAP)]
    assert not queue
    queue.put(guarded, said[0])
    assert queue.take().alive == 1
    for verdict in said:
        queue.put(guarded, verdict)
    queue.drop(guarded)
    assert not queue
