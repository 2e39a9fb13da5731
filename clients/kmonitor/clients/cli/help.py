# SPDX-License-Identifier: Apache-2.0
"""How the commands' help looks: plain text, options in groups, wrapped at the terminal's width up to 100 columns."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from kmonitor.wire.version import installed_version

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
"""The settings of each command."""


_NO_INTEGER = "Input should be a valid integer, unable to parse string as an integer"


class Command(TyperCommand):
    """A command whose options stand in groups, by their `rich_help_panel`; those without one come last."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write them into a formatter of typer's."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or kind, []).append(record)
        common = groups.pop("Options", [])
        for name, records in [*groups.items(), ("Options" if not groups else "Other options", common)]:
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


class Group(TyperGroup):
    """A command that has others below it. Without one it shows them, and ends with status 2."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Show the help where nothing is asked for."""
        if not args:
            typer.echo(ctx.get_help(), err=True)
            raise typer.Exit(2)
        return list(super().parse_args(ctx, args))


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"kmon {installed_version()}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")]


def usage_error(error: typer.TyperException) -> str:
    """Return one line for a mistake in a command's words."""
    said = error.format_message() if hasattr(error, "format_message") else str(error)
    line = " ".join(said.split()).removesuffix(".").replace(_NO_INTEGER, "give a whole number")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "kmon"
    return f"{line[:1].lower()}{line[1:]}; {command} --help lists all options"
