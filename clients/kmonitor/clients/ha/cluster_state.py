# SPDX-License-Identifier: Apache-2.0
"""What the cluster has, typed: its nodes, its primitive resources and where each is, from crm_mon's XML and the CIB that it was made of."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

ACTIVE = frozenset({"Started", "Promoted", "Unpromoted", "Master", "Slave"})
"""Roles of a resource that runs and with which nothing is being done. (Master and Slave are Pacemaker's words until 2.1.)"""

Version = tuple[int, int, int]
"""Of a CIB's content: admin_epoch, epoch (configuration), num_updates (status)."""


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """A member, or a remote node."""

    name: str
    online: bool
    standby: bool = False
    maintenance: bool = False
    pending: bool = False
    unclean: bool = False
    shutdown: bool = False
    member: bool = True
    """Runs Corosync and Pacemaker: not a Pacemaker Remote node, guest or bundle."""


@dataclass(frozen=True, slots=True)
class Resource:
    """A primitive, or one instance of a clone, on one node where the cluster has it."""

    id: str
    """As Pacemaker's commands want it: of an instance of a unique clone with its number ("web:1")."""
    agent: str
    """"ocf:heartbeat:anything", "systemd:nginx"."""
    node: str
    role: str
    """"Started", "Starting", "Stopping", "Promoted", ..."""
    pending: str = ""
    """The operation that is under way, as crm_mon words it: "Monitoring", "Migrating", ..."""
    target_role: str = ""
    managed: bool = True
    maintenance: bool = False
    failed: bool = False
    blocked: bool = False
    orphaned: bool = False
    bundle: str = ""
    """Of one that runs inside a container of this bundle."""

    @property
    def primitive(self) -> str:
        """The primitive's id in the configuration."""
        base, colon, number = self.id.rpartition(":")
        return base if colon and number.isdigit() else self.id

    @property
    def active(self) -> bool:
        """It runs, for all that the cluster knows."""
        return self.role in ACTIVE

    @property
    def place(self) -> tuple[str, str]:
        """Resource and node."""
        return self.id, self.node


@dataclass(frozen=True, slots=True)
class Primitive:
    """What the configuration says of one."""

    id: str
    parameters: Mapping[str, str]
    complete: bool
    """False: some parameters hang on rules, or stand elsewhere; Pacemaker itself must be asked."""


@dataclass(frozen=True, slots=True)
class ClusterState:
    """One content of the CIB."""

    version: Version
    dc: str
    """The node that decides; empty while there is none."""
    maintenance: bool
    stopping_all: bool
    nodes: Mapping[str, ClusterNode]
    resources: tuple[Resource, ...]
    """One that is on no node is not there; one that is on two is there twice."""
    primitives: Mapping[str, Primitive] = field(default_factory=dict)
    starts: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """Resource and node -> what tells its last start there from others."""

    def on(self, resource: str, node: str) -> Resource | None:
        """A resource on a node, if the cluster has it there."""
        return next((each for each in self.resources if each.place == (resource, node)), None)

    def other_member(self, local: str) -> str:
        """A member that is online and is not `local`; `local` if there is none."""
        return next((node.name for node in self.nodes.values() if node.member and node.online and node.name != local), local)


def version_of(cib: str) -> Version:
    """Of a CIB's XML, or of its first element alone. Raises ValueError."""
    top = ET.fromstring(cib)
    return int(top.get("admin_epoch", "0")), int(top.get("epoch", "0")), int(top.get("num_updates", "0"))


def parse(monitor: ET.Element, cib: str) -> ClusterState:
    """Of crm_mon's XML, and the CIB that it was made of. Raises ValueError if that is no XML."""
    top = ET.fromstring(cib)
    dc = monitor.find("summary/current_dc")
    options = monitor.find("summary/cluster_options")
    return ClusterState(
        version=version_of(cib),
        dc="" if dc is None else dc.get("name", ""),
        maintenance=_yes(options, "maintenance-mode"),
        stopping_all=_yes(options, "stop-all-resources"),
        nodes={each.get("name", ""): _node(each) for each in monitor.findall("nodes/node")},
        resources=tuple(_resources(monitor.find("resources"))),
        starts=dict(_starts(top)),
        primitives={each.get("id", ""): _primitive(each, top) for each in top.findall(".//resources//primitive")},
    )


def _starts(top: ET.Element) -> Iterator[tuple[tuple[str, str], str]]:
    for node in top.findall("status/node_state"):
        for resource in node.findall("lrm/lrm_resources/lrm_resource"):
            for each in resource.findall("lrm_rsc_op"):
                if each.get("operation") in ("start", "migrate_from") and each.get("op-status") == "0":
                    yield (resource.get("id", ""), node.get("uname", "")), f"{each.get('call-id')} {each.get('transition-key')}"


def _yes(element: ET.Element | None, name: str) -> bool:
    return element is not None and element.get(name) == "true"


def _node(element: ET.Element) -> ClusterNode:
    return ClusterNode(
        name=element.get("name", ""),
        online=_yes(element, "online"),
        standby=_yes(element, "standby") or _yes(element, "standby_onfail"),
        maintenance=_yes(element, "maintenance"),
        pending=_yes(element, "pending"),
        unclean=_yes(element, "unclean"),
        shutdown=_yes(element, "shutdown"),
        member=element.get("type", "member") == "member",
    )


def _resources(above: ET.Element | None, bundle: str = "") -> Iterator[Resource]:
    """Those below an element: groups, clones and bundles hold others."""
    for element in above if above is not None else ():
        if element.tag == "resource":
            for node in element.findall("node"):
                yield Resource(
                    id=element.get("id", ""),
                    agent=element.get("resource_agent", ""),
                    node=node.get("name", ""),
                    role=element.get("role", ""),
                    pending=element.get("pending", ""),
                    target_role=element.get("target_role", ""),
                    managed=_yes(element, "managed"),
                    maintenance=_yes(element, "maintenance"),
                    failed=_yes(element, "failed"),
                    blocked=_yes(element, "blocked"),
                    orphaned=_yes(element, "orphaned"),
                    bundle=bundle,
                )
        else:
            yield from _resources(element, element.get("id", "") if element.tag == "bundle" else bundle)


def _primitive(element: ET.Element, top: ET.Element) -> Primitive:
    """With what its template gives it."""
    parameters: dict[str, str] = {}
    complete = True
    template = element.get("template")
    above = [] if template is None else top.findall(f".//resources/template[@id='{template}']")
    for each in (*above, element):
        for attributes in each.findall("instance_attributes"):
            if attributes.get("id-ref") or attributes.find("rule") is not None or attributes.find("nvpair[@id-ref]") is not None:
                complete = False
            parameters |= {pair.get("name", ""): pair.get("value", "") for pair in attributes.findall("nvpair")}
    return Primitive(element.get("id", ""), parameters, complete)
