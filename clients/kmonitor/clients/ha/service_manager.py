# SPDX-License-Identifier: Apache-2.0
"""What a service tells the systemd that started it: see sd_notify(3). Without one it tells nobody."""

from __future__ import annotations

import contextlib
import os
import socket


class ServiceManager:
    """Of this process. Takes NOTIFY_SOCKET out of the environment: children have nothing to say there."""

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", "")

    def ready(self) -> None:
        """What others wait for has been done."""
        self._tell("READY=1")

    def alive(self) -> None:
        """For WatchdogSec=: call it at least twice in that time."""
        self._tell("WATCHDOG=1")

    def stopping(self) -> None:
        """It ends, on its own account or because it was asked to."""
        self._tell("STOPPING=1")

    def _tell(self, what: str) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as to:
            to.sendto(what.encode(), address)  # nobody there, or too busy: that is not for us to fail of
