# SPDX-License-Identifier: Apache-2.0
"""`kmon ha`: its commands."""

from __future__ import annotations

import typer

from kmonitor.clients.cli.ha_keepalived import keepalived
from kmonitor.clients.cli.ha_pacemaker import pacemaker

app = typer.Typer(name="ha", help="Tell a cluster's HA manager of the ends of its processes.", no_args_is_help=True)
app.command()(pacemaker)
app.command()(keepalived)
