# SPDX-License-Identifier: Apache-2.0
"""Who wants what of one process."""

from __future__ import annotations

from collections.abc import Collection, Hashable

from kmonitor.broker.block import ProcessKey

Claim = Hashable
"""Who wants it: one registration of one session."""

FOLLOWS, ROOT = 0x80, 0x100
"""In what a claim wants, beside its mask: the children too; of this very process, which follows."""


class ProcessClaims:
    """Who claims one (pid, start time); start time 0 is whichever process has the pid. Most have one claim."""

    __slots__ = ("_claims", "_wanted", "key", "sent")

    def __init__(self, key: ProcessKey) -> None:
        self.key = key
        self.sent = 0
        """What the agent was told: a mask, and whether to follow, as in `wanted`."""
        self._claims: Claim | dict[Claim, int] = None
        """Claim -> what it wants; or the only one, which wants `_wanted`; or None."""
        self._wanted = 0

    def put(self, claim: Claim, wanted: int) -> None:
        """In place of what it wanted before."""
        if isinstance(self._claims, dict):
            self._claims[claim] = wanted
        elif self._claims is None or self._claims == claim:
            self._claims, self._wanted = claim, wanted
        else:
            self._claims = {self._claims: self._wanted, claim: wanted}

    def wanted(self, claim: Claim) -> int | None:
        """What a claim wants; None if it is not one of this process."""
        if isinstance(self._claims, dict):
            return self._claims.get(claim)
        return self._wanted if self._claims is not None and self._claims == claim else None

    def pop(self, claim: Claim) -> int | None:
        """The same, and it is none any more."""
        if isinstance(self._claims, dict):
            return self._claims.pop(claim, None)
        wanted = self.wanted(claim)
        if wanted is not None:
            self._claims = None
        return wanted

    @property
    def claims(self) -> Collection[Claim]:
        """All of them."""
        if isinstance(self._claims, dict):
            return self._claims.keys()
        return () if self._claims is None else (self._claims,)

    def union(self) -> int:
        """Of what all its claims want."""
        if isinstance(self._claims, dict):
            found = 0
            for wanted in self._claims.values():
                found |= wanted
            return found
        return 0 if self._claims is None else self._wanted
