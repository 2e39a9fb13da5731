# SPDX-License-Identifier: Apache-2.0
"""EventFilter on a block's columns."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kmonitor.broker.block import Block
from kmonitor.wire.masks import EventType
from kmonitor.wire.record import F_INFERRED
from kmonitor.wire.selectors import Globs

_ENDS = int(EventType.THREAD_ABORT | EventType.THREAD_EXIT | EventType.PROCESS_ABORT | EventType.PROCESS_EXIT)


@dataclass(frozen=True, slots=True)
class Filter:
    """What of a target's events is wanted. Equal filters share their work on a block. An empty tuple is no restriction."""

    comms: tuple[str, ...] = ()
    uids: tuple[int, ...] = ()
    failures_only: bool = False

    def __bool__(self) -> bool:
        """Whether it leaves anything out."""
        return bool(self.comms or self.uids or self.failures_only)

    def keep(self, block: Block) -> npt.NDArray[np.bool_]:
        """Which of the block's records pass: shape (n,)."""
        found: npt.NDArray[np.bool_] | None = block.memo(self)
        if found is None:
            found = np.ones(len(block), dtype=bool)
            if self.uids:
                found &= np.isin(block.column("uid"), np.array(self.uids, dtype=np.uint32))
            if self.failures_only:
                # An inferred exit has no status: it may have been a failure, and must not be left out.
                failed = (block.column("status") != 0) | (block.column("flags") & F_INFERRED != 0)
                found &= (block.column("type") & _ENDS == 0) | failed
            if self.comms:
                found &= _comms_match(block, self.comms)
            block.remember(self, found)
        return found


NO_FILTER = Filter()


_compiled = functools.lru_cache(1 << 14)(Globs)


def _comms_match(block: Block, globs: tuple[str, ...]) -> npt.NDArray[np.bool_]:
    """Globs are tried once for each comm that occurs, as text (bytes that are not UTF-8 replaced), case-sensitive."""
    compiled = _compiled(globs)
    unique, which = np.unique(block.column("comm"), return_inverse=True)
    texts = (bytes(comm).split(b"\0", 1)[0].decode("utf-8", "replace") for comm in unique.tolist())
    matched: npt.NDArray[np.bool_] = np.array([compiled.match(text) for text in texts], dtype=bool)
    return matched[which.reshape(-1)]
