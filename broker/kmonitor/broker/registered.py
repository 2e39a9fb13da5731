# SPDX-License-Identifier: Apache-2.0
"""The registrations of one session that stand, by key."""

from __future__ import annotations

from collections.abc import Iterator, ValuesView

from kmonitor.broker.filters import Filter
from kmonitor.broker.keys import Key
from kmonitor.broker.multimap import Multimap
from kmonitor.broker.registrations import Registration


class Registered:
    """At most one registration of a key. Knows the ids in use, so that no request is held against all registrations."""

    __slots__ = ("_about", "_by_key", "_highest", "_ids", "node_wide_filters")

    def __init__(self) -> None:
        self._by_key: dict[Key, Registration] = {}
        self._about: Multimap[str, Registration] = Multimap()
        """By each node that they name; by "" those that may select any node."""
        self.node_wide_filters: dict[Filter, int] = {}
        """Of those of all processes of a node: how many have each."""
        self._highest = -1
        """No id above it was ever in use."""
        self._ids: set[int] | None = None
        """Those in use, once a client has come with one that was not the highest so far: most count upwards."""

    def get(self, key: Key) -> Registration | None:
        """The one with this key."""
        return self._by_key.get(key)

    def uses(self, request_id: int) -> bool:
        """Whether this is the id of one."""
        if request_id > self._highest:
            return False
        if self._ids is None:
            self._ids = {registration.id for registration in self._by_key.values()}
        return request_id in self._ids

    def add(self, registration: Registration) -> bool:
        """Take it in, or find it there. False if there is another one with its key, which stays."""
        if self._by_key.setdefault(registration.key, registration) is not registration:
            return False
        if registration.key.target is None:
            wanted = registration.key.terms.filter
            self.node_wide_filters[wanted] = self.node_wide_filters.get(wanted, 0) + 1
        for name in _nodes_of(registration):
            self._about.add(name, registration)
        self._highest = max(self._highest, registration.id)
        if self._ids is not None:
            self._ids.add(registration.id)
        return True

    def remove(self, registration: Registration) -> bool:
        """Take it out. False if it is not there."""
        if self._by_key.get(registration.key) is not registration:
            return False
        del self._by_key[registration.key]
        for name in _nodes_of(registration):
            self._about.discard(name, registration)
        if registration.key.target is None:
            wanted = registration.key.terms.filter
            self.node_wide_filters[wanted] -= 1
            if not self.node_wide_filters[wanted]:
                del self.node_wide_filters[wanted]
        if self._ids is not None:
            self._ids.discard(registration.id)
        return True

    def clear(self) -> None:
        """Take all out."""
        self._by_key.clear()
        self._about.clear()
        self.node_wide_filters.clear()
        self._ids = None

    def about(self, node: str) -> Iterator[Registration]:
        """Those that can be about a node: no other selects it. They may be taken out meanwhile."""
        for name in (node, ""):
            yield from tuple(self._about.get(name))

    def values(self) -> ValuesView[Registration]:
        """All, in the order in which they came."""
        return self._by_key.values()

    def __len__(self) -> int:
        return len(self._by_key)


def _nodes_of(registration: Registration) -> tuple[str, ...]:
    terms = registration.key.terms
    return terms.exact_names if terms.exact else ("",)
