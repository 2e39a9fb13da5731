# SPDX-License-Identifier: Apache-2.0
"""The command `kmon`. Each command's module imports gRPC only when it runs: `kmon --help` answers at once."""

from __future__ import annotations

import contextlib
import os
import sys

import typer

from kmonitor.clients.cli import ha, lab, output
from kmonitor.clients.cli.doctor import doctor
from kmonitor.clients.cli.help import CONTEXT, Command, Group, Version, usage_error
from kmonitor.clients.cli.nodes import nodes, ps
from kmonitor.clients.cli.up import up
from kmonitor.clients.cli.version import show_version
from kmonitor.clients.cli.wait import wait
from kmonitor.clients.cli.watch import watch
from kmonitor.wire.errors import KmonitorError

app = typer.Typer(
    name="kmon",
    cls=Group,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=CONTEXT,
)


@app.callback()
def _kmon(*, version: Version = False) -> None:
    """Watch the processes of a whole cluster, and wait for them."""


for _command in (watch, wait, nodes, ps, up, doctor, show_version):
    app.command(name=_command.__name__.removeprefix("show_"), cls=Command, context_settings=CONTEXT)(_command)
for _group in (ha.app, lab.app):
    app.add_typer(_group)


def main() -> None:
    """The entry point. A KmonitorError is one line on stderr, and its exit status."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read when gRPC is imported: its C core logs to stderr otherwise
    output.install()
    try:
        status = _status()
    except output.ReaderGoneError as error:
        status = error.exit_status
    except KmonitorError as error:
        output.say(str(error))
        status = error.exit_status
    except KeyboardInterrupt:  # before or after the part that catches the signal in order
        status = 0
    with contextlib.suppress(KmonitorError):
        sys.stdout.flush()
    output.outlive_stdout()  # for the interpreter's own last flush
    sys.exit(status)


def _status() -> int:
    try:
        status = app(standalone_mode=False)
    except typer.TyperException as error:
        output.say(usage_error(error))
        return 2
    sys.stdout.flush()
    return status if isinstance(status, int) else 0
