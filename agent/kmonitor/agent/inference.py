# SPDX-License-Identifier: Apache-2.0
"""Ends that nobody recorded: the broker names the processes, and the source makes an inferred record of each that is really gone."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from kmonitor.agent.interest import InterestTable
from kmonitor.agent.procfs import is_other_grain
from kmonitor.agent.source import Source
from kmonitor.v1 import agent_pb2

_RETRY_S = 0.1
_AT_ONCE = 1000
"""Some 20 us each; the rest when it is tried again. Blocks must not wait for long."""
_REFUSALS_MOST = 16
"""So many in a row: there is no room for the others either."""


class Inference:
    """Of one stream, and forgotten with it: the broker asks again on the next. Called from one thread."""

    def __init__(self, source: Source, interest: InterestTable, wake: Callable[[], None]) -> None:
        """`wake` is called behind records that were made."""
        self._source = source
        self._interest = interest
        self._wake = wake
        self._asked: set[tuple[int, int]] = set()
        """Pid and start time of processes whose end is still to be told."""
        self._again = asyncio.Event()

    def ask(self, request: agent_pb2.InferExits) -> None:
        """Tell the ends of these, now or as soon as there is room. Raises BpfError."""
        self._asked.update((process.pid, process.start_time) for process in request.processes if process.pid and process.start_time)
        self._tell()

    async def run(self) -> None:
        """Try again what found no room, for ever."""
        while True:
            await self._again.wait()
            await asyncio.sleep(_RETRY_S)
            self._tell()

    def _tell(self) -> None:
        """Each is looked up anew: a death is never told of a process that lives."""
        self._source.catch_up()
        some = list(itertools.islice(self._asked, _AT_ONCE))
        found = self._source.processes.look_up([pid for pid, _ in some])
        made, refusals = False, 0
        for pid, start_boottime_ns in some:
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
        if self._asked:
            self._again.set()
        else:
            self._again.clear()
