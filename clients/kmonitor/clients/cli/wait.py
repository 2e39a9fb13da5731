# SPDX-License-Identifier: Apache-2.0
"""`kmon wait`: ends as a process on another machine does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kmonitor.clients.cli.options import Broker, duration, run
from kmonitor.clients.cli.output import outlive_stdout, say
from kmonitor.wire.errors import UsageError
from kmonitor.wire.plain import plain_text

if TYPE_CHECKING:
    from kmonitor.clients.notifications import Notice


def wait(
    *,
    node: Annotated[str, typer.Option(metavar="NAME", help="The node it runs on.")],
    pid: Annotated[int | None, typer.Option(metavar="N", help="The process: this, or --pidfile.")] = None,
    pidfile: Annotated[
        str | None, typer.Option(metavar="PATH", help="The process that this file of the node names now; the agent reads it.")
    ] = None,
    start_time: Annotated[
        int, typer.Option("--start-time", metavar="NS", help="When it started (boot-time nanoseconds): no other process with this pid.")
    ] = 0,
    boot_id: Annotated[
        str, typer.Option("--boot-id", metavar="ID", help="With --start-time: the boot that it is of, as `kmon ps --json` shows it.")
    ] = "",
    timeout: Annotated[str | None, typer.Option(metavar="TIME", help="Give up after 10s, 500ms, 2m, 1h: status 124.")] = None,
    broker: Broker = "127.0.0.1:7221",
) -> None:
    """Wait for the end of a process on any node, and end as it did.

    Exit status: its exit code, or 128+n for signal n. 2 if it had already ended, was not found, ended with a status that is not
    known, or its node was removed (kmon nodes --remove); 124 if --timeout ran out, as timeout(1); 3 no broker; 4 not authorised;
    130 after Ctrl-C. What the process says goes to stdout, what
    kmon has to say to stderr.
    """
    if (pid is None) == (pidfile is None):
        raise UsageError("give one of --pid and --pidfile")
    if start_time and pid is None:
        raise UsageError("--start-time belongs to --pid")
    if boot_id and not start_time:
        raise UsageError("--boot-id belongs to --start-time")
    seconds = duration(timeout)
    from kmonitor.wire.selectors import check_boot_id, check_node_name, check_pid, check_pidfile  # noqa: PLC0415 - numpy and gRPC are not for --help

    check_node_name(node)
    if pid is not None:
        check_pid(pid)
    if pidfile is not None:
        check_pidfile(pidfile)
    if boot_id:
        check_boot_id(boot_id)
    which = {"pid": pid, "start_time": start_time, "boot_id": boot_id, "pidfile": pidfile}
    run(_wait(broker, node, which, seconds), on_interrupt=130)


async def _wait(broker: str, node: str, which: dict[str, Any], seconds: float | None) -> int:
    from kmonitor.clients.cli.screen import how_it_ended  # noqa: PLC0415
    from kmonitor.clients.monitor import connect  # noqa: PLC0415

    async with connect(broker) as monitor:
        event = await monitor.wait(node=node, **which, timeout=seconds, on_notice=_tell)
    text, _ = how_it_ended(event.raw)
    outlive_stdout()  # whoever waits goes by the status
    print(f"{node}: {plain_text(event.comm)} ({event.pid}) ended: {text}", flush=True)
    if event.exit_code is not None:
        return event.exit_code
    return 2 if event.exit_signal is None else 128 + event.exit_signal


def _tell(notice: Notice) -> None:
    from kmonitor.clients.cli.screen import notice_text  # noqa: PLC0415
    from kmonitor.clients.notifications import (  # noqa: PLC0415
        Disconnected,
        Fresh,
        Gap,
        NodeChange,
        Reconnected,
        Registered,
        RegistrationState,
        Stale,
    )

    waiting = isinstance(notice, Registered) and notice.state in (RegistrationState.NODE_UNREACHABLE, RegistrationState.NO_NODE)
    if waiting or isinstance(notice, (Gap, NodeChange, Disconnected, Reconnected, Stale, Fresh)):
        say(notice_text(notice))
