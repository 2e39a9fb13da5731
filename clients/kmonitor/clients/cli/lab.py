# SPDX-License-Identifier: Apache-2.0
"""`kmon lab`: a cluster on one machine, without Docker."""

from __future__ import annotations

import typer

app = typer.Typer(name="lab", help="A cluster on this machine, of network and pid namespaces (root).", no_args_is_help=True)


@app.callback()
def lab() -> None:
    """Not there yet."""
