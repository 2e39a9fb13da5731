# SPDX-License-Identifier: Apache-2.0
"""A guard of processes on a node that is cut off."""

from __future__ import annotations

from kmonitor.clients import Blindness, Life, ProcessGuard, Subject, connect
from tests.clients.guards import heartbeats, until
from tests.lab.cluster import Cluster
from tests.lab.services import Lab


async def test_a_node_that_is_cut_off(brief_cluster: Cluster, lab: Lab) -> None:
    """Its process dies meanwhile: nobody takes the silence for that, and its cause is told when the node is back."""
    idlers = [brief_cluster.machines["a"].idler(lab) for _ in range(2)]
    async with connect(brief_cluster.address) as monitor, ProcessGuard(monitor) as guard:
        await guard.add(*(Subject(str(n), node="a", pid=idler.pid) for n, idler in enumerate(idlers)))
        brief_cluster.machines["a"].link("down")
        await until(guard, lambda _: all(verdict.blind is Blindness.UNREACHABLE for verdict in guard.verdicts.values()))
        idlers[0].say("3")
        lab.expect(idlers[0], 3)
        await heartbeats(brief_cluster.address, "a")
        assert {verdict.life for verdict in guard.verdicts.values()} == {Life.ALIVE}
        brief_cluster.machines["a"].link("up")
        *_, dead = await until(guard, lambda verdict: verdict.life is Life.DEAD)
        assert (dead.subject.name, str(dead.death)) == ("0", "exit code 3")
        await until(guard, lambda _: guard.verdict("1").blind is None)
        assert guard.verdict("1").life is Life.ALIVE
