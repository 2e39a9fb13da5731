# SPDX-License-Identifier: Apache-2.0
"""`kmon ha`: its commands."""

from __future__ import annotations

import typer

from kmonitor.clients.cli.ha_keepalived import keepalived
from kmonitor.clients.cli.ha_pacemaker import pacemaker
from kmonitor.clients.cli.help import CONTEXT, Command, Group

app = typer.Typer(
    name="ha", cls=Group, rich_markup_mode=None, context_settings=CONTEXT, help="Report the ends of processes to a cluster's HA manager."
)
for _command in (pacemaker, keepalived):
    app.command(cls=Command, context_settings=CONTEXT)(_command)
