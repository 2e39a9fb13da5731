# SPDX-License-Identifier: Apache-2.0
"""`kmon ha pacemaker`."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kmonitor.clients.cli.options import Broker, Json, duration, positive_duration, run
from kmonitor.clients.cli.output import outlive_stdout, say
from kmonitor.wire.durations import parse_duration
from kmonitor.wire.errors import BrokerUnreachableError, UsageError

if TYPE_CHECKING:
    from kmonitor.clients.ha.crm import Crm
    from kmonitor.clients.ha.rules import Rules
    from kmonitor.clients.ha.settling import Options
    from kmonitor.clients.monitor import Monitor

_AGAIN_S = 2.0


@dataclass(frozen=True, slots=True)
class _Plan:
    rules: Rules
    options: Options
    poll: float
    grace: float
    json: bool


def pacemaker(
    *,
    broker: Broker = "127.0.0.1:7221",
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Which process is a resource's, where its parameters do not say: TOML, see docs/ha.md."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be told to Pacemaker, and tell nothing.")] = False,
    attribute: Annotated[
        bool,
        typer.Option(
            "--attribute", help="Leave the cause in a node attribute, kmonitor-RESOURCE, until the node's next start (crm_mon -A)."
        ),
    ] = False,
    act_on_inferred: Annotated[
        bool, typer.Option("--act-on-inferred", help="Act also on an end that nobody saw, and that was found afterwards.")
    ] = False,
    act_on_unreachable: Annotated[
        str | None,
        typer.Option(
            "--act-on-unreachable",
            metavar="TIME",
            help="Dangerous: act also when the broker has not heard a resource's node for so long. The resource may be well.",
        ),
    ] = None,
    grace: Annotated[
        str, typer.Option(metavar="TIME", help="Before a death is told, wait so long for a process that somebody else starts instead.")
    ] = "0",
    poll: Annotated[str, typer.Option(metavar="TIME", help="How often to look whether the cluster has changed.")] = "1s",
    retry: Annotated[
        bool, typer.Option("--retry", help="As a service: while broker or Pacemaker do not answer at the start, try again.")
    ] = False,
    json: Json = False,
) -> None:
    """Tell Pacemaker at once when the process of one of its resources has died.

    To run on one node of the cluster, as root or in the group haclient. A process that the cluster itself has ended, or does not look
    after now, is left alone. What is decided, and why, is a line on stderr (--json: an object on stdout).

    Exit status: 2 usage, or no Pacemaker here; 3 no broker; 4 not authorised; 143 after SIGTERM or SIGHUP.
    """
    every = positive_duration(poll)
    if every < 0.1:
        raise UsageError("--poll: give 100ms or more")
    from kmonitor.clients.ha.rules import Rules, load  # noqa: PLC0415 - not for --help
    from kmonitor.clients.ha.settling import Options  # noqa: PLC0415

    rules = Rules() if config is None else load(config, parse_duration)
    options = Options(dry_run, attribute, act_on_inferred, duration(act_on_unreachable))
    run(_pacemaker(broker, _Plan(rules, options, every, parse_duration(grace), json), retry=retry))


async def _pacemaker(broker: str, plan: _Plan, *, retry: bool) -> int:
    from kmonitor.clients.ha.crm import Crm, CrmAwayError  # noqa: PLC0415

    crm, said = Crm(), ""
    outlive_stdout()  # with --json it is the log
    while True:
        try:
            await _guard(broker, plan, crm)
        except (BrokerUnreachableError, CrmAwayError) as error:
            if not retry:
                raise
            if str(error) != said:
                said = str(error)
                say(f"{error}; trying again")
        await asyncio.sleep(_AGAIN_S)


async def _guard(broker: str, plan: _Plan, crm: Crm) -> None:
    from kmonitor.clients.guard import ProcessGuard  # noqa: PLC0415
    from kmonitor.clients.ha.lookup import Lookup  # noqa: PLC0415
    from kmonitor.clients.ha.pacemaker import Pacemaker  # noqa: PLC0415
    from kmonitor.clients.ha.processes import Processes  # noqa: PLC0415
    from kmonitor.clients.ha.report import JsonLines, Lines  # noqa: PLC0415
    from kmonitor.clients.ha.settling import Settling  # noqa: PLC0415
    from kmonitor.clients.ha.unheard import Unheard  # noqa: PLC0415
    from kmonitor.clients.ha.view import View  # noqa: PLC0415
    from kmonitor.clients.monitor import connect  # noqa: PLC0415

    view = View(crm, await crm.local_node())
    report = JsonLines() if plan.json else Lines(say)
    async with connect(broker) as monitor, connect(broker) as beside, ProcessGuard(monitor) as guard:
        drain = asyncio.create_task(_drain(beside))
        lookup = Lookup(beside)
        settling = Settling(crm, view, lookup, report, plan.options)
        unheard = Unheard(settling, view, plan.options.settings)

        def grace_of(resource_id: str, primitive: str) -> float:
            own = plan.rules.of(resource_id, primitive).grace
            return plan.grace if own is None else own

        work = Pacemaker(guard, view, Processes(crm, plan.rules), settling, lookup, report, unheard, poll=plan.poll, grace_of=grace_of)
        try:
            await work.run()
        except* BaseException as group:  # noqa: BLE001 - the first is the cause; the others were cancelled for it
            raise _first(group) from None
        finally:
            drain.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await drain


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _drain(monitor: Monitor) -> None:
    """What it is told is not for us."""
    async for _ in monitor.batches():
        pass
