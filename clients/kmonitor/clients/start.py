# SPDX-License-Identifier: Apache-2.0
"""Where `kmon` begins: what it imports takes a moment, in which Ctrl-C must not be a traceback."""

from __future__ import annotations

from kmonitor.wire.interrupts import quiet_start


def main() -> None:
    """Run the command, to its exit status."""
    with quiet_start():
        from kmonitor.clients.cli import main as run  # noqa: PLC0415
    run()
