# SPDX-License-Identifier: Apache-2.0
"""A broker that moves: another machine takes its name. Agents and monitors are with it in a few seconds, however the old one went."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.namespaces import Machine, Network, namespaces_lack, network
from tests.lab.requires import capture_lack, need
from tests.lab.services import Agent, Broker, Lab
from tests.lab.watch import Watch

NAME = "broker.test"
PORT = 7221

pytestmark = pytest.mark.capture
MOVED_S = 15.0
"""On a busy machine. On a quiet one it is less than a second for a broker that ended, 3.5 s for one that is cut off, 5 to 6 s for one that
has stopped; it was half a minute, or for ever."""


class Site:
    """Machines one and two for brokers; in the hub what connects to them by name, which a hosts file of their own says."""

    def __init__(self, lab: Lab, net: Network, folder: Path) -> None:
        self.lab = lab
        self.hosts = folder / "hosts"
        self.one, self.two = net.machine(lab, "one"), net.machine(lab, "two")
        self._prefix = [*net.prefix, "unshare", "-m", "sh", "-c", f'mount --bind {self.hosts} /etc/hosts && exec "$@"', "sh"]

    def nobody(self, number: int) -> str:
        """An address of the subnet, and nobody's: what is sent there is never answered."""
        return f"{self.one.address.rpartition('.')[0]}.{200 + number}"

    def name(self, *addresses: str) -> None:
        """These are the broker's from now on, in this order."""
        self.hosts.write_text("".join(f"{address} {NAME}\n" for address in ("127.0.0.1 localhost", *addresses)), encoding="ascii")

    def broker(self, machine: Machine) -> Broker:
        """Start one."""
        return self.lab.broker(prefix=("ip", "netns", "exec", machine.namespace), listen=f"{machine.address}:{PORT}")

    def agent(self) -> Agent:
        """Start one, until it is connected."""
        return self.lab.agent("alpha", f"{NAME}:{PORT}", prefix=self._prefix)

    def watch(self) -> Watch:
        """Start one of everything, until it is answered."""
        watch = self.lab.watch(f"{NAME}:{PORT}", "--events", "exit", prefix=self._prefix)
        watch.wait_line(lambda line: b'"registered"' in line, "its registration")
        return watch


@pytest.fixture
def site(lab: Lab, tmp_path: Path) -> Iterator[Site]:
    """Torn down before its network."""
    need(namespaces_lack)
    need(capture_lack)
    with network() as net:
        yield Site(lab, net, tmp_path)
        lab.stop(*reversed(lab.running))


def ends(_: Site, broker: Broker) -> None:
    broker.send(signal.SIGKILL)


def stops(_: Site, broker: Broker) -> None:
    """Its machine still takes connections, and nobody answers on them."""
    broker.send(signal.SIGSTOP)


def is_cut_off(site: Site, _: Broker) -> None:
    site.one.link("down")


@pytest.mark.parametrize("goes", [ends, stops, is_cut_off])
def test_another_machine_takes_the_name(site: Site, goes: Callable[[Site, Broker], None]) -> None:
    site.name(site.one.address)
    old = site.broker(site.one)
    agent, watch = site.agent(), site.watch()
    site.broker(site.two)
    site.name(site.two.address)
    said, seen = len(agent.lines), len(watch.lines)
    try:
        goes(site, old)
        began = time.monotonic()
        agent.wait_connected(said)
        at = watch.wait_line(lambda line: b'"reconnected"' in line, "its way to the new broker", start=seen)
        assert time.monotonic() - began < MOVED_S
        # It is served: by the one that has the agent.
        watch.wait_line(lambda line: b'"registered"' in line and b'"ARMED"' in line, "the node's answer", start=at)
    finally:
        site.lab.kill(old)


@pytest.mark.parametrize("hanging", [1, 3])
def test_addresses_that_hang(site: Site, hanging: int) -> None:
    """Of a name with several: the next is tried beside one that says nothing."""
    site.broker(site.two)
    site.name(*(site.nobody(number) for number in range(hanging)), site.two.address)
    began = time.monotonic()
    site.agent()
    site.watch()
    assert time.monotonic() - began < MOVED_S
