# SPDX-License-Identifier: Apache-2.0
"""A network that is all in namespaces: a bridge in one, the hub, and one for each node, with a cable to the bridge."""

from __future__ import annotations

from ipaddress import IPv4Network
from pathlib import Path

from kmonitor.clients.lab.processes import PROC
from kmonitor.clients.lab.tools import ip, ip_json
from kmonitor.wire.errors import KmonitorError

NETNS = Path("/run/netns")
"""Where ip-netns(8) keeps namespaces by their names."""


class Network:
    """By a name that its namespaces' names begin with: NAME-hub, NAME-NODE. Making the object makes nothing."""

    def __init__(self, name: str, subnet: IPv4Network) -> None:
        """`subnet` is the nodes'; its addresses exist in the network's own namespaces only."""
        self.name = name
        self.subnet = subnet
        self.hub = self.namespace("hub")
        self.hub_address = str(subnet[1])
        self.prefix = ["nsenter", f"--net={NETNS / self.hub}", "--"]
        """What to run a command with, so that it runs at the hub. It keeps its pid."""

    def namespace(self, node: str) -> str:
        """Of a node's, its name in ip-netns(8)."""
        return f"{self.name}-{node}"

    def make(self) -> None:
        """The hub. Raises KmonitorError, as all here does."""
        self._namespace(self.hub)
        ip("-n", self.hub, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.hub, "addr", "add", f"{self.hub_address}/{self.subnet.prefixlen}", "dev", "bridge")
        ip("-n", self.hub, "link", "set", "bridge", "up")

    def add(self, node: str, number: int) -> str:
        """A namespace for a node, with its cable; its address, which is the subnet's `number`-th, from 2 on."""
        namespace = self.namespace(node)
        address = str(self.subnet[number])
        self._namespace(namespace)
        ip("-n", self.hub, "link", "add", f"to-{node}", "type", "veth", "peer", "name", "eth0", "netns", namespace)
        ip("-n", self.hub, "link", "set", f"to-{node}", "master", "bridge", "up")
        ip("-n", namespace, "addr", "add", f"{address}/{self.subnet.prefixlen}", "dev", "eth0")
        self.link(node, "up")
        return address

    def link(self, node: str, state: str) -> None:
        """Take a node's network "down", or bring it "up"."""
        ip("-n", self.namespace(node), "link", "set", "eth0", state)

    def is_there(self, node: str) -> bool:
        """Whether there is a namespace for it."""
        return (NETNS / self.namespace(node)).exists()

    def is_up(self, node: str) -> bool:
        """Whether its network was left up. False if it has none."""
        try:
            return any("UP" in link["flags"] for link in ip_json("-n", self.namespace(node), "link", "show", "dev", "eth0"))
        except KmonitorError:
            return False

    def unplug(self, node: str) -> None:
        """Take a node's cable away: from here on nothing of its reaches anybody, not even the kernel's word that a connection is over."""
        ip("-n", self.hub, "link", "del", f"to-{node}")

    def remove(self, node: str) -> None:
        """A node's namespace, and the cable with it. What runs there must have ended."""
        ip("netns", "del", self.namespace(node))

    def namespaces(self) -> list[str]:
        """Those that are there, the hub last: also those that another process made under this name."""
        if not NETNS.is_dir():
            return []
        found = sorted(entry.name for entry in NETNS.iterdir() if entry.name.startswith(f"{self.name}-"))
        return sorted(found, key=lambda name: name == self.hub)

    def close(self) -> None:
        """Remove the namespaces. All that runs there must have ended before."""
        wrong: list[str] = []
        for namespace in self.namespaces():
            try:
                ip("netns", "del", namespace)
            except KmonitorError as error:
                wrong.append(str(error))
        if wrong:
            raise KmonitorError("; ".join(wrong))

    def _namespace(self, name: str) -> None:
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")


Identity = tuple[int, int]
"""Of a network namespace: device and inode. No two that are there at the same time have the same."""


def identity(file: Path) -> Identity | None:
    """Of the namespace that a file stands for; None if there is none, or one may not know."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def is_in(pid: int, namespace: Identity) -> bool:
    """Whether a process is in a network namespace. One that has ended is in none."""
    return identity(PROC / str(pid) / "ns" / "net") == namespace


def pids_in(namespace: Identity) -> list[int]:
    """The processes that are in a network namespace now."""
    return [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit() and is_in(int(entry.name), namespace)]
