# SPDX-License-Identifier: Apache-2.0
"""What the real crm_mon and cibadmin of Pacemaker 2.1.5 said (tests/ha/recorded), as the tool takes it."""

from __future__ import annotations

import asyncio
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from kmonitor.clients.ha import cluster_state
from kmonitor.clients.ha.cluster_state import ClusterState
from kmonitor.clients.ha.crm import Crm, CrmError
from kmonitor.clients.ha.processes import Processes
from kmonitor.clients.ha.rules import Rule, Rules
from kmonitor.clients.verdict import Subject

RECORDED = Path(__file__).parent / "recorded"


def state(name: str) -> ClusterState:
    """One of the recorded."""
    cib = (RECORDED / f"{name}.cib.xml").read_text(encoding="utf-8")
    return cluster_state.parse(ET.parse(RECORDED / f"{name}.monitor.xml").getroot(), cib)


class SilentCrm(Crm):
    """Of a node where no agent is installed; answers for one parameter that hangs on a rule."""

    async def metadata(self, agent: str) -> ET.Element:
        raise CrmError(f"{agent} is not installed")

    async def parameter(self, resource: str, name: str) -> str:
        return "/run/as-pacemaker-says.pid" if (resource, name) == ("g2", "pidfile") else ""


def test_where_everything_is() -> None:
    many = state("many")
    places = {(each.id, each.node): each.role for each in many.resources}
    assert places == {
        ("web", "alpha"): "Started",
        ("inst", "alpha"): "Started",
        ("inst", "beta"): "Started",
        ("uinst:0", "beta"): "Started",
        ("uinst:1", "alpha"): "Started",
        ("g1", "beta"): "Started",
        ("g2", "beta"): "Started",
        ("any", "alpha"): "Started",
    }
    assert many.dc == "beta"
    assert all(each.active and each.managed and not each.failed for each in many.resources)
    assert all(node.online and node.member and not node.standby for node in many.nodes.values())
    assert (many.other_member("alpha"), many.other_member("beta")) == ("beta", "alpha")


def test_what_is_under_way() -> None:
    """Recorded in the moment after crm_resource --fail of uinst:1."""
    failing = state("failing").on("uinst:1", "alpha")
    assert failing is not None
    assert (failing.role, failing.failed, failing.active, failing.primitive) == ("Stopping", True, False, "uinst")


def test_a_start_is_told_from_the_one_before() -> None:
    many = state("many")
    assert ("web", "alpha") not in many.starts  # it was cleaned up: only a probe is left of its history
    assert set(many.starts) >= {("any", "alpha"), ("inst", "beta"), ("g1", "beta")}


@pytest.mark.parametrize(
    ("resource", "node", "expected"),
    [
        ("web", "alpha", Subject("web@alpha", "alpha", pidfile="/run/web.pid")),
        ("any", "alpha", Subject("any@alpha", "alpha", pidfile="/var/run/anything_any.pid")),
        ("inst", "beta", Subject("inst@beta", "beta", pidfile="/run/inst.pid")),
        ("g1", "beta", Subject("g1@beta", "beta", pidfile="/run/from-template.pid")),
        ("g2", "beta", Subject("g2@beta", "beta", pidfile="/run/as-pacemaker-says.pid")),
        ("uinst:1", "alpha", "ocf:heartbeat:Dummy has no pidfile"),
    ],
)
def test_which_process(resource: str, node: str, expected: Subject | str) -> None:
    many = state("many")
    found = many.on(resource, node)
    assert found is not None
    assert asyncio.run(Processes(SilentCrm(), Rules()).subject(found, many)) == expected


def test_the_rule_comes_first() -> None:
    rules = Rules({"uinst": Rule(cgroup="uinst.slice", comms=("postgres",)), "web": Rule(ignore=True)}, {"alpha": "alpha.example"})
    many = state("many")
    instance, web = many.on("uinst:1", "alpha"), many.on("web", "alpha")
    assert instance is not None
    assert web is not None
    processes = Processes(SilentCrm(), rules)
    assert asyncio.run(processes.subject(instance, many)) == Subject(
        "uinst:1@alpha", "alpha.example", cgroup="uinst.slice", comms=("postgres",)
    )
    assert asyncio.run(processes.subject(web, many)) == "the configuration says to ignore it"


def test_a_systemd_resource_is_its_unit() -> None:
    many = state("many")
    for agent, unit in (("systemd:nginx", "nginx.service"), ("systemd:web@1.service", "web@1.service")):
        resource = cluster_state.Resource("s", agent, "alpha", "Started")
        assert asyncio.run(Processes(SilentCrm(), Rules()).subject(resource, many)) == Subject("s@alpha", "alpha", unit=unit)
