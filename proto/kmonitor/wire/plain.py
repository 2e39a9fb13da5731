# SPDX-License-Identifier: Apache-2.0
"""Text that others wrote, as it is shown: a process's name, an agent's version, a broker's error are data, and steer nothing."""

from __future__ import annotations

import re

# Nothing to see, and yet printable to Python: fillers, joiners, variation selectors (Default_Ignorable_Code_Point); the empty Braille cell.
_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")


def plain_text(text: str) -> str:
    r"""Return `text` as one line in which all can be seen: anything else is written as \xNN, \uNNNN or \UNNNNNNNN.

    That is control characters, line ends, what changes the direction of writing, what has no width, what is not assigned, and spaces other
    than the usual one.
    """
    if text.isprintable() and (text.isascii() or _INVISIBLE.search(text) is None):
        return text
    return "".join(letter if letter.isprintable() and _INVISIBLE.match(letter) is None else _escape(ord(letter)) for letter in text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
