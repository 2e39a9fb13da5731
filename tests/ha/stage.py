# SPDX-License-Identifier: Apache-2.0
"""`kmon ha pacemaker` on a real cluster: what it says, and what happens there."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.lab.namespaces import HUB, InsideAgent, Network
from tests.lab.pacemaker import Node, PacemakerCluster
from tests.lab.process import Running
from tests.lab.services import BIN, Broker, Lab

BROKER = f"{HUB}:7221"


class Tool:
    """`kmon ha pacemaker --json` on a node."""

    def __init__(self, running: Running) -> None:
        self.running = running

    def said(self, kind: str, resource: str, start: int = 0) -> list[dict[str, Any]]:
        """What it has said of a resource since line `start`."""
        found = [json.loads(line) for line in self.running.lines[start:]]
        return [each for each in found if each["kind"] == kind and each.get("resource") == resource]

    def next(self, kind: str, resource: str, start: int, limit: float = 20.0, **what: Any) -> dict[str, Any]:
        """The first that it says, from line `start` on."""

        def wanted(line: bytes) -> bool:
            each = json.loads(line)
            return (
                each["kind"] == kind and each.get("resource") == resource and all(each.get(name) == value for name, value in what.items())
            )

        at = self.running.wait_line(wanted, f"{kind} of {resource} {what or ''}", start=start, limit=limit)
        found: dict[str, Any] = json.loads(self.running.lines[at])
        return found

    @property
    def now(self) -> int:
        """Where its next line will stand."""
        return len(self.running.lines)


class Stage:
    """The cluster, kmonitor on it, and what happens there."""

    def __init__(self, lab: Lab, net: Network, folder: Path, *options: str) -> None:
        """`options` are the tool's."""
        self.lab = lab
        self.net = net
        self.options = options
        self.log = folder / "broker.sqlite"
        self.cluster = PacemakerCluster(lab, net, ["alpha", "beta"])
        self.broker = self.start_broker()
        self.agents = {node.name: self.start_agent(node) for node in self.cluster.nodes}
        self._tool: Tool | None = None

    def start_broker(self) -> Broker:
        """At the hub, on its log."""
        return self.lab.broker("--log", f"sqlite:{self.log}", prefix=self.net.prefix, listen=BROKER)

    def start_agent(self, node: Node) -> InsideAgent:
        """With pins, as agents run."""
        return node.machine.agent(self.lab, BROKER, pin=True)

    def start_tool(self, node: str = "alpha", *options: str) -> Tool:
        """Until it says that it is ready. `options`: beside the stage's."""
        running = self.cluster[node].command(BIN / "kmon", "ha", "pacemaker", "--json", "--broker", BROKER, *self.options, *options)
        running.wait_line(lambda line: b'"ready": true' in line, "that it is ready")
        self._tool = Tool(running)
        return self._tool

    @property
    def tool(self) -> Tool:
        """The one that was started last."""
        assert self._tool is not None
        return self._tool

    def stop_tool(self) -> None:
        """As a service manager does."""
        if self._tool is not None:
            self._tool.running.send(signal.SIGTERM)
            self.lab.expect(self._tool.running, 143)
            self._tool = None

    def start_tool_anew(self, *options: str) -> Tool:
        """With other options beside the stage's."""
        self.stop_tool()
        return self.start_tool("alpha", *options)

    def pid(self, resource: str, node: str) -> int:
        """What the pidfile of a resource says."""
        return int(self.cluster[node].file(f"/run/{resource}.pid").read_text(encoding="ascii"))

    def signal(self, resource: str, node: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send its process a signal, from a shell of the node; the pid."""
        pid = self.pid(resource, node)
        self.cluster[node].do("sh", "-c", f"kill -{number.value} {pid}")
        return pid

    def guarded(self, resource: str, node: str) -> int:
        """Until the process of a resource is guarded; its pid."""
        pid = 0

        def reached() -> bool:
            nonlocal pid
            with contextlib.suppress(OSError, ValueError):
                pid = self.pid(resource, node)
                last = [each for each in self.tool.said("guarding", resource) if each["node"] == node][-1:]
                return bool(last) and last[0]["pid"] == pid
            return False

        self.cluster.nodes[0].until(reached, f"{resource} guarded on {node}", 20)
        return pid

    def settled(self, resource: str, node: str) -> int:
        """Until the cluster is idle, has it there, and it is guarded; its pid."""
        self.cluster.wait_active(resource, node)
        self.cluster.wait_idle()
        return self.guarded(resource, node)

    @contextlib.contextmanager
    def failing(self, resource: str, times: int) -> Iterator[None]:
        """What is done inside has it failed so often: not less, and not more."""
        before = self.cluster.failures(resource)
        yield
        self.cluster.wait_idle()
        found = self.cluster.failures(resource) - before
        said = [] if self._tool is None else self._tool.said("outcome", resource)[-4:]
        assert found == times, f"{resource}: failed {found} times, not {times}: {said}"
