# SPDX-License-Identifier: Apache-2.0
"""The options of a program that runs on every node: argparse, which is quick to import, with errors of one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from kmonitor.wire.errors import UsageError

_WIDTH_MOST = 120


class Parser(argparse.ArgumentParser):
    """Long options are written out in full. What follows an option that takes a value is its value, also if it begins with a dash."""

    def __init__(self, program: str, description: str) -> None:
        """`description`: paragraphs of lines that stay as they are."""
        super().__init__(prog=program, description=description, usage=f"{program} [OPTIONS]", formatter_class=_Format, allow_abbrev=False)

    def parse(self, words: Sequence[str] | None = None) -> dict[str, Any]:
        """The options by name. Raises UsageError. Ends the program, with status 0, after --help."""
        options, rest = self.parse_known_args(self._with_values(sys.argv[1:] if words is None else words))
        if rest:
            self.error(self._unknown(rest[rest[0] == "--" and len(rest) > 1]))
        return vars(options)

    def add_nice(self, default: int) -> None:
        """--nice, which agent and broker have: see kmonitor.wire.priority."""
        self.add_argument(
            "--nice",
            metavar="NUMBER",
            type=number(-20, 19),
            default=default,
            help="Priority for the CPU, -20 to 19; a raise needs root or CAP_SYS_NICE.  [default: %(default)s]",
        )

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(f"{message.removeprefix('argument ')}; {self.prog} --help tells all options")

    def _with_values(self, words: Sequence[str]) -> list[str]:
        # Joined, argparse does not ask whether the value looks like an option: "--linger -1s" is a bad time, not a missing one.
        taking = {name for action in self._actions if action.nargs is None for name in action.option_strings}
        joined: list[str] = []
        left = iter(words)
        for word in left:
            value = next(left, None) if word in taking else None
            joined.append(word if value is None else f"{word}={value}")
        return joined

    def _unknown(self, word: str) -> str:
        if not word.startswith("-"):
            return f"unexpected argument {word!r}"
        import difflib  # noqa: PLC0415  # nobody else needs it

        name = word.partition("=")[0]
        names = [each for action in self._actions for each in action.option_strings if each.startswith("--")]
        close = [each for each in names if len(name) > 2 and each.startswith(name)] or difflib.get_close_matches(name, names)
        return f"no such option: {name}" + (f" (perhaps {' or '.join(close)})" if close else "")


class _Format(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        # Its own way to find the width imports shutil, with three compressors, for each option that is declared.
        super().__init__(prog, max_help_position=30, width=min(_columns(), _WIDTH_MOST) - 2)


def _columns() -> int:
    if (given := os.environ.get("COLUMNS", "")).isdecimal() and int(given) > 0:
        return int(given)
    try:
        return os.get_terminal_size().columns or 80
    except OSError:
        return 80


def number(least: int, most: int) -> Callable[[str], int]:
    """The type of an option that is a whole number."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from {least} to {most}")
        return value

    return parse
