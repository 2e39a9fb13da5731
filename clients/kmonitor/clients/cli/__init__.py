# SPDX-License-Identifier: Apache-2.0
"""The command `kmon`. Each command's module imports gRPC only when it runs: `kmon --help` answers at once."""

from __future__ import annotations

import os
import sys

import typer

from kmonitor.clients.cli import ha, lab
from kmonitor.clients.cli.doctor import doctor
from kmonitor.clients.cli.nodes import nodes, ps
from kmonitor.clients.cli.options import silence_closed_stdout
from kmonitor.clients.cli.up import up
from kmonitor.clients.cli.wait import wait
from kmonitor.clients.cli.watch import watch
from kmonitor.wire.errors import KmonitorError

app = typer.Typer(
    name="kmon",
    help="What the processes of a whole cluster do: watch them, wait for them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (watch, wait, nodes, ps, up, doctor):
    app.command()(_command)
for _group in (ha.app, lab.app):
    app.add_typer(_group)


def main() -> None:
    """The entry point. A KmonitorError is one line on stderr, and its exit status."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read when gRPC is imported: its C core logs to stderr otherwise
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - for as long as the process lives
    try:
        app()
    except KmonitorError as error:
        silence_closed_stdout()
        print(f"kmon: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:  # before or after the part that catches the signal in order
        sys.exit(0)
    except BrokenPipeError:
        silence_closed_stdout()
        sys.exit(0)
