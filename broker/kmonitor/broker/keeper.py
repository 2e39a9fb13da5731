# SPDX-License-Identifier: Apache-2.0
"""What a broker that is started again on its log must know: nodes, sessions, registrations and spans, as values in the log.

They are committed with the blocks, in the order in which things happened: a span that a record has opened or ended is in the log
if and only if the record is.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from kmonitor.broker.arms import Arms
from kmonitor.broker.block import Block
from kmonitor.broker.keys import Pidfile, Process, parse_key
from kmonitor.broker.log import End, EventLog
from kmonitor.broker.matching import Group, Span
from kmonitor.broker.nodes import LastRecord, Node
from kmonitor.broker.registrations import ArmState, Registration, make_registration
from kmonitor.broker.sessions import Session
from kmonitor.v1 import agent_pb2, monitor_pb2
from kmonitor.wire.errors import UsageError

NODES, SESSIONS, REGISTRATIONS, SPANS, GROUPS = "nodes", "sessions", "registrations", "spans", "groups"


class LogKeeper:
    """Writes it down as it changes, and reads it once."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._next_span = 1
        self._dirty: dict[Registration, None] = {}
        self._scheduled = False

    # -- as things happen

    def node_changed(self, node: Node) -> None:
        """It has connected, or has told of losses."""
        value = {
            "hello": node.hello.SerializeToString().hex(),
            "epoch": node.epoch,
            "expected": node.expected,
            "time_ns": node.time_ns,
            "since_ns": node.since_ns,
            "number": node.number,
            "lost": [[kind, watched, count] for (kind, watched), count in node.lost.items()],
            "secrets": {str(epoch): secret.hex() for epoch, secret in node.secrets.items()},
            "last": node.last and [node.last.position, node.last.end, node.last.crc],
        }
        self._log.put(NODES, node.name, _dump(value))

    def node_removed(self, name: str) -> None:
        """An operator removed it."""
        self._log.put(NODES, name, None)

    def group_changed(self, node: str, group: Group, above: tuple[int, ...] | None) -> None:
        """A control group that a node's records may name has become known, with those above it; or is known no more."""
        epoch, cgroup_id = group
        self._log.put(GROUPS, f"{node}/{epoch}/{cgroup_id}", None if above is None else _dump([node, epoch, cgroup_id, above]))

    def session_opened(self, session: Session) -> None:
        """From now on all of it is remembered."""
        session.keeper = self
        self.session_changed(session)

    def session_changed(self, session: Session) -> None:
        """It goes on with what another stream had."""
        self._log.put(
            SESSIONS,
            str(session.id),
            _dump(
                {
                    "linger": session.linger,
                    "stream_id": session.stream_id,
                    "remembers_from": session.matcher.remembers_from,
                    "absence": session.told_of_absence,
                }
            ),
        )

    def session_closed(self, session: Session) -> None:
        """It is over. Its registrations and spans are of no use any more."""
        self.write()  # what another one goes on with is there before
        session.keeper = None
        self._log.put(SESSIONS, str(session.id), None)
        for registration in (*session.registrations.values(), *session.past.values()):
            self._dirty.pop(registration, None)
            self._log.put(REGISTRATIONS, _key_of(registration), None)
        for span in session.matcher.all_spans():
            self.span_changed(session, span, there=False)

    def span_changed(self, session: Session, span: Span, *, there: bool) -> None:
        """It is there, or has ended (`there`), or is of no use any more."""
        if not there:
            if span.id:
                self._log.put(SPANS, str(span.id), None)
            return
        if span.id and span.lingers and span.end is not None:
            return  # that its process has ended is noted already: no record is its own from there on
        if not span.id:
            span.id = self._next_span
            self._next_span += 1
        self._log.put(SPANS, str(span.id), _pack_span(session, span))

    def registration_changed(self, registration: Registration) -> None:
        """Written at the end of this turn of the loop: one change seldom comes alone."""
        self._dirty[registration] = None
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self.write)

    def write(self) -> None:
        """What has changed."""
        self._scheduled = False
        for registration in self._dirty:
            session = registration.session
            assert isinstance(session, Session)
            is_known = session.registration_of(registration.key) is registration
            self._log.put(REGISTRATIONS, _key_of(registration), _pack_registration(registration) if is_known else None)
        self._dirty.clear()

    # -- once

    def groups(self, arms: Arms) -> None:
        """Make the control groups known that records may name: those in the log, and those that wait in the nodes' rings."""
        for value in self._log.values(GROUPS).values():
            node, epoch, *cgroup_ids, above = json.loads(value)
            arms.router.learn_group(node, epoch, [*cgroup_ids, *above])

    def nodes(self, arms: Arms) -> None:
        """Make the nodes of before, none of them connected."""
        for name, value in self._log.values(NODES).items():
            content = json.loads(value)
            node = arms.nodes.meet(name)
            node.hello = agent_pb2.Hello.FromString(bytes.fromhex(content["hello"]))
            node.labels = dict(node.hello.labels)
            node.epoch = content["epoch"]
            end = self._log.ends(name).get(node.epoch)
            node.starts_anew(max(content["expected"], end.position if end is not None else 0))
            node.time_ns, node.since_ns, node.number = content["time_ns"], content["since_ns"], content["number"]
            node.lost = {(kind, watched): count for kind, watched, count in content["lost"]}
            # Earlier versions wrote neither of these.
            node.secrets = {int(epoch): bytes.fromhex(secret) for epoch, secret in content.get("secrets", {}).items()}
            node.last = self._last_record(node, end) or (LastRecord(*content["last"]) if content.get("last") else None)

    def _last_record(self, node: Node, end: End | None) -> LastRecord | None:
        """The last that the log has of the node's epoch; None if its last entry is none with a record, or is gone."""
        for entry in () if end is None else self._log.read(end.offset, 1):
            if isinstance(entry, Block) and (entry.node, entry.epoch, entry.end) == (node.name, node.epoch, node.expected):
                return LastRecord.of(entry)
        return None

    def sessions(self, arms: Arms, open_session: Any) -> list[Session]:
        """Make the sessions of before, without streams. `open_session`: makes an empty one, given its linger in seconds."""
        sessions: dict[int, Session] = {}
        for key, value in self._log.values(SESSIONS).items():
            content = json.loads(value)
            session: Session = open_session(content["linger"])
            session.id = int(key)
            session.stream_id = session.outbox.stream_id = content["stream_id"]
            session.matcher.remembers_from = content["remembers_from"]
            for node, (epoch, first, until) in content.get("absence", {}).items():
                session.told_of_absence[node] = epoch, first, until
            sessions[session.id] = session
        registrations: dict[tuple[int, int], Registration] = {}
        for name, value in self._log.values(REGISTRATIONS).items():
            content = json.loads(value)
            owner = sessions.get(content["session"])
            registration = None if owner is None else _unpack_registration(owner, content)
            if registration is None or owner is None:
                self._log.put(REGISTRATIONS, name, None)
                continue
            registrations[content["session"], registration.serial] = registration
            if content["over"]:
                owner.past[registration.key] = registration
            else:
                owner.registrations.add(registration)
        spans = sorted((int(key), json.loads(value)) for key, value in self._log.values(SPANS).items())
        if spans:
            self._next_span = spans[-1][0] + 1
        self._open_spans(arms, registrations, spans)
        for session in sessions.values():
            session.keeper = self
        for registration in registrations.values():
            self._claim(arms, registration)
        return list(sessions.values())

    def _open_spans(self, arms: Arms, registrations: dict[tuple[int, int], Registration], spans: list[tuple[int, Any]]) -> None:
        ended: list[Span] = []
        for number, content in spans:
            registration = registrations.get((content[0], content[1]))
            if registration is None:
                self._log.put(SPANS, str(number), None)
                continue
            span = _unpack_span(registration, content)
            span.id = number
            if span.end is not None:
                ended.append(span)
                continue
            arms.router.add(span)
            if span.lingers:
                arms.router.linger(span, span.exit_ns)
            elif span.process is not None:
                span.arm.spans += 1
        for span in sorted(ended, key=lambda each: each.end_offset):
            if span.root and span.follow and span.arm.spans and span.end is not None:
                end, span.end = span.end, None
                arms.router.add(span)
                arms.router.end(span, end, span.end_offset)
            else:
                span.owner.matcher.add(span)
                span.owner.matcher.ended(span, span.end_offset)

    def _claim(self, arms: Arms, registration: Registration) -> None:
        """What was wanted of the nodes is wanted again, for when their agents come."""
        session = registration.session
        assert isinstance(session, Session)
        target = registration.key.target
        for arm in registration.arms:
            node = arms.nodes.get(arm.node)
            if arm.state in {ArmState.ASKED, ArmState.AWAY}:
                arm.state = ArmState.AWAY
                if node is not None and arm.unheard is None:
                    arm.unheard = node.expected  # the broker before us may have armed it, told of that, and crashed
            if node is None or arm.state is ArmState.OVER:
                continue
            if isinstance(target, Process | Pidfile):
                for span in arms.spans(arm):
                    if span.process is not None and not span.lingers:
                        follow = registration.key.terms.follow
                        if span.root:
                            node.interest.want_process(arm, *span.process, mask=registration.mask, follow=follow, ask=None, root=True)
                        else:
                            node.interest.learn_process(arm, *span.process, mask=registration.mask, follow=follow)
                if not arm.spans and arm.state is ArmState.ARMED:
                    arm.state = ArmState.OVER  # its end was the last that got into the log
            elif target is None:
                node.interest.want_node(arm, registration.mask, None)
            else:
                node.interest.want_group(arm, target, registration.mask, None)


def _key_of(registration: Registration) -> str:
    session = registration.session
    assert isinstance(session, Session)
    return f"{session.id}/{_serial(registration)}"


def _serial(registration: Registration) -> int:
    session = registration.session
    assert isinstance(session, Session)
    registration.serial = registration.serial or session.next_serial()
    return registration.serial


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _pack_process(process: Process | None) -> list[Any] | None:
    return None if process is None else [process.pid, process.start, process.boot_id]


def _unpack_process(packed: list[Any] | None) -> Process | None:
    return None if packed is None else Process(*packed)


def _pack_registration(registration: Registration) -> bytes:
    session = registration.session
    assert isinstance(session, Session)
    return _dump(
        {
            "session": session.id,
            "id": registration.id,
            "serial": _serial(registration),
            "message": registration.message().SerializeToString().hex(),
            "mask": registration.mask,
            "granted": registration.granted,
            "lent": registration.lent,
            "over": session.registrations.get(registration.key) is not registration,
            "found": {node: _pack_process(process) for node, process in registration.found.items()},
            "arms": {
                arm.node: [arm.state, arm.process and [*arm.process, ""], _pack_process(arm.named), arm.absent, arm.unheard]
                for arm in registration.arms
            },
        }
    )


def _unpack_registration(session: Session, content: dict[str, Any]) -> Registration | None:
    """None if it is not understood: of a newer version, which was taken back."""
    message = monitor_pb2.Registration.FromString(bytes.fromhex(content["message"]))
    try:
        key = parse_key(message)
    except UsageError:
        return None
    registration = make_registration(session, content["id"], key, message, content["mask"])
    registration.had_spans = True
    registration.granted, registration.serial = content["granted"], content["serial"]
    registration.lent = content.get("lent", False)  # earlier versions did not write it
    while session.next_serial() < registration.serial:
        pass
    registration.find({node: process for node, packed in content["found"].items() if (process := _unpack_process(packed)) is not None})
    for node, (state, process, named, absent, *later) in content["arms"].items():
        arm = registration.make_arm(node)
        arm.state, arm.process, arm.named = ArmState[state], process and (process[0], process[1]), _unpack_process(named)
        arm.absent = None if absent is None else (absent[0], absent[1])
        arm.unheard = later[0] if later else None
    return registration


def _pack_span(session: Session, span: Span) -> bytes:
    return _dump(
        [
            session.id, _serial(span.arm.registration), span.node, span.epoch, span.mask, span.first, span.process, span.cgroup_id,
            span.follow, span.end, span.exit_ns, span.root, span.since, span.end_offset,
        ]
    )  # fmt: skip


def _unpack_span(registration: Registration, content: list[Any]) -> Span:
    _, _, node, epoch, mask, first, process, cgroup_id, follow, end, exit_ns, root, since, end_offset = content
    arm = registration.make_arm(node)
    if isinstance(exit_ns, bool):  # an earlier version wrote down only whether it had ended
        exit_ns = exit_ns - 1
    return Span(
        registration.session, arm, node, epoch, mask, first, None if process is None else (process[0], process[1]), cgroup_id,
        follow, registration.key.terms.filter, end=end, exit_ns=exit_ns, root=root, since=since, end_offset=end_offset,
    )  # fmt: skip
