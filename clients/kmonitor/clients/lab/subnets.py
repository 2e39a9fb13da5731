# SPDX-License-Identifier: Apache-2.0
"""Which addresses a lab takes: private ones that this machine uses for nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import AddressValueError, IPv4Network, NetmaskValueError

from kmonitor.clients.lab.tools import ip_json
from kmonitor.wire.errors import UsageError

POOLS = ("10.213.0.0/16", "172.29.0.0/16", "192.168.0.0/16", "198.18.0.0/15")
"""Where a subnet is looked for, in this order. The last is for measurements (RFC 2544)."""
PREFIX = 24


def parts(subnet: IPv4Network) -> tuple[IPv4Network, IPv4Network]:
    """The nodes' half of a lab's subnet, and the few addresses of the cable to this machine, from the other half."""
    nodes, rest = subnet.subnets(1)
    return nodes, next(rest.subnets(new_prefix=30))


def in_use() -> list[tuple[IPv4Network, str]]:
    """What this machine has routes for, or addresses in, and the interface. The default route is for what nobody has: it does not count."""
    found = []
    for route in ip_json("-4", "route", "show", "table", "all"):
        destination = str(route["dst"])
        if destination != "default" and route.get("type") not in ("broadcast", "multicast"):
            found.append((IPv4Network(destination, strict=False), str(route.get("dev", route.get("type", "")))))
    return found


def choose(nodes: int) -> IPv4Network:
    """A free one. Raises UsageError if there is none."""
    used = in_use()
    for candidate in _candidates():
        if not any(candidate.overlaps(network) for network, _ in used):
            return _roomy(candidate, nodes)
    raise UsageError("this machine has routes for all addresses that a lab would take: give it some with --subnet, such as 100.64.213.0/24")


def check(text: str, nodes: int) -> IPv4Network:
    """The one that was asked for. Raises UsageError if it is none, too small, or in use."""
    try:
        wanted = IPv4Network(text)
    except (AddressValueError, NetmaskValueError, ValueError) as error:
        raise UsageError(f"--subnet {text!r}: {error}; write 10.213.7.0/24") from None
    for network, device in in_use():
        if wanted.overlaps(network):
            raise UsageError(f"--subnet {text}: this machine has a route for {network} already, through {device}; choose another")
    return _roomy(wanted, nodes)


def _roomy(subnet: IPv4Network, nodes: int) -> IPv4Network:
    # Beside the nodes: the network's own address, the hub's, and that for all.
    if subnet.prefixlen > 29 or parts(subnet)[0].num_addresses < nodes + 3:
        raise UsageError(f"--subnet {subnet} is too small for {nodes} nodes: half of it is theirs; take a /{PREFIX}")
    return subnet


def _candidates() -> Iterator[IPv4Network]:
    for pool in POOLS:
        yield from IPv4Network(pool).subnets(new_prefix=PREFIX)
