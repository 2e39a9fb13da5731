# SPDX-License-Identifier: Apache-2.0
"""Others' text as it is shown."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmonitor.wire.plain import plain_text

pytestmark = pytest.mark.wheel_ok


@pytest.mark.parametrize("text", ["", "nginx: worker process", "sshd [priv]", "größe", "日本語", "a\\x0ab", "[/]", "🦀"])
def test_what_can_be_seen_stays(text: str) -> None:
    assert plain_text(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\nkmon: OK", "\\x0akmon: OK"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\x85", "\\x85"),
        ("a\xa0b", "a\\xa0b"),
        ("\u061c", "\\u061c"),
        ("\u200b\u200c\u200d\u200e\u200f", "\\u200b\\u200c\\u200d\\u200e\\u200f"),
        ("\u2028\u202e\u2066", "\\u2028\\u202e\\u2066"),
        ("\ufeff", "\\ufeff"),
        ("\u3164", "\\u3164"),
        ("a\ufe0f", "a\\ufe0f"),
        ("\U000e0041", "\\U000e0041"),
        ("\udcff", "\\udcff"),
    ],
)
def test_what_cannot_is_written_out(text: str, shown: str) -> None:
    assert plain_text(text) == shown


@given(st.text(st.characters(exclude_categories=())))
def test_one_line_of_what_has_a_form(text: str) -> None:
    shown = plain_text(text)
    assert len(shown.splitlines()) <= 1
    assert not any(unicodedata.category(letter) in {"Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"} for letter in shown)
    assert plain_text(shown) == shown
