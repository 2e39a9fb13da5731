# SPDX-License-Identifier: Apache-2.0
"""Whether what a monitor knows is fresh. Told by this side's monotonic clock: the clocks of the nodes are not compared with it."""

from __future__ import annotations

from dataclasses import dataclass

from kmonitor.clients.notifications import Fresh, NodeChange, NodeState, Progress, Registered, RegistrationState, Stale

_AWAY = (NodeState.UNREACHABLE, NodeState.GONE)


@dataclass(slots=True)
class _Node:
    complete_ns: int  # the node's own clock
    moved: float  # when it last moved on, or when we began to look
    away: bool = False


class Freshness:
    """Of one stream. Knows no clock: `now` is in seconds, of any clock that only goes forward."""

    def __init__(self, stale_after: float) -> None:
        self._stale_after = stale_after
        self._heard: float | None = None  # when the last progress came on this connection; None before the first
        self._silent_since: float | None = None  # set while the whole path is told to be stale
        self._nodes: dict[str, _Node] = {}
        self._stale: dict[str, float] = {}  # node that is told to be stale -> since when

    def connected(self) -> None:
        """A new connection: nobody has said anything on it yet. What was told to be stale is so still."""
        self._heard = None
        self._nodes.clear()

    def progress(self, now: float, notice: Progress) -> list[Stale | Fresh]:
        """What the heartbeat makes known. A node that it leaves out is none of ours now, or we are behind: that tells nothing."""
        told: list[Stale | Fresh] = []
        if self._silent_since is not None:
            told.append(Fresh(None, now - self._silent_since))
            self._silent_since = None
            self._look_anew(now)
        self._heard = now
        listed = {at.node: at.time_unix_nano for at in notice.nodes}
        for name, complete_ns in listed.items():
            node = self._nodes.setdefault(name, _Node(complete_ns, now))
            if complete_ns != node.complete_ns:  # also if its clock was set back
                node.complete_ns, node.moved = complete_ns, now
                since = self._stale.pop(name, None)
                if since is not None:
                    told.append(Fresh(name, now - since))
            elif not node.away and name not in self._stale and now - node.moved >= self._stale_after:
                self._stale[name] = node.moved
                told.append(Stale(name, now - node.moved))
        self._nodes = {name: node for name, node in self._nodes.items() if node.away or name in listed}
        return told

    def silent(self, now: float) -> list[Stale | Fresh]:
        """To be called every now and then: what the lack of a heartbeat makes known."""
        if self._heard is None or self._silent_since is not None or now - self._heard < self._stale_after:
            return []
        self._silent_since = self._heard
        return [Stale(None, now - self._heard)]

    def not_listening(self, now: float) -> None:
        """To be called instead while nothing is read, or nothing is registered: it is not the others who are silent."""
        if self._heard is not None:
            self._heard = now
        self._look_anew(now)

    def node_changed(self, now: float, notice: NodeChange) -> None:
        """The broker knows itself that it does not hear a node, or that it hears it again."""
        if notice.state is NodeState.GONE:
            self._stale.pop(notice.node, None)
        self._hears(now, notice.node, away=notice.state in _AWAY)

    def registered(self, now: float, notice: Registered) -> None:
        """So do the answers to registrations tell."""
        if notice.node and not notice.error:
            self._hears(now, notice.node, away=notice.state is RegistrationState.NODE_UNREACHABLE)

    def _hears(self, now: float, name: str, *, away: bool) -> None:
        node = self._nodes.get(name)
        if node is None:
            if not away:
                return  # the first progress will tell from where on to look
            node = self._nodes[name] = _Node(0, now)
        if node.away != away:
            node.away, node.moved = away, now

    def _look_anew(self, now: float) -> None:
        for node in self._nodes.values():
            node.moved = now


def complete_until(known: dict[str, int], item: object) -> dict[str, int]:
    """node -> complete up to this time (Unix nanoseconds, by the node's clock), when this item is taken too."""
    if isinstance(item, Progress):
        return known | {node.node: node.time_unix_nano for node in item.nodes}
    if isinstance(item, NodeChange) and item.state is NodeState.GONE:
        return {node: time for node, time in known.items() if node != item.node}
    return known
