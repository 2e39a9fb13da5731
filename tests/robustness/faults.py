# SPDX-License-Identifier: Apache-2.0
"""What can be done to a rig, by name: each is begun, lasts a while, and is mended. For random runs (soak.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from tests.robustness.listener import Listener
from tests.robustness.rig import Rig


@dataclass(frozen=True)
class Fault:
    """One thing that can happen. Two of the same subject do not happen at once."""

    name: str
    subject: str
    happens: Callable[[], AbstractContextManager[None]]
    keeps_log: bool = True
    """Nothing of the broker's is lost though its log be in memory."""


@contextlib.contextmanager
def agent_killed(rig: Rig, node: str) -> Iterator[None]:
    """Its pins stay, and the next one finds them."""
    rig.kill_agent(node)
    yield
    rig.restart_agent(node, wait=False)


@contextlib.contextmanager
def broker_killed(rig: Rig) -> Iterator[None]:
    """Another one comes, at the same address, on the same log."""
    rig.kill_broker()
    yield
    rig.start_broker()


@contextlib.contextmanager
def broker_ended(rig: Rig) -> Iterator[None]:
    """By SIGTERM: in order."""
    code = rig.end_broker()
    if code != 0:
        raise rig.broker.failure(f"ended with {code} after SIGTERM")
    yield
    rig.start_broker()


@contextlib.contextmanager
def monitor_killed(listener: Listener) -> Iterator[None]:
    """It comes back with its cursor."""
    listener.kill()
    yield
    listener.again()


def faults(rig: Rig, monitors: dict[str, Listener], mortal: set[str]) -> list[Fault]:
    """All that can happen here. `mortal` are the monitors that may be killed."""
    found: list[Fault] = []
    for node in rig.machines:
        found += [
            Fault(f"agent of {node} killed", f"agent {node}", lambda node=node: agent_killed(rig, node)),  # type: ignore[misc]
            Fault(f"agent of {node} stopped", f"agent {node}", lambda node=node: rig.agent_stopped(node)),  # type: ignore[misc]
            Fault(f"link of {node} down", f"link {node}", lambda node=node: rig.cut(node)),  # type: ignore[misc]
        ]
    found += [
        Fault("broker stopped", "broker", rig.broker_stopped),
        Fault("broker killed", "broker", lambda: broker_killed(rig), keeps_log=False),
        Fault("broker terminated", "broker", lambda: broker_ended(rig), keeps_log=False),
        Fault("link of the broker down", "link broker", lambda: rig.cut("broker")),
    ]
    for name, listener in monitors.items():
        found.append(Fault(f"monitor {name} stopped", f"monitor {name}", listener.stopped))
        if name in mortal:
            found.append(Fault(f"monitor {name} killed", f"monitor {name}", lambda listener=listener: monitor_killed(listener)))  # type: ignore[misc]
    return found
