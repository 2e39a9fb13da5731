# SPDX-License-Identifier: Apache-2.0
"""The tables that registrations are kept in, against naive ones."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kmonitor.broker.keys import Key, parse_key
from kmonitor.broker.multimap import Multimap
from kmonitor.broker.registered import Registered
from kmonitor.broker.registrations import Registration, make_registration
from kmonitor.v1 import monitor_pb2


@given(st.lists(st.tuples(st.sampled_from(["add", "discard", "pop"]), st.integers(1, 3), st.integers(1, 4))))
def test_multimap(steps: list[tuple[str, int, int]]) -> None:
    found: Multimap[int, int] = Multimap()
    naive: dict[int, list[int]] = {}
    for step, key, value in steps:
        if step == "add" and value not in naive.setdefault(key, []):
            naive[key].append(value)
        elif step == "discard" and value in naive.get(key, []):
            naive[key].remove(value)
        elif step == "pop":
            assert list(found.pop(key)) == naive.pop(key, [])
        if step != "pop":
            getattr(found, step)(key, value)
        naive = {key: values for key, values in naive.items() if values}
        assert {key: list(found[key]) for key in found} == naive
        assert (len(found), sorted(found.keys())) == (len(naive), sorted(naive))
        assert sorted(found.values()) == sorted(value for values in naive.values() for value in values)
        assert list(found.get(4)) == []


def registration(pid: int, request_id: int) -> Registration:
    message = monitor_pb2.Registration(target=monitor_pb2.Target(process=monitor_pb2.ProcessTarget(pid=pid)), event_mask=0x40)
    return make_registration(None, request_id, parse_key(message), message)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 4), st.integers(0, 4))))
def test_registered(steps: list[tuple[bool, int, int]]) -> None:
    found = Registered()
    naive: dict[int, Registration] = {}
    for adds, pid, request_id in steps:
        if adds and not found.uses(request_id):
            made = registration(pid, request_id)
            assert found.add(made) == (pid not in naive)
            naive.setdefault(pid, made)
        elif not adds:
            assert found.remove(naive.get(pid) or registration(pid, 0)) == (naive.pop(pid, None) is not None)
        assert list(found.values()) == list(naive.values())
        for number in range(5):
            assert found.uses(number) == any(each.id == number for each in naive.values())


def test_a_registration_says_again_what_was_asked_for() -> None:
    message = monitor_pb2.Registration(event_mask=0x7F, follow=True)
    message.nodes.names.extend(["b", "a*"])
    message.nodes.labels["rack"] = "1"
    message.target.process.pid, message.target.process.start_time, message.target.process.boot_id = 7, 8, "b"
    message.filter.comms.append("sh")
    made = make_registration(None, 1, parse_key(message), message, 0x40)
    assert (made.target, made.message().event_mask) == (message.target, 0x40)
    assert parse_key(made.message()) == made.key
    assert parse_key(made.message()).terms is made.key.terms
    for target in (monitor_pb2.Target(unit="nginx"), monitor_pb2.Target(cgroup="/a//b"), monitor_pb2.Target(pidfile="/run/x"), None):
        message = monitor_pb2.Registration(event_mask=1, target=target)
        made = make_registration(None, 1, parse_key(message), message)
        assert made.target == (target or monitor_pb2.Target())
        assert parse_key(made.message()) == made.key


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3), st.lists(st.sampled_from(["a", "b", "c", "*"]), max_size=3))))
def test_registered_about_a_node(steps: list[tuple[bool, int, list[str]]]) -> None:
    """Exactly those that select it, of those without labels."""
    found = Registered()
    naive: dict[Key, Registration] = {}
    for number, (adds, pid, names) in enumerate(steps):
        message = monitor_pb2.Registration(target=monitor_pb2.Target(process=monitor_pb2.ProcessTarget(pid=pid)), event_mask=0x40)
        message.nodes.names.extend(names)
        made = make_registration(None, number, parse_key(message), message)
        if adds:
            found.add(naive.setdefault(made.key, made))
        elif made.key in naive:
            found.remove(naive.pop(made.key))
        for node in ("a", "b", "d"):
            wanted = {each.id for each in naive.values() if each.key.terms.selects(node, {})}
            told = [each.id for each in found.about(node)]
            assert set(told) == wanted
            assert len(told) == len(wanted)
    found.clear()
    assert not list(found.about("a"))
