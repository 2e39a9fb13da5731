# SPDX-License-Identifier: Apache-2.0
"""Event masks, as numbers and as words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmonitor.v1 import events_pb2
from kmonitor.wire import masks
from kmonitor.wire.errors import BadMaskError

pytestmark = pytest.mark.wheel_ok


def test_the_bits_are_those_of_the_protocol() -> None:
    protocol = {name.removeprefix("EVENT_TYPE_"): number for name, number in events_pb2.EventType.items() if number}
    assert protocol == {name: bit for bit, name in masks.TYPE_NAMES.items()}


@given(st.integers(1, masks.ALL_EVENTS))
def test_a_mask_is_its_names_and_its_number(mask: int) -> None:
    names = masks.mask_names(mask)
    assert masks.parse_mask(",".join(names)) == mask
    assert masks.parse_mask(",".join(name.lower().replace("_", "-") for name in names)) == mask
    assert masks.parse_mask(hex(mask)) == masks.parse_mask(str(mask)) == masks.check_mask(mask) == mask
    assert sum(masks.bits(mask)) == mask


@pytest.mark.parametrize(
    ("text", "mask"),
    [("exit,abort", 0x50), ("0x60", 0x60), ("all", 0x7F), ("process", 0x78), ("thread", 0x07), (" Exit , thread_create ", 0x41)],
)
def test_words(text: str, mask: int) -> None:
    assert masks.parse_mask(text) == mask


@pytest.mark.parametrize("text", ["", ",", "0", "0x0", "0x80", "-1", "exitt", "exit,,abort", "1e3", "exit abort", "0b2"])
def test_malformed_words(text: str) -> None:
    with pytest.raises(BadMaskError):
        masks.parse_mask(text)


@given(st.text(max_size=30))
def test_any_text_is_a_mask_or_a_bad_mask_error(text: str) -> None:
    try:
        mask = masks.parse_mask(text)
    except BadMaskError:
        pass
    else:
        assert 0 < mask <= masks.ALL_EVENTS


@given(st.integers())
def test_any_number_is_checked(mask: int) -> None:
    if 0 < mask <= masks.ALL_EVENTS:
        assert masks.check_mask(mask) == mask
    else:
        with pytest.raises(BadMaskError):
            masks.check_mask(mask)
