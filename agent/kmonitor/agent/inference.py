# SPDX-License-Identifier: Apache-2.0
"""Ends that nobody recorded: the broker names the processes, and the source makes an inferred record of each that is really gone."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable

from kmonitor.agent.interest import InterestTable
from kmonitor.agent.procfs import is_other_grain
from kmonitor.agent.slices import in_slices, in_thread
from kmonitor.agent.source import Source
from kmonitor.v1 import agent_pb2
from kmonitor.wire.errors import KmonitorError

log = logging.getLogger("kmonitor-agent")

_RETRY_S = 0.1
_AT_ONCE = 1000
"""Some 20 us each; the rest when it is tried again. Blocks must not wait for long."""
_REFUSALS_MOST = 16
"""So many in a row: there is no room for the others either."""


class Inference:
    """Of one stream, and forgotten with it: the broker asks again on the next. Owned by the event loop's thread."""

    def __init__(self, source: Source, interest: InterestTable, wake: Callable[[], None]) -> None:
        """`wake` is called behind records that were made."""
        self._source = source
        self._interest = interest
        self._wake = wake
        self._asked: set[tuple[int, int]] = set()
        """Pid and start time of processes whose end is still to be told."""
        self._again = asyncio.Event()

    async def ask(self, request: agent_pb2.InferExits) -> None:
        """Tell the ends of these, as soon as they were looked up and there is room."""
        async for process in in_slices(request.processes):
            if process.pid and process.start_time:
                self._asked.add((process.pid, process.start_time))
        self._again.set()

    async def run(self) -> None:
        """Tell the ends that are asked for, for ever; what found no room is tried again."""
        while True:
            await self._again.wait()
            self._again.clear()
            try:
                await self._tell()
            except (KmonitorError, OSError) as error:
                log.warning("the end of %d processes cannot be told, trying again: %s", len(self._asked), error)
            if self._asked:
                await asyncio.sleep(_RETRY_S)
                self._again.set()

    async def _tell(self) -> None:
        """Each is looked up anew: a death is never told of a process that lives."""
        some = list(itertools.islice(self._asked, _AT_ONCE))
        found = await in_thread(lambda: self._source.processes.look_up([pid for pid, _ in some]))
        self._source.catch_up()
        made, refusals = False, 0
        async for pid, start_boottime_ns in in_slices(some):
            if pid in found.hidden:
                continue
            known = found.get(pid)
            if known is not None and known.start_boottime_ns != start_boottime_ns:
                if known.live and is_other_grain(known.start_boottime_ns, start_boottime_ns):
                    self._asked.discard((pid, start_boottime_ns))
                    continue
                known = None  # the pid was given out again
            # A zombie that the source has an entry for was not told yet, but is about to be.
            if known is None or (not known.live and not self._interest.will_tell(pid, start_boottime_ns)):
                if not self._source.infer_exit(pid, start_boottime_ns, known):
                    refusals += 1
                    if refusals == _REFUSALS_MOST:
                        break
                    continue
                made, refusals = True, 0
            self._asked.discard((pid, start_boottime_ns))
        if made:
            self._wake()
