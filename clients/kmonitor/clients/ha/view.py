# SPDX-License-Identifier: Apache-2.0
"""The cluster as it is known here: kept up to date cheaply, and made certain where something hangs on it."""

from __future__ import annotations

import asyncio

from kmonitor.clients.ha import cluster_state
from kmonitor.clients.ha.cluster_state import ClusterState
from kmonitor.clients.ha.crm import IDLE, Crm, CrmAwayError, CrmError


class View:
    """One cluster, from its node `local`."""

    def __init__(self, crm: Crm, local: str) -> None:
        self._crm = crm
        self._local = local
        self._refreshing = asyncio.Lock()
        self._cib = ""
        self.state: ClusterState | None = None

    async def update(self) -> None:
        """See whether this node knows of another content, and if so read it. Raises CrmError."""
        version = _version(await self._crm.version())
        if self.state is None or version != self.state.version:
            await self._read("")

    async def idle(self) -> bool:
        """Whether the cluster has nothing to do: every operation that it ever ordered has its result in what `now` gives after this.
        Raises CrmError."""
        state = self.state
        if state is None or not state.dc:
            await self._read("")
            raise CrmAwayError("the cluster has no DC now")
        controller = await self._crm.controller_state(state.dc)
        if controller == "S_NOT_DC":
            await self._read("")
            raise CrmAwayError(f"{state.dc} is not the DC any more")
        return controller == IDLE

    async def now(self) -> ClusterState:
        """The cluster with every change that any node knew of when this was called. Raises CrmError."""
        state = self.state
        if state is None:
            return await self._read("")
        other = state.other_member(self._local)
        if _version(await self._crm.cib_version(other)) != state.version:
            return await self._read(other)
        return state

    async def planned(self, resource: str) -> bool:
        """Whether the scheduler would do something with it, by the CIB that was read last."""
        return resource in await self._crm.planned(self._cib)

    async def _read(self, node: str) -> ClusterState:
        async with self._refreshing:
            cib = await self._crm.cib(node)
            try:
                state = cluster_state.parse(await self._crm.monitor(cib), cib)
            except (ValueError, SyntaxError) as error:  # ET.ParseError is a SyntaxError
                raise CrmError(f"cibadmin printed what is no CIB ({error})") from None
            self.state, self._cib = state, cib
            return state


def _version(text: str) -> cluster_state.Version:
    try:
        return cluster_state.version_of(text)
    except (ValueError, SyntaxError) as error:
        raise CrmError(f"cibadmin printed what is no CIB ({error})") from None
