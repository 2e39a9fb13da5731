# SPDX-License-Identifier: Apache-2.0
"""A dict of few values a key, for tables in which nearly every key has but one: see docs/decisions/0019."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value", bound=Hashable)  # and no dict: see `_values`


class Multimap(Generic[Key, Value]):
    """Key -> values, each once, in the order in which they were added. A lone value costs nothing beside the entry of the key."""

    __slots__ = ("_values",)

    def __init__(self) -> None:
        self._values: dict[Key, Value | dict[Value, None]] = {}
        """A lone value is there as it is."""

    def add(self, key: Key, value: Value) -> None:
        """Behind those that the key has; nothing happens if it has it."""
        found = self._values.setdefault(key, value)
        if type(found) is dict:
            found[value] = None
        elif found != value:
            self._values[key] = {found: None, value: None}  # type: ignore[dict-item]  # it is no dict

    def discard(self, key: Key, value: Value) -> None:
        """Nothing happens if the key does not have it."""
        found = self._values.get(key)
        if type(found) is dict:
            found.pop(value, None)
            if len(found) == 1:
                self._values[key] = next(iter(found))
        elif found is not None and found == value:
            del self._values[key]

    def pop(self, key: Key) -> Collection[Value]:
        """All that the key has, which are taken out."""
        return _several(self._values.pop(key, None))

    def get(self, key: Key, default: Collection[Value] = ()) -> Collection[Value]:
        """What the key has: of more than one a view, as of a dict; `default` if it has none."""
        found = self._values.get(key)
        return default if found is None else _several(found)

    def has(self, key: Key, value: Value) -> bool:
        """Whether the key has this value."""
        found = self._values.get(key)
        return value in found if type(found) is dict else found == value

    def keys(self) -> Collection[Key]:
        """A view, as of a dict."""
        return self._values.keys()

    def values(self) -> Iterator[Value]:
        """All values of all keys."""
        for found in self._values.values():
            yield from _several(found)

    def clear(self) -> None:
        """Take all out."""
        self._values.clear()

    def __getitem__(self, key: Key) -> Collection[Value]:
        return _several(self._values[key])

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[Key]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _several(found: Value | dict[Value, None] | None) -> Collection[Value]:
    if type(found) is dict:
        return found.keys()
    return () if found is None else (found,)  # type: ignore[return-value]  # it is no dict
