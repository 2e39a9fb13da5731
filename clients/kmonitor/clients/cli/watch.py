# SPDX-License-Identifier: Apache-2.0
"""`kmon watch`: events as they happen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kmonitor.clients.cli.options import (
    Broker,
    Comms,
    Events,
    Failed,
    Json,
    Labels,
    Nodes,
    Uids,
    duration,
    event_filters,
    labels_of,
    run,
    split_names,
    wants_colour,
)
from kmonitor.wire import clocks
from kmonitor.wire.durations import parse_duration
from kmonitor.wire.errors import KmonitorError, UsageError

if TYPE_CHECKING:
    from kmonitor.clients.cli.actions import Action
    from kmonitor.clients.cli.view import Plan, Sink
    from kmonitor.clients.cursor import Cursor
    from kmonitor.clients.monitor import Monitor
    from kmonitor.clients.selection import Selection

_LINGER_S = 300.0
_EXEC_LIMIT_S = 60.0
_JOBS_MOST = 256
_WHO, _END, _ACT = "Which processes", "When to end", "What to do with them"


def watch(
    *,
    broker: Broker = "127.0.0.1:7221",
    node: Nodes = None,
    label: Labels = None,
    pid: Annotated[list[int] | None, typer.Option(metavar="N", help="A process.", rich_help_panel=_WHO)] = None,
    pidfile: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="The process that this file of the node names now; the agent reads it.", rich_help_panel=_WHO),
    ] = None,
    cgroup: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="A control group and all below it.", rich_help_panel=_WHO)
    ] = None,
    unit: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A systemd unit.", rich_help_panel=_WHO)] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Also what the targets fork.", rich_help_panel=_WHO)] = False,
    comm: Comms = None,
    uid: Uids = None,
    failed: Failed = False,
    events: Events = None,
    json: Json = False,
    progress: Annotated[bool, typer.Option("--progress", help="Show the heartbeats too.")] = False,
    count: Annotated[int | None, typer.Option(metavar="N", help="After N events.", rich_help_panel=_END)] = None,
    for_: Annotated[
        str | None, typer.Option("--for", metavar="TIME", help="After this long: 500ms, 10s, 2m, 1h, 1d.", rich_help_panel=_END)
    ] = None,
    fail_on_gap: Annotated[
        bool, typer.Option("--fail-on-gap", help="With status 5 as soon as events are known to be missing.", rich_help_panel=_END)
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Go on where the last run with this file stopped: each event is shown once, those from between too, and a pid or pidfile "
            "is the process of before for as long as the file is there. Of a kmon that was killed, what came in its last moment may be "
            "shown a second time. What the broker's log no longer has, or --linger was too short for, is told as a gap.",
            rich_help_panel=_ACT,
        ),
    ] = None,
    linger: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="With --resume: how long the broker watches on after kmon has ended (default 5m, at most 1h; 0: not at all).",
            rich_help_panel=_ACT,
        ),
    ] = None,
    exec_: Annotated[
        str | None,
        typer.Option(
            "--exec",
            metavar="COMMAND",
            help="Run a program for each event (words as in a shell, but no shell: for one write \"sh -c '...'\"): the event's JSON line "
            "on its stdin, and KMON_NODE, "
            "KMON_TYPE, KMON_PID, KMON_TID, KMON_PPID, KMON_UID, KMON_GID, KMON_COMM, KMON_TIME, KMON_START_TIME, KMON_BOOT_ID, "
            "KMON_INFERRED, and by type KMON_CHILD_PID, KMON_CHILD_TID, KMON_FILENAME, KMON_EXIT_CODE, KMON_EXIT_SIGNAL. Its own "
            "processes are events too: watch something narrower than everything.",
            rich_help_panel=_ACT,
        ),
    ] = None,
    exec_jobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="With --exec: so many at a time (default 1: one after the other, in order). While as many run the stream waits.",
            rich_help_panel=_ACT,
        ),
    ] = None,
    exec_timeout: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="With --exec: one that takes longer is ended, with all that it has started (default 60s).",
            rich_help_panel=_ACT,
        ),
    ] = None,
    signal: Annotated[
        str, typer.Option(metavar="SIGNAL", help="For --notify: SIGRTMIN to SIGRTMAX, SIGRTMIN+3, a number.", rich_help_panel=_ACT)
    ] = "SIGRTMIN",
    notify: Annotated[
        int | None,
        typer.Option(
            metavar="PID",
            help="Queue a real-time signal to this local process for each event: si_pid is the event's process, si_value its bit, "
            "si_code SI_QUEUE.",
            rich_help_panel=_ACT,
        ),
    ] = None,
) -> None:
    """Show events as they happen.

    With --pid, --pidfile, --unit or --cgroup it ends by itself when all of them have ended (not where it goes on with --follow after
    an earlier run, which knew what was forked).

    Exit status: 0 done, 2 usage or nothing of it there, 3 no broker, 4 not authorised, 5 a gap with --fail-on-gap.
    """
    seconds = duration(for_)
    if linger is not None and resume is None:
        raise UsageError("--linger belongs to --resume")
    if exec_ is None and (exec_jobs is not None or exec_timeout is not None):
        raise UsageError("--exec-jobs and --exec-timeout belong to --exec")
    if exec_jobs is not None and not 1 <= exec_jobs <= _JOBS_MOST:
        raise UsageError(f"--exec-jobs: give a number from 1 to {_JOBS_MOST}")
    limit = duration(exec_timeout) or _EXEC_LIMIT_S
    lingers = None if resume is None else _LINGER_S if linger is None else parse_duration(linger)
    if count is not None and count < 1:
        raise UsageError("--count: give a number from 1")
    selections = _selections(split_names(node), pid or [], pidfile or [], cgroup or [], unit or [])
    filters = event_filters(events, comm, uid, failed)
    labels = labels_of(label)
    for selection in selections:
        selection.update(filters)
        selection["labels"] = labels
        selection["follow"] = follow
    mask = int(filters["events"])  # a number: event_filters has parsed it

    from kmonitor.clients.cli.view import Plan  # noqa: PLC0415 - gRPC and protobuf, which --help and mistakes need not wait for
    from kmonitor.clients.cursor import Cursor  # noqa: PLC0415
    from kmonitor.clients.selection import registration  # noqa: PLC0415

    wanted = [registration(selection) for selection in selections]  # before anybody is asked: what cannot be meant is said at once
    cursor = Cursor() if resume is None else Cursor.load(resume)
    cursor.keep_only(wanted)
    if resume is not None:
        _check_writable(resume, cursor)
    plan = Plan(
        selections,
        count=count,
        seconds=seconds,
        fail_on_gap=fail_on_gap,
        resume=resume,
        linger=lingers,
        cursor=cursor,
        actions=_actions(exec_, limit, signal, notify),
        jobs=exec_jobs or 1,
        ends_seen=bool(mask & 0x40) and not (comm or uid or failed or (follow and not mask & 0x08)),
        follow=follow,
    )
    run(_watch(broker, plan, json=json, progress=progress))


def _check_writable(path: Path, cursor: Cursor) -> None:
    """Raise UsageError if the cursor cannot be saved there: now, and not once there is something to lose."""
    was_there = path.exists()
    cursor.save(path)
    if not was_there:
        path.unlink(missing_ok=True)  # a file says that there is something to go on with


def _selections(nodes: list[str], pids: list[int], pidfiles: list[str], cgroups: list[str], units: list[str]) -> list[Selection]:
    found: list[Selection] = [{"nodes": nodes, "pid": pid} for pid in dict.fromkeys(pids)]
    found += [{"nodes": nodes, "pidfile": path} for path in dict.fromkeys(pidfiles)]
    found += [{"nodes": nodes, "cgroup": path} for path in dict.fromkeys(cgroups)]
    found += [{"nodes": nodes, "unit": name} for name in dict.fromkeys(units)]
    return found or [{"nodes": nodes}]


def _actions(command: str | None, limit: float, signal: str, notify: int | None) -> list[Action]:
    from kmonitor.clients.cli.actions import Command, Signal  # noqa: PLC0415
    from kmonitor.clients.cli.notify import Notifier, parse_signal  # noqa: PLC0415
    from kmonitor.wire.selectors import check_pid  # noqa: PLC0415

    number = parse_signal(signal)
    found: list[Action] = [] if command is None else [Command(command, limit)]
    if notify is not None:
        found.append(Signal(Notifier(check_pid(notify), number)))
    return found


async def _watch(broker: str, plan: Plan, *, json: bool, progress: bool) -> int:
    from kmonitor.clients.cli.view import show  # noqa: PLC0415
    from kmonitor.clients.monitor import connect  # noqa: PLC0415

    resumable = plan.resume is not None
    async with connect(broker, cursor=plan.cursor, linger=plan.linger, resumable=resumable) as monitor:
        return await show(monitor, await make_sink(monitor, json=json, progress=progress, heading=filters_text(plan.selections[0])), plan)


def filters_text(selection: Selection) -> str:
    """Return what the filters leave, for people; empty if there are none."""
    parts = [("named", ", ".join(selection.get("comms", ()))), ("of user", ", ".join(map(str, selection.get("uids", ()))))]
    words = [f"{name} {value}" for name, value in parts if value]
    if selection.get("failures_only"):
        words.append("of ends those that failed")
    return f"only: {'; '.join(words)}" if words else ""


async def make_sink(monitor: Monitor, *, json: bool, progress: bool, heading: str = "") -> Sink:
    """Return what shows lines for programs, or for people; `heading` is for people."""
    if json:
        from kmonitor.clients.cli.jsonlines import JsonLines  # noqa: PLC0415

        return JsonLines(progress=progress)
    from kmonitor.clients.cli.screen import Screen  # noqa: PLC0415

    screen = Screen(colour=wants_colour(), progress=progress, offsets=await _local_offsets(monitor))
    if heading:
        screen.heading(heading)
    return screen


async def _local_offsets(monitor: Monitor) -> dict[str, int]:
    """Of the nodes that run on this very kernel: their boot-time clock is ours."""
    try:
        here = clocks.boot_id()
        nodes = await monitor.list_nodes()
    except (KmonitorError, OSError):
        return {}  # a nicety of the display; what is wrong shows up when registering
    return {node.name: clocks.boottime_to_unix_ns() for node in nodes if node.boot_id == here}
