# SPDX-License-Identifier: Apache-2.0
"""What proves to the broker that an agent holds the ring that it names: a random number that lies with the pins of that ring.

bpffs has no regular files: it is the value of a map, which the kernel pins with mode 0600. The secret of a ring that is not pinned is in
this process alone, and goes with it, as the ring does.
"""

from __future__ import annotations

import contextlib
import os

from kmonitor.agent import libbpf
from kmonitor.agent.pins import PinFolder

_BYTES = 32
_PIN = "map_secret"


def make_secret() -> bytes:
    """Return a new one."""
    return os.urandom(_BYTES)


def pin_secret(pins: PinFolder, secret: bytes) -> None:
    """Put it beside a ring's pins. Raises PinError, BpfError."""
    with contextlib.closing(libbpf.make_array("kmonitor_secret", secret)) as made:
        libbpf.pin(made.fd, pins.path / _PIN)


def pinned_secret(pins: PinFolder) -> bytes:
    """Return the one that lies there; empty if an agent of an older version made the pins. Raises PinError, BpfError."""
    if _PIN not in pins.names():
        return b""
    with contextlib.closing(libbpf.Map(libbpf.open_pinned(pins.path / _PIN), "kmonitor_secret")) as found:
        return found.lookup(bytes(4), _BYTES) or b""
