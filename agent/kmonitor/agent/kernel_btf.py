# SPDX-License-Identifier: Apache-2.0
"""What the running kernel says of its own types, in BTF (Documentation/bpf/btf.rst), read by libbpf."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from kmonitor.agent.errors import CaptureError
from kmonitor.agent.libbpf import library

_KERNEL_BTF = Path("/sys/kernel/btf/vmlinux")
_KIND_STRUCT = 4
_KIND_TYPEDEF = 8
_TYPE_WORDS = 3  # struct btf_type: name_off, info, size or type
_MEMBER_WORDS = 3  # struct btf_member: name_off, type, offset in bits


def has_kernel_btf() -> bool:
    """Whether the kernel carries it."""
    return _KERNEL_BTF.exists()


class KernelBtf:
    """The kernel's types, as long as the `with` lasts."""

    def __init__(self) -> None:
        """Raises CaptureError if the kernel has none."""
        self._handle: Any = library.btf__load_vmlinux_btf()
        if not self._handle:
            raise CaptureError(f"the kernel has no BTF ({_KERNEL_BTF}): it must be built with CONFIG_DEBUG_INFO_BTF (5.10 or later)")

    def __enter__(self) -> KernelBtf:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        library.btf__free(self._handle)
        self._handle = None

    def tracepoint_arguments(self, name: str) -> int:
        """How many arguments the tracepoint gives to a program; 0 if the kernel has no such tracepoint.

        typedef btf_trace_NAME -> pointer -> function, whose first argument is not given on.
        """
        number = library.btf__find_by_name_kind(self._handle, f"btf_trace_{name}".encode(), _KIND_TYPEDEF)
        if number < 0:
            return 0
        for _ in range(2):
            number = self._type(number)[2]
        return int(self._type(number)[1] & 0xFFFF) - 1

    def offset(self, struct: str, member: str) -> int | None:
        """Of the member, in bytes; None if there is no such struct or member, or it is a bit field."""
        number = library.btf__find_by_name_kind(self._handle, struct.encode(), _KIND_STRUCT)
        bits = None if number < 0 else self._bits(number, member.encode())
        return None if bits is None or bits % 8 else bits // 8

    def _bits(self, number: int, member: bytes) -> int | None:
        words = self._type(number)
        info = words[1]
        is_flagged = info >> 31  # then a member's upper 8 bits are the size of a bit field
        for index in range(info & 0xFFFF):
            at = _TYPE_WORDS + index * _MEMBER_WORDS
            offset = words[at + 2] & 0xFFFFFF if is_flagged else words[at + 2]
            name = library.btf__name_by_offset(self._handle, words[at])
            if name == member:
                return int(offset)
            if not name and (inner := self._bits(words[at + 1], member)) is not None:  # an anonymous struct or union
                return int(offset) + inner
        return None

    def _type(self, number: int) -> Any:
        """As an array of 32-bit words."""
        return library.btf__type_by_id(self._handle, number)
