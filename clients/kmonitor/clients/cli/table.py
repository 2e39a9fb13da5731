# SPDX-License-Identifier: Apache-2.0
"""Tables for people. No cell is cut: a line that is longer than the terminal wraps, and a pipe gets whole lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kmonitor.clients.cli.options import wants_colour
from kmonitor.wire.plain import plain_text

Cell = str | tuple[str, str]
"""Text, or (text, ANSI style such as "1;31")."""


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """Print rows under their headings, each column as wide as its longest cell.

    `columns`: headings; one that begins with ">" is of numbers, which are aligned at the right. Others' text is escaped.
    """
    is_coloured = wants_colour()
    table = [[_plain(cell) for cell in row] for row in rows]
    table.insert(0, [(name.removeprefix(">").upper(), "1") for name in columns])
    widths = [max(len(text) for text, _ in cells) for cells in zip(*table, strict=True)]
    for row in table:
        cells = []
        for (text, style), name, width in zip(row, columns, widths, strict=True):
            padding = " " * (width - len(text))
            shown = f"\x1b[{style}m{text}\x1b[0m" if style and is_coloured else text
            cells.append(padding + shown if name.startswith(">") else shown + padding)
        print("  ".join(cells).rstrip())


def _plain(cell: Cell) -> tuple[str, str]:
    text, style = (cell, "") if isinstance(cell, str) else cell
    return plain_text(text), style
