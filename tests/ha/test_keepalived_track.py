# SPDX-License-Identifier: Apache-2.0
"""The verdict on a track file, by cases and by its laws. No clock, no file: `now` is a number."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmonitor.clients.ha.keepalived import Opinion, Policy, Sight, Track, WhenBlind, opinion

ALIVE, DEAD, BLIND = Sight.ALIVE, Sight.DEAD, Sight.BLIND
SIGHTS = st.sampled_from(Sight)
ORDER = {DEAD: 0, BLIND: 1, ALIVE: 2}
POLICIES = st.builds(
    Policy,
    st.integers(1, 3),
    st.sampled_from(WhenBlind),
    blind_after=st.sampled_from([0.0, 3.0]),
    up_delay=st.sampled_from([0.0, 2.0]),
    down_delay=st.sampled_from([0.0, 1.0, 4.0]),
)
Step = tuple[float, str, Sight]
STEPS = st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.5, 6.0]), st.sampled_from("abc"), SIGHTS), max_size=25)
"""After so many seconds this is seen of that one."""
SAID = st.sampled_from([None, True, False])
LONG = 20.0
"""More than all delays together."""


def track(policy: Policy, *, names: str = "abc", said: bool | None = None) -> Track:
    return Track(policy, names, 0.0, said=said)


def seen(of: Track, now: float, **sights: Sight) -> float:
    """Take these, then look."""
    for name, sight in sights.items():
        of.take(name, sight, now)
    return of.look(now)


@pytest.mark.parametrize(
    ("quorum", "sights", "expected"),
    [
        (2, [ALIVE, ALIVE, DEAD], Opinion.UP),
        (2, [ALIVE, ALIVE, BLIND], Opinion.UP),
        (2, [ALIVE, BLIND, DEAD], Opinion.UNSURE),
        (2, [BLIND, DEAD, DEAD], Opinion.DOWN),
        (3, [ALIVE, ALIVE, BLIND], Opinion.UNSURE),
        (3, [BLIND, BLIND, DEAD], Opinion.DOWN),
        (1, [BLIND, DEAD, DEAD], Opinion.UNSURE),
    ],
)
def test_those_out_of_sight_count_only_if_it_depends_on_them(quorum: int, sights: list[Sight], expected: Opinion) -> None:
    assert opinion(quorum, sights) is expected


@pytest.mark.parametrize(
    ("when", "said", "expected"),
    [
        (WhenBlind.DOWN, None, False),
        (WhenBlind.DOWN, True, False),
        (WhenBlind.UP, None, True),
        (WhenBlind.UP, False, True),
        (WhenBlind.KEEP, None, False),
        (WhenBlind.KEEP, False, False),
        (WhenBlind.KEEP, True, True),
    ],
)
def test_before_the_first_verdict(when: WhenBlind, said: bool | None, expected: bool) -> None:
    fresh = track(Policy(1, when), said=said)
    assert fresh.look(0.0) == math.inf
    assert fresh.up is expected
    fresh.look(1000.0)
    assert fresh.up is expected


def test_a_death_counts_at_once() -> None:
    of = track(Policy(1, WhenBlind.DOWN), names="a")
    assert seen(of, 1.0, a=ALIVE) == math.inf
    assert of.up
    assert seen(of, 2.0, a=DEAD) == math.inf
    assert not of.up


def test_up_waits_for_its_delay_anew_after_each_death() -> None:
    of = track(Policy(1, WhenBlind.DOWN, up_delay=2.0), names="a")
    assert seen(of, 1.0, a=ALIVE) == 3.0
    assert seen(of, 2.0, a=DEAD) == math.inf
    assert seen(of, 2.5, a=ALIVE) == 4.5
    assert of.look(4.4) == 4.5
    assert not of.up
    assert of.look(4.5) == math.inf
    assert of.up


def test_down_waits_for_its_delay_and_is_forgotten_if_it_comes_back() -> None:
    of = track(Policy(1, WhenBlind.KEEP, down_delay=2.0), names="a")
    seen(of, 0.0, a=ALIVE)
    assert seen(of, 1.0, a=DEAD) == 3.0
    assert seen(of, 2.9, a=ALIVE) == math.inf
    assert of.up
    assert seen(of, 5.0, a=DEAD) == 7.0
    of.look(7.0)
    assert not of.up


def test_blindness_in_between_gives_no_new_delay_to_a_death() -> None:
    of = track(Policy(1, WhenBlind.DOWN, blind_after=5.0, down_delay=2.0), names="a")
    seen(of, 0.0, a=ALIVE)
    seen(of, 1.0, a=DEAD)
    assert seen(of, 2.0, a=BLIND) == 7.0
    assert seen(of, 3.5, a=DEAD) == math.inf
    assert not of.up


@pytest.mark.parametrize(("when", "at_8"), [(WhenBlind.DOWN, False), (WhenBlind.KEEP, True), (WhenBlind.UP, True)])
def test_blindness_is_borne_for_a_while(when: WhenBlind, at_8: bool) -> None:
    of = track(Policy(2, when, blind_after=5.0))
    seen(of, 1.0, a=ALIVE, b=ALIVE, c=DEAD)
    due = seen(of, 2.0, a=BLIND)
    assert due == (7.0 if when is WhenBlind.DOWN else math.inf)
    of.look(6.9)
    assert of.up
    of.look(8.0)
    assert of.up is at_8
    seen(of, 9.0, b=DEAD)  # now it no longer depends on who is not seen
    assert not of.up


def test_a_second_one_out_of_sight_does_not_begin_it_anew() -> None:
    of = track(Policy(3, WhenBlind.DOWN, blind_after=5.0))
    seen(of, 0.0, a=ALIVE, b=ALIVE, c=ALIVE)
    assert seen(of, 1.0, a=BLIND) == 6.0
    assert seen(of, 4.0, b=BLIND) == 6.0
    assert seen(of, 5.0, a=ALIVE) == 6.0


def test_a_delay_that_was_due_before_the_news_is_not_lost() -> None:
    of = track(Policy(1, WhenBlind.KEEP, up_delay=2.0), names="a")
    seen(of, 0.0, a=ALIVE)
    of.take("a", BLIND, 3.0)  # it had been up since 2.0, had anybody looked
    of.look(3.0)
    assert of.up


@pytest.mark.parametrize("quorum", [0, 4])
def test_a_quorum_that_cannot_be(quorum: int) -> None:
    with pytest.raises(ValueError, match="quorum"):
        track(Policy(quorum, WhenBlind.KEEP))


@given(st.lists(st.tuples(SIGHTS, SIGHTS), min_size=1, max_size=6), st.data())
def test_more_alive_is_never_less(pairs: list[tuple[Sight, Sight]], data: st.DataObject) -> None:
    quorum = data.draw(st.integers(1, len(pairs)))
    lower = [min(pair, key=ORDER.__getitem__) for pair in pairs]
    upper = [max(pair, key=ORDER.__getitem__) for pair in pairs]
    assert opinion(quorum, lower) <= opinion(quorum, upper)


@given(st.lists(SIGHTS, min_size=1, max_size=6), st.data())
def test_a_higher_quorum_is_never_more(sights: list[Sight], data: st.DataObject) -> None:
    quorum = data.draw(st.integers(1, len(sights)))
    assert opinion(len(sights), sights) <= opinion(quorum, sights) <= opinion(1, sights)


@given(st.lists(SIGHTS, min_size=1, max_size=6), st.data())
def test_sure_is_what_holds_whatever_the_blind_ones_are(sights: list[Sight], data: st.DataObject) -> None:
    quorum = data.draw(st.integers(1, len(sights)))
    worst = [DEAD if each is BLIND else each for each in sights]
    best = [ALIVE if each is BLIND else each for each in sights]
    ends = {opinion(quorum, worst), opinion(quorum, best)}
    assert opinion(quorum, sights) is (ends.pop() if len(ends) == 1 else Opinion.UNSURE)


@dataclass(frozen=True)
class Moment:
    """After a look."""

    at: float
    opinion: Opinion
    up: bool


class Played:
    """Steps, played as the command does: a look after each, and one whenever it is due."""

    def __init__(self, policy: Policy, steps: list[Step], said: bool | None = None) -> None:
        self.of = track(policy, said=said)
        self.now = 0.0
        self.moments = [Moment(0.0, self.of.opinion, self.of.up)]
        due = self._look()
        for after, name, sight in steps:
            due = self._until(self.now + after, due)
            self.of.take(name, sight, self.now)
            due = self._look()
        self._until(self.now + LONG, due)

    def _until(self, then: float, due: float) -> float:
        while due <= then:
            assert due > self.now  # else it would be looked at for ever
            self.now = due
            due = self._look()
        self.now = then
        return due

    def _look(self) -> float:
        due = self.of.look(self.now)
        self.moments.append(Moment(self.now, self.of.opinion, self.of.up))
        return due

    def changes(self) -> list[int]:
        """Indices of the moments at which another thing was said than before."""
        return [index + 1 for index, (old, new) in enumerate(pairwise(self.moments)) if old.up != new.up]

    def since(self, index: int, *opinions: Opinion) -> float:
        """For how long it has been one of these, at a moment; -1 if it is not."""
        run = list(takewhile(lambda moment: moment.opinion in opinions, reversed(self.moments[: index + 1])))
        return self.moments[index].at - run[-1].at if run else -1.0


@given(POLICIES, STEPS, SAID)
def test_it_ends_where_its_policy_says(policy: Policy, steps: list[Step], said: bool | None) -> None:
    played = Played(policy, steps, said)
    last = [moment.up for moment in played.moments if moment.opinion is not Opinion.UNSURE][-1:] or [policy.at_first(said)]
    expected = {
        Opinion.UP: True,
        Opinion.DOWN: False,
        Opinion.UNSURE: {WhenBlind.DOWN: False, WhenBlind.UP: True, WhenBlind.KEEP: last[0]}[policy.when_blind],
    }
    assert played.of.up is expected[played.of.opinion]


@given(POLICIES, STEPS, SAID)
def test_fail_safe_is_up_only_shortly_after_the_quorum_was_seen(policy: Policy, steps: list[Step], said: bool | None) -> None:
    policy = replace(policy, when_blind=WhenBlind.DOWN)
    played = Played(policy, steps, said)
    for index, moment in enumerate(played.moments):
        if moment.up:
            assert any(before.opinion is Opinion.UP for before in played.moments[: index + 1])
            assert played.since(index, Opinion.DOWN, Opinion.UNSURE) <= policy.down_delay + policy.blind_after


@given(POLICIES, STEPS, SAID)
def test_fail_static_moves_only_on_what_is_sure(policy: Policy, steps: list[Step], said: bool | None) -> None:
    played = Played(replace(policy, when_blind=WhenBlind.KEEP), steps, said)
    for index in played.changes():
        moment = played.moments[index]
        assert moment.opinion is (Opinion.UP if moment.up else Opinion.DOWN)


@given(POLICIES, STEPS, SAID)
def test_nothing_is_said_before_its_delay(policy: Policy, steps: list[Step], said: bool | None) -> None:
    played = Played(policy, steps, said)
    for index in played.changes():
        moment = played.moments[index]
        if moment.opinion is Opinion.UNSURE:
            assert policy.when_blind is (WhenBlind.UP if moment.up else WhenBlind.DOWN)
            assert played.since(index, Opinion.UNSURE) >= policy.blind_after
        elif moment.up:
            assert played.since(index, Opinion.UP) >= policy.up_delay
        else:
            assert played.since(index, Opinion.DOWN, Opinion.UNSURE) >= policy.down_delay


@given(POLICIES, STEPS, SAID)
def test_when_to_look_again_misses_nothing(policy: Policy, steps: list[Step], said: bool | None) -> None:
    """One who looks all the time sees no other changes than one who looks when he is told to."""
    played = Played(policy, steps, said)
    expected = [(played.moments[index].at, played.moments[index].up) for index in played.changes()]
    eager = track(policy, said=said)
    eager.look(0.0)
    changes: list[tuple[float, bool]] = []
    now = 0.0

    def look() -> None:
        before = eager.up
        eager.look(now)
        if eager.up is not before:
            changes.append((now, eager.up))

    look()
    for after, name, sight in [*steps, (LONG, "", None)]:
        then = now + after
        while now + 0.25 <= then:
            now += 0.25  # all times here are multiples of this, and exact as floats
            look()
        if sight is not None:
            eager.take(name, sight, now)
            look()
    assert changes == expected
