# SPDX-License-Identifier: Apache-2.0
"""Monitors of a kmonitor broker: asyncio here, the same without asyncio in `kmonitor.clients.sync`, the commands in `.cli`.

async with connect("127.0.0.1:7221") as monitor:
    await monitor.register(node="web1", pid=4711, events="exit,abort")
    async for notification in monitor:
        ...
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kmonitor.clients.cursor import Cursor
    from kmonitor.clients.errors import (
        BrokerError,
        ClosedError,
        NodeGoneError,
        NodeUnreachableError,
        NoSuchRegistrationError,
        ProcessExitedError,
        ProcessGoneError,
        ProcessNotFoundError,
        RegistrationError,
        WaitTimeoutError,
    )
    from kmonitor.clients.events import Batch, Event, KilledBy
    from kmonitor.clients.guard import ProcessGuard
    from kmonitor.clients.monitor import Monitor, Registration, connect
    from kmonitor.clients.notifications import (
        Deregistered,
        Disconnected,
        Fresh,
        Gap,
        GapReason,
        LostCount,
        Members,
        NodeChange,
        NodeProgress,
        NodeState,
        Notice,
        Notification,
        Process,
        Progress,
        Reconnected,
        Registered,
        RegistrationState,
        Stale,
    )
    from kmonitor.clients.selection import Selection
    from kmonitor.clients.verdict import Blindness, Certainty, Death, Life, Subject, Verdict
    from kmonitor.wire.errors import (
        BadMaskError,
        BadSelectorError,
        BrokerUnreachableError,
        GapError,
        KmonitorError,
        NotAuthorisedError,
        UsageError,
    )
    from kmonitor.wire.masks import EventType

_WIRE_ERRORS = "BadMaskError BadSelectorError BrokerUnreachableError GapError KmonitorError NotAuthorisedError UsageError"
_ERRORS = (
    "BrokerError ClosedError NodeGoneError NodeUnreachableError NoSuchRegistrationError ProcessExitedError ProcessGoneError "
    "ProcessNotFoundError RegistrationError WaitTimeoutError"
)
_NOTIFICATIONS = (
    "Deregistered Disconnected Fresh Gap GapReason LostCount Members NodeChange NodeProgress NodeState Notice Notification "
    "Process Progress Reconnected Registered RegistrationState Stale"
)
# Imported when first used: `kmon --help`, which passes through here, must not wait for gRPC.
_HOME = {
    "EventType": "kmonitor.wire.masks",
    "Cursor": "kmonitor.clients.cursor",
    "Selection": "kmonitor.clients.selection",
    "ProcessGuard": "kmonitor.clients.guard",
    **dict.fromkeys(("Blindness", "Certainty", "Death", "Life", "Subject", "Verdict"), "kmonitor.clients.verdict"),
    **dict.fromkeys(("Batch", "Event", "KilledBy"), "kmonitor.clients.events"),
    **dict.fromkeys(("Monitor", "Registration", "connect"), "kmonitor.clients.monitor"),
    **dict.fromkeys(_WIRE_ERRORS.split(), "kmonitor.wire.errors"),
    **dict.fromkeys(_ERRORS.split(), "kmonitor.clients.errors"),
    **dict.fromkeys(_NOTIFICATIONS.split(), "kmonitor.clients.notifications"),
}

__all__ = [
    "BadMaskError",
    "BadSelectorError",
    "Batch",
    "Blindness",
    "BrokerError",
    "BrokerUnreachableError",
    "Certainty",
    "ClosedError",
    "Cursor",
    "Death",
    "Deregistered",
    "Disconnected",
    "Event",
    "EventType",
    "Fresh",
    "Gap",
    "GapError",
    "GapReason",
    "KilledBy",
    "KmonitorError",
    "Life",
    "LostCount",
    "Members",
    "Monitor",
    "NoSuchRegistrationError",
    "NodeChange",
    "NodeGoneError",
    "NodeProgress",
    "NodeState",
    "NodeUnreachableError",
    "NotAuthorisedError",
    "Notice",
    "Notification",
    "Process",
    "ProcessExitedError",
    "ProcessGoneError",
    "ProcessGuard",
    "ProcessNotFoundError",
    "Progress",
    "Reconnected",
    "Registered",
    "Registration",
    "RegistrationError",
    "RegistrationState",
    "Selection",
    "Stale",
    "Subject",
    "UsageError",
    "Verdict",
    "WaitTimeoutError",
    "connect",
]


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(home), name)
    return value
