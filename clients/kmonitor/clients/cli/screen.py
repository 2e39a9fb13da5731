# SPDX-License-Identifier: Apache-2.0
"""Notifications for people: aligned columns, a colour for each node and each kind of event. Plain ANSI, put together by hand:
rich takes a hundred times as long for a line, and a screen must keep up with a compile."""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
import time
import zlib

from kmonitor.clients.events import Batch
from kmonitor.clients.notifications import (
    Deregistered,
    Disconnected,
    Fresh,
    Gap,
    NodeChange,
    NodeState,
    Notice,
    Progress,
    Reconnected,
    Registered,
    RegistrationState,
    Stale,
)
from kmonitor.v1 import events_pb2
from kmonitor.wire.masks import mask_names
from kmonitor.wire.plain import plain_text

_WORDS = {0x01: "T+", 0x02: "T!", 0x04: "T-", 0x08: "FORK", 0x10: "ABORT", 0x20: "EXEC", 0x40: "EXIT"}
_COLOURS = {0x01: "2", 0x02: "31", 0x04: "2", 0x08: "36", 0x10: "1;31", 0x20: "34", 0x40: "35"}
_NODE_COLOURS = ("38;5;37", "38;5;136", "38;5;139", "38;5;71", "38;5;173", "38;5;68", "38;5;168", "38;5;107")
_WIDEST_NODE = 24


def signal_name(number: int) -> str:
    """ "SIGKILL"; "SIGRTMIN+3"; "signal 99"."""
    try:
        return signal.Signals(number).name
    except ValueError:
        low = int(signal.SIGRTMIN)
        return f"SIGRTMIN+{number - low}" if low < number < int(signal.SIGRTMAX) else f"signal {number}"


def lived(nanoseconds: int) -> str:
    """ "830 us", "12.3 ms", "4.20 s", "3m07s", "2h05m", "12d03h"."""
    seconds = max(nanoseconds, 0) / 1e9
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s"
    whole = int(seconds)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole // 60 % 60:02d}m"
    return f"{whole // 86400}d{whole // 3600 % 24:02d}h"


def how_it_ended(event: events_pb2.Event) -> tuple[str, str]:
    """Of an exit or abort: the text, and its colour."""
    if event.inferred:
        return "gone: found ended, status not known", "1;31"
    if event.HasField("exit_signal"):
        text = signal_name(event.exit_signal)
        if event.oom_killed:
            text += " by the out-of-memory killer"
        elif event.HasField("killed_by"):
            sender = event.killed_by
            text += (
                f" by {plain_text(sender.comm) or '?'}({sender.pid}) uid {sender.uid}" if sender.pid or sender.comm else " by the kernel"
            )
        return text + (" (core dumped)" if event.core_dumped else ""), "1;31"
    return f"code {event.exit_code}", "32" if event.exit_code == 0 else "31"


class Screen:
    """Writes to stdout. `offsets`: node -> what to add to its boot-time clock to get Unix nanoseconds, where that is known; the
    rest is learnt from forks, whose child starts when they happen."""

    def __init__(self, *, colour: bool, progress: bool = False, offsets: dict[str, int] | None = None) -> None:
        self._colour = colour
        self._progress = progress
        self._offsets = dict(offsets or {})
        self._nodes: dict[str, str] = {}
        self._width = 8
        self._second = (-1, "")
        self._out = sys.stdout

    def heading(self, text: str) -> None:
        """Show what is asked for, before anything comes. Raises OutputError."""
        self._ruled(text, "2")

    # ---- events

    def batch(self, batch: Batch, limit: int) -> None:
        """The first `limit` events. Raises OutputError."""
        node = self._node(batch.node)
        events = batch.events if limit >= len(batch.events) else batch.events[:limit]
        lines = [self._line(batch.node, node, event) for event in events]
        lines.append("")
        self._write("\n".join(lines))

    def _line(self, name: str, node: str, event: events_pb2.Event) -> str:
        kind = event.type
        if kind in (0x08, 0x01):
            self._offsets[name] = event.time - event.child_start_time
        word = f"{_WORDS.get(kind, hex(kind)):<5}"
        if self._colour:
            word = f"\x1b[{_COLOURS.get(kind, '0')}m{word}\x1b[0m"
        pid = f"{event.pid:>7}" if kind > 0x07 else f"{event.pid:>7}/{event.tid}"
        comm = plain_text(event.comm)
        return f"{self._time(event.time)}  {node}  {word} {pid}  {comm:<15}  {self._details(name, kind, event)}"

    def _details(self, name: str, kind: int, event: events_pb2.Event) -> str:
        if kind == 0x08:
            return f"→ {event.child_pid}"
        if kind == 0x01:
            return f"→ {event.child_tid}"
        if kind == 0x20:
            arguments = " ".join([event.filename, *map(shlex.quote, event.args[1:])])
            return plain_text(arguments) + (" …" if event.args_truncated else "")
        text, colour = how_it_ended(event)
        if self._colour:
            text = f"\x1b[{colour}m{text}\x1b[0m"
        offset = self._offsets.get(name)
        if kind == 0x40 and offset is not None and event.start_time and not event.inferred:
            after = f"after {lived(event.time - offset - event.start_time)}"
            text += f"  \x1b[2m{after}\x1b[0m" if self._colour else f"  {after}"
        return text

    def _time(self, nanoseconds: int) -> str:
        second, rest = divmod(nanoseconds, 1_000_000_000)
        if self._second[0] != second:
            self._second = (second, time.strftime("%H:%M:%S", time.localtime(second)))
        return f"{self._second[1]}.{rest // 1_000_000:03d}"

    def _node(self, given: str) -> str:
        name = plain_text(given)
        if len(name) > self._width and self._width < _WIDEST_NODE:
            self._width = min(len(name), _WIDEST_NODE)
            self._nodes.clear()
        shown = self._nodes.get(given)
        if shown is None:
            cut = name if len(name) <= self._width else name[: self._width - 1] + "…"
            shown = f"{cut:<{self._width}}"
            if self._colour:
                shown = f"\x1b[{_NODE_COLOURS[zlib.crc32(name.encode()) % len(_NODE_COLOURS)]}m{shown}\x1b[0m"
            self._nodes[given] = shown
        return shown

    # ---- notices

    def notice(self, notice: Notice) -> None:
        """Raises OutputError."""
        if isinstance(notice, Progress) and not self._progress:
            return
        self._ruled(*_styled(notice))

    def _ruled(self, text: str, colour: str) -> None:
        line = f"── {plain_text(text)} "
        line += "─" * max(2, min(shutil.get_terminal_size().columns, 120) - len(line))
        self._write(f"\x1b[{colour}m{line}\x1b[0m\n" if self._colour else line + "\n")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def notice_text(notice: Notice) -> str:
    """One line, without colour."""
    return plain_text(_styled(notice)[0])


def _styled(notice: Notice) -> tuple[str, str]:
    """The text, and its colour."""
    if isinstance(notice, Registered):
        return _registered(notice)
    if isinstance(notice, Deregistered):
        return f"registration {notice.registration_id}: {'events removed' if notice.event_mask else 'ended'}", "2"
    if isinstance(notice, Gap):
        lost = ", ".join(f"{count.count} {count.type.name}" for count in notice.lost)
        where = {
            1: "its kernel's ring was full",
            2: "its agent was gone",
            3: "the log no longer reaches",
            4: "this monitor read too slowly",
        }
        why = where.get(notice.reason, "unknown reason")
        return f"{notice.node}: GAP, events are missing ({why}){': ' + lost if lost else ''}", "1;33"
    if isinstance(notice, NodeChange):
        colour = "1;32" if notice.state is NodeState.UP else "1;31"
        return f"{notice.node}: node is {notice.state.name}{': ' + notice.reason if notice.reason else ''}", colour
    if isinstance(notice, Disconnected):
        return f"the broker at {notice.address} does not answer, trying again ({notice.reason})", "1;31"
    if isinstance(notice, Reconnected):
        return f"the broker at {notice.address} answers again after {notice.seconds:.1f} s", "1;32"
    if isinstance(notice, Stale):
        if notice.node is None:
            return f"STALE: nothing was heard of the broker for {notice.seconds:.1f} s", "1;33"
        return f"{notice.node}: STALE, nothing new is known of it for {notice.seconds:.1f} s", "1;33"
    if isinstance(notice, Fresh):
        who = "the broker is" if notice.node is None else f"{notice.node}: it is"
        return f"{who} heard again after {notice.seconds:.1f} s", "1;32"
    return "complete: " + ", ".join(f"{node.node} up to {node.position}" for node in notice.nodes), "2"


def _registered(notice: Registered) -> tuple[str, str]:
    if notice.error:
        return notice.error if notice.node else f"registration {notice.registration_id} was refused: {notice.error}", "1;31"
    names = ", ".join(name.lower().removeprefix("process_").replace("_", "-") for name in mask_names(notice.event_mask))
    if notice.state is RegistrationState.RUNNING and notice.process is not None:
        return f"{notice.node}: watching {notice.process.comm} ({notice.process.pid}) for {names}", "2"
    if notice.state is RegistrationState.EXITED:
        what = f"the process of {notice.target}" if notice.target.startswith("pidfile ") else notice.target
        return f"{notice.node}: {what} has already ended", "1;33"
    if notice.state is RegistrationState.NOT_FOUND:
        return f"{notice.node}: there is no {notice.target}", "1;33"
    if notice.state is RegistrationState.NODE_UNREACHABLE:
        return f"{notice.node}: not connected, {notice.target} will be watched when it returns", "1;33"
    if notice.state is RegistrationState.NO_NODE:
        return f"no node matches yet, {notice.target} will be watched on those that join", "1;33"
    return f"{notice.node}: watching {notice.target} for {names}", "2"
