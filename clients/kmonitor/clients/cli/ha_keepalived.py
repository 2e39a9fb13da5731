# SPDX-License-Identifier: Apache-2.0
"""`kmon ha keepalived`: track files of keepalived, written by what runs on any node."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kmonitor.clients.cli.options import Broker, run
from kmonitor.clients.cli.output import say
from kmonitor.wire.durations import parse_duration
from kmonitor.wire.errors import UsageError

if TYPE_CHECKING:
    from kmonitor.clients.ha.keepalived_config import TrackConfig
    from kmonitor.clients.ha.keepalived_service import Writer
    from kmonitor.clients.ha.service_manager import ServiceManager

_ONE, _WHEN, _VALUE = "One track file", "When it changes", "What it says"


def keepalived(
    *,
    broker: Broker = "127.0.0.1:7221",
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Track files in TOML, a [[track]] each, instead of the options below.")
    ] = None,
    file: Annotated[Path | None, typer.Option(metavar="PATH", help="keepalived's track_file.", rich_help_panel=_ONE)] = None,
    process: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NODE:KIND=VALUE",
            help="A process of that node: pidfile=PATH, unit=NAME, cgroup=PATH or pid=N; of a unit or group with ,comm=GLOB behind it "
            "only those of that name. Give it as often as there are processes.",
            rich_help_panel=_ONE,
        ),
    ] = None,
    quorum: Annotated[
        int | None, typer.Option(metavar="N", help="Up if at least N of them are alive; left out, all.", rich_help_panel=_ONE)
    ] = None,
    when_blind: Annotated[
        str | None,
        typer.Option(
            metavar="down|keep|up",
            help="What to say while it cannot be seen whether they are alive, and before and after this command runs. No default: down is "
            "fail-safe, keep is fail-static.",
            rich_help_panel=_WHEN,
        ),
    ] = None,
    blind_after: Annotated[
        str, typer.Option(metavar="TIME", help="So long it may be so before that counts; 0: not at all.", rich_help_panel=_WHEN)
    ] = "5s",
    up_delay: Annotated[str, typer.Option(metavar="TIME", help="Up once they have been alive for so long.", rich_help_panel=_WHEN)] = "0",
    down_delay: Annotated[
        str, typer.Option(metavar="TIME", help="Down once they have been dead for so long.", rich_help_panel=_WHEN)
    ] = "0",
    up_value: Annotated[int, typer.Option(metavar="N", help="-254 to 254.", rich_help_panel=_VALUE)] = 0,
    down_value: Annotated[int, typer.Option(metavar="N", help="-254 to 254.", rich_help_panel=_VALUE)] = 1,
    write_blind: Annotated[
        bool,
        typer.Option(
            "--write-blind", help="Only write what is to be said while nobody watches, and end: for ExecStopPost=, after a kill -9."
        ),
    ] = False,
) -> None:
    """Write keepalived's track files by the life of processes on any node.

    The values go with `weight 0` in keepalived.conf, where all but 0 is FAULT, and with a negative weight, which lowers the priority.

    Exit status: 0 Ctrl-C, 143 SIGTERM or SIGHUP, 2 usage, or a file that cannot be written, 3 no broker at the start, 4 not
    authorised. A broker that goes away later is waited for.
    """
    if config is None:
        tracks = [_from_options(file, process, when_blind, quorum, (blind_after, up_delay, down_delay), (up_value, down_value))]
    elif file or process or when_blind or quorum is not None:
        raise UsageError("--config says all of it: leave --file, --process, --quorum and --when-blind out")
    else:
        from kmonitor.clients.ha.keepalived_config import load  # noqa: PLC0415

        tracks = load(config)

    from kmonitor.clients.ha.keepalived_service import write_blind as leave  # noqa: PLC0415 - gRPC is not for --help, nor for mistakes
    from kmonitor.clients.ha.keepalived_service import writing  # noqa: PLC0415
    from kmonitor.clients.ha.service_manager import ServiceManager  # noqa: PLC0415

    if write_blind:
        leave(tracks, say)
        return
    manager = ServiceManager()
    with writing(tracks, say) as writers:
        manager.ready()
        try:
            run(_serve(broker, writers, manager))
        finally:
            manager.stopping()


def _from_options(
    file: Path | None,
    processes: list[str] | None,
    when_blind: str | None,
    quorum: int | None,
    times: tuple[str, str, str],
    values: tuple[int, int],
) -> TrackConfig:
    if file is None or not processes:
        raise UsageError("give --file and at least one --process, or --config")
    if when_blind is None:
        raise UsageError(
            "say what keepalived is to be told while the processes cannot be seen: --when-blind down (nobody serves unseen), keep (nothing "
            "moves but by what is seen) or up"
        )
    from kmonitor.clients.ha.keepalived_config import track  # noqa: PLC0415

    blind_after, up_delay, down_delay = map(parse_duration, times)
    return track(
        file,
        processes,
        when_blind,
        quorum=quorum,
        blind_after=blind_after,
        up_delay=up_delay,
        down_delay=down_delay,
        up_value=values[0],
        down_value=values[1],
    )


async def _serve(broker: str, writers: list[Writer], manager: ServiceManager) -> int:
    from kmonitor.clients.guard import ProcessGuard  # noqa: PLC0415
    from kmonitor.clients.ha.keepalived_service import serve  # noqa: PLC0415
    from kmonitor.clients.monitor import connect  # noqa: PLC0415

    async with connect(broker) as monitor, ProcessGuard(monitor) as guard:
        await serve(guard, writers, manager, say)
    return 0
