# SPDX-License-Identifier: Apache-2.0
"""Source "netlink": the kernel's proc connector, for hosts where BPF is not allowed.

The same records as from the probe. What the connector does not say stays empty: who sent a signal, an out-of-memory kill, the control
group, the thread that made a thread; docs/events.md has all of it. Matching is done here, and not in the kernel: every process event of
the node is a message to this socket, so while nobody asks for anything there is none.
"""

from __future__ import annotations

import math
import time

from kmonitor.agent.errors import CaptureError
from kmonitor.agent.maps import LOST_FOLLOW, LOST_NODE, Watched
from kmonitor.agent.pins import PinFolder
from kmonitor.agent.probe import ProbeOptions
from kmonitor.agent.processes import Found, comm_bytes
from kmonitor.agent.procfs import ProcTable
from kmonitor.agent.secret import make_secret
from kmonitor.agent.sources.connector import Batch, Connector
from kmonitor.agent.sources.lineage import Kin
from kmonitor.agent.sources.memory_ring import MemoryRing, Pause
from kmonitor.agent.sources.memory_tables import MemoryControl, WatchedTable
from kmonitor.agent.sources.proc_events import ProcEvents
from kmonitor.agent.sources.reconcile import DELIBERATION_NS, Reconciliation
from kmonitor.wire.record import RECORD_VERSION

_AT_ONCE = 8192
"""Messages that are taken before something else gets its turn."""
_RATE_WINDOW_NS = 20e6
_NAP_MESSAGES = 20
"""So many messages within about the window are many. The nap is as long as it takes for some to gather: a wake-up of the
event loop costs far more than a message."""
_NAP_LEAST_S = 0.001
_NAP_MOST_S = 0.005
_ASKED_NS = 5_000_000_000
"""For so long is known who was waited for. Who asks goes on asking, at far shorter intervals."""
_LINGER_S = 1.0
"""The socket stays open for so long when nobody asks for anything: where monitors come and go, making it anew costs 0.4 ms each time."""


def load(options: ProbeOptions, pins: PinFolder | None) -> Netlink:
    """Start it. There is nothing to pin: what happens while no agent runs is not captured.

    Raises CaptureError, MissingCapabilityError.
    """
    del pins
    if options.scope != "host":
        raise CaptureError("source netlink knows all processes of the host and no pid namespace: use --scope host")
    return Netlink(options)


class Netlink:
    """The proc connector as a Source. All calls are made from one thread."""

    name = "netlink"
    adopted = False
    record_version = RECORD_VERSION
    watched_cgroups = None

    def __init__(self, options: ProbeOptions) -> None:
        self.epoch = time.time_ns()
        self.secret = make_secret()
        self.processes = ProcTable()
        self.control = MemoryControl(self._on_masks)
        self.watched = WatchedTable(options.watched_max, self._on_entry)
        self._buffer_bytes = options.ring_bytes
        self._batch = Batch()
        self.connector: Connector | None = None
        """While somebody asks for something, and a moment longer."""
        self._missing = 0
        self._level = 0.0  # messages of late: each counts for less the longer ago it was
        self._taken_ns = 0
        self._idle_since_ns = 0
        self._lingering = False
        self._preparing = False
        """Something is about to be asked for."""
        self._asked: dict[tuple[int, int], int] = {}
        """Pid and start time of processes that are gone and whose message is waited for: since when."""
        self.received = 0
        """Messages that were taken since the start."""
        Connector(self._buffer_bytes, self._batch).close()  # what is wrong is said at the start, and not when somebody asks
        self.ring = MemoryRing(options.ring_bytes, self.control, self._take_in)
        self._events = ProcEvents(self.ring, self.control, self.watched)
        self._reconciliation = Reconciliation(self._events)

    async def prepare(self, node_mask: int) -> None:
        """Know every process before something is asked for the whole node. See source.Source."""
        if not node_mask or self._events.wide:
            return
        self._preparing = True
        try:
            self._listen()
            await self._events.widen()
        finally:
            self._preparing = False

    def begin_epoch(self) -> None:
        """Name the ring anew, with what is in it."""
        self.epoch = max(time.time_ns(), self.epoch + 1)

    def catch_up(self) -> None:
        """Take all messages of what has happened so far.

        A message's time is taken before it is put into the socket: who has read a later one has read all that were there.
        """
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        while self._drain(now):
            pass
        self._after_drain()

    def infer_exit(self, pid: int, start_boottime_ns: int, known: Found | None = None) -> bool:
        """Put the end of a process that is gone into the ring; False if it has no room for it. See source.Source.

        /proc does not show the process any more, but its message may be just on its way (reconcile.py): that is waited for first.
        """
        self.catch_up()
        now = _boottime()
        self._asked = {key: since for key, since in self._asked.items() if now - since < _ASKED_NS}
        process = pid, start_boottime_ns
        kin = self._events.kins.get(pid)
        if kin is not None and kin.start_ns == start_boottime_ns and kin.live:
            if now - self._asked.setdefault(process, now) < DELIBERATION_NS or not self.ring.has_room():
                return False
        elif process in self._asked:
            del self._asked[process]  # the message came meanwhile
            return True
        elif not self.ring.has_room():
            return False
        elif known is not None:
            kin = Kin(pid, start_boottime_ns, known.ppid, known.uid, known.gid, comm_bytes(known.comm))
        else:
            kin = Kin(pid, start_boottime_ns, 0, 0, 0, b"")
        self._asked.pop(process, None)
        self._events.infer_gone(kin, now)
        return True

    def close(self) -> None:
        """Listen no more."""
        self._stop()
        self.ring.close()

    @property
    def _idle(self) -> bool:
        """Nobody asks for anything."""
        return not (self.control.any_mask | self.control.all_mask or self._preparing)

    def _on_masks(self) -> None:
        if self._idle:
            self._events.clear()
            self._reconciliation.clear()
            self._idle_since_ns = _boottime()
            self._lingering = True
            return
        self._listen()
        if self._events.wide and not self.control.all_mask:
            self._events.narrow()

    def _listen(self) -> None:
        """From here on what changes is in a message: before anything is looked up."""
        if self.connector is None:
            self.connector = Connector(self._buffer_bytes, self._batch)
            self._missing = 0
            self.ring.listen(self.connector.fileno())
        elif self._lingering:
            self.ring.listen(self.connector.fileno())  # at once, and not when it would have been closed
        self._lingering = False

    def _on_entry(self, pid: int, entry: Watched | None) -> None:
        self._events.watch(pid, entry)

    def _stop(self) -> None:
        if self.connector is None:
            return
        self._events.clear()
        self.ring.listen(None)
        self.ring.behind = False
        self.connector.close()
        self.connector = None

    def _take_in(self) -> Pause:
        """What there is; and when there may be more that is worth a wake-up."""
        if self.connector is None:
            return Pause()
        before = self.received
        self.ring.behind = self._drain()
        if not self.ring.behind:
            self._after_drain()
        if self.ring.behind:
            return Pause()
        if self._idle:
            left = _LINGER_S - (_boottime() - self._idle_since_ns) / 1e9
            if left > 0:
                return Pause(least_s=left)
            self._stop()
            return Pause()
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        self._level = self._level * math.exp((self._taken_ns - now) / _RATE_WINDOW_NS) + self.received - before
        self._taken_ns = now
        nap = min(_NAP_LEAST_S * self._level / _NAP_MESSAGES, _NAP_MOST_S) if self._level > _NAP_MESSAGES else 0.0
        due = self._reconciliation.due(_boottime())
        return Pause(nap, 0.0 if due is None else max(due, _NAP_LEAST_S))

    def _drain(self, until_ns: int | None = None) -> bool:
        """Take what is in the socket, but not for ever. False once it was empty, or a message later than `until_ns` was read."""
        connector, taken = self.connector, 0
        if connector is None:
            return False
        offset = _boottime() - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        while taken < _AT_ONCE:
            messages = connector.receive()
            if messages is None:
                return False
            taken += len(messages)
            self.received += len(messages)
            last = int(messages["monotonic_ns"][-1]) if len(messages) else 0
            self._events.take(messages, offset)
            if until_ns is not None and last > until_ns:
                return False
        return True

    def _after_drain(self) -> None:
        """The socket was empty a moment ago: what is missing lies behind us."""
        connector = self.connector
        if connector is None:
            return
        if connector.overrun or connector.missing_by_sequence > self._missing:
            connector.overrun = False
            missing = connector.missing()
            if self._idle:
                self._missing = missing
            elif missing > self._missing:
                # Anybody's, and of any type: not for the watched ones' account, where this stands for a child that is not followed.
                self.control.count(LOST_NODE, LOST_FOLLOW, missing - self._missing)
                self._missing = missing
                self._reconciliation.wanted = True
        if self._reconciliation.look(_boottime()):
            self._drain()
        self._reconciliation.decide(_boottime())


def _boottime() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
