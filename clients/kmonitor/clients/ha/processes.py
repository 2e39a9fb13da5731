# SPDX-License-Identifier: Apache-2.0
"""Which process is a resource's: by the user's rule, by the pidfile that its agent is given or has by default, or by its systemd unit."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from kmonitor.clients.ha.cluster_state import ClusterState, Primitive, Resource
from kmonitor.clients.ha.crm import Crm, CrmAwayError, CrmError
from kmonitor.clients.ha.rules import Rules
from kmonitor.clients.verdict import Subject

PIDFILE_PARAMETERS = ("pidfile", "pid_file", "pid", "PIDFile", "pidfile_name", "named_pidfile", "squid_pidfile", "catalina_pid")
"""What the agents of resource-agents 4.12 call it."""
COMPUTED = {"ocf:heartbeat:anything": "/var/run/anything_{id}.pid"}
"""Defaults that an agent makes of the resource's name, which its metadata cannot say."""


class Processes:
    """Finds them; what was asked once is kept for as long as the configuration is the same."""

    def __init__(self, crm: Crm, rules: Rules) -> None:
        self._crm = crm
        self._rules = rules
        self._defaults: dict[str, dict[str, str]] = {}
        self._asked: dict[tuple[str, str], str] = {}
        self._configuration: tuple[int, int] = (0, 0)

    async def subject(self, resource: Resource, state: ClusterState) -> Subject | str:
        """What to guard of it, or why there is nothing: one line. Raises CrmAwayError."""
        if state.version[:2] != self._configuration:
            self._configuration = state.version[:2]
            self._asked.clear()
        rule = self._rules.of(resource.id, resource.primitive)
        node = self._rules.agent_of(resource.node)
        name = f"{resource.id}@{resource.node}"
        if rule.ignore:
            return "the configuration says to ignore it"
        if rule.names_process:
            return Subject(name, node, pidfile=rule.pidfile, unit=rule.unit, cgroup=rule.cgroup, comms=rule.comms)
        if resource.bundle:
            return f"it runs inside bundle {resource.bundle}: name its process with a rule"
        kind, _, rest = resource.agent.partition(":")
        if kind == "systemd":
            unit = rest if "." in rest else f"{rest}.service"
            return Subject(name, node, unit=unit)
        path = await self._pidfile(resource, state)
        if not path:
            return f"{resource.agent} has no pidfile"
        if not path.startswith("/") or "$" in path:
            return f"its pidfile is {path!r}, which is no absolute path: name it with a rule"
        return Subject(name, node, pidfile=path)

    async def _pidfile(self, resource: Resource, state: ClusterState) -> str:
        primitive = (
            state.primitives.get(resource.id) or state.primitives.get(resource.primitive) or Primitive(resource.id, {}, complete=True)
        )
        for parameter in PIDFILE_PARAMETERS:
            if found := primitive.parameters.get(parameter):
                if primitive.complete:
                    return found
                return await self._ask(resource.id, parameter)
        if resource.agent in COMPUTED:
            return COMPUTED[resource.agent].format(id=resource.id)
        defaults = await self._defaults_of(resource.agent)
        for parameter in PIDFILE_PARAMETERS:
            if parameter in defaults:
                asked = "" if primitive.complete else await self._ask(resource.id, parameter)
                if found := asked or defaults[parameter]:
                    return found
        return ""

    async def _ask(self, resource: str, parameter: str) -> str:
        key = resource, parameter
        if key not in self._asked:
            self._asked[key] = await self._crm.parameter(resource, parameter)
        return self._asked[key]

    async def _defaults_of(self, agent: str) -> dict[str, str]:
        """Parameter -> default, of those that name a pidfile. Nothing if the agent is not installed on this node."""
        if agent not in self._defaults:
            metadata = ET.Element("none")
            try:
                metadata = await self._crm.metadata(agent)
            except CrmAwayError:
                raise
            except CrmError:  # not installed on this node
                pass
            self._defaults[agent] = {
                each.get("name", ""): content.get("default", "") if (content := each.find("content")) is not None else ""
                for each in metadata.iter("parameter")
                if each.get("name") in PIDFILE_PARAMETERS
            }
        return self._defaults[agent]
