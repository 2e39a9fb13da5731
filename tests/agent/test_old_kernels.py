# SPDX-License-Identifier: Apache-2.0
"""What the probe asks of a kernel, by its bytes: nothing newer than the oldest kernel it is for. `make vm-load` asks the kernels."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from importlib import resources

import pytest

_HELPERS_OF_5_10 = 155
"""Numbers of helpers that there are in 5.10: bpf_redirect_peer is the last."""
_CALL, _HELPER = 0x85, 0
_ATOMICS, _PLAIN_ADD = {0xC3, 0xDB}, 0
_WIDE = 0x18
_EXECINSTR = 0x4


def instructions() -> Iterator[tuple[int, int, int]]:
    """(opcode, source register, immediate) of all sections of the object that hold code."""
    image = resources.files("kmonitor.agent").joinpath("kmonitor.bpf.o").read_bytes()
    offset, size, count = (*struct.unpack_from("<Q", image, 40), *struct.unpack_from("<HH", image, 58))
    for number in range(count):
        _, _, flags, _, at, length = struct.unpack_from("<IIQQQQ", image, offset + number * size)
        if flags & _EXECINSTR:
            wide = False
            for opcode, registers, _, immediate in struct.iter_unpack("<BBhi", image[at : at + length]):
                if not wide:
                    yield opcode, registers >> 4, immediate
                wide = not wide and opcode == _WIDE


def test_the_probe_calls_no_helper_that_5_10_has_not() -> None:
    called = {immediate for opcode, source, immediate in instructions() if (opcode, source) == (_CALL, _HELPER)}
    assert len(called) > 5
    assert max(called) <= _HELPERS_OF_5_10


def test_of_atomics_only_an_addition() -> None:
    """All others came with 5.12."""
    atomics = {immediate for opcode, _, immediate in instructions() if opcode in _ATOMICS}
    if not atomics:
        pytest.fail("the probe counts what it loses by atomic additions")
    assert atomics == {_PLAIN_ADD}
