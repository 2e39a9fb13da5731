# SPDX-License-Identifier: Apache-2.0
"""As much of BTF (Documentation/bpf/btf.rst) as it takes to know where the fields of an object's structs lie."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

_STRUCT, _UNION, _ARRAY, _INT, _TYPEDEF = 4, 5, 3, 1, 8
_EXTRA = {1: 4, 3: 12, 14: 4, 17: 4}  # bytes behind the common part, by kind
_EXTRA_PER_MEMBER = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}
_ALIASES = {8, 9, 10, 11, 18}


@dataclass(frozen=True)
class _Type:
    name: str
    kind: int
    size_or_type: int
    members: list[tuple[str, int, int]]
    """(name, type, bit offset)."""
    element: int
    count: int


class Btf:
    """The types of one object file."""

    def __init__(self, path: Path) -> None:
        self._types: list[_Type] = []
        self._parse(_section(path.read_bytes(), ".BTF"))

    def size(self, name: str) -> int:
        """Of a struct, in bytes."""
        return self._struct(name).size_or_type

    def fields(self, name: str) -> dict[str, tuple[int, int]]:
        """Field -> (offset, size) in bytes; those of nested structs as "outer.inner", of unnamed unions as their own."""
        found: dict[str, tuple[int, int]] = {}
        self._collect(self._struct(name), "", 0, found)
        return found

    def _collect(self, kind: _Type, prefix: str, base: int, found: dict[str, tuple[int, int]]) -> None:
        for member, number, bits in kind.members:
            inner = self._resolve(number)
            offset = base + bits // 8
            path = prefix + member
            if inner.kind in (_STRUCT, _UNION):
                self._collect(inner, path + "." if member else prefix, offset, found)
            else:
                found[path] = (offset, self._size(number))

    def _struct(self, name: str) -> _Type:
        return next(each for each in self._types if each.kind == _STRUCT and each.name == name)

    def _resolve(self, number: int) -> _Type:
        while (kind := self._types[number - 1]).kind in _ALIASES:
            number = kind.size_or_type
        return kind

    def _size(self, number: int) -> int:
        kind = self._resolve(number)
        return kind.count * self._size(kind.element) if kind.kind == _ARRAY else kind.size_or_type

    def _parse(self, data: bytes) -> None:
        header_length, type_offset, type_length, string_offset, _ = struct.unpack_from("<IIIII", data, 4)
        strings = data[header_length + string_offset :]
        at, end = header_length + type_offset, header_length + type_offset + type_length

        def text(offset: int) -> str:
            return strings[offset : strings.index(b"\0", offset)].decode()

        while at < end:
            name, info, size_or_type = struct.unpack_from("<III", data, at)
            kind, count = info >> 24 & 0x1F, info & 0xFFFF
            at += 12
            members: list[tuple[str, int, int]] = []
            element = length = 0
            if kind in (_STRUCT, _UNION):
                for index in range(count):
                    member, number, bits = struct.unpack_from("<III", data, at + 12 * index)
                    members.append((text(member), number, bits & 0xFFFFFF if info >> 31 else bits))
            elif kind == _ARRAY:
                element, _, length = struct.unpack_from("<III", data, at)
            at += _EXTRA.get(kind, 0) + count * _EXTRA_PER_MEMBER.get(kind, 0)
            self._types.append(_Type(text(name), kind, size_or_type, members, element, length))


def _section(elf: bytes, wanted: str) -> bytes:
    """A section of a 64-bit little-endian ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + size * index) for index in range(count)]
    strings = headers[names][4]
    for name, _, _, _, offset, length in headers:
        start = strings + name
        if elf[start : elf.index(b"\0", start)].decode() == wanted:
            return elf[offset : offset + length]
    raise LookupError(f"no section {wanted}: the object was stripped of its BTF")
