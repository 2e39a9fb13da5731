# SPDX-License-Identifier: Apache-2.0
"""What agent and broker say on standard output, for people and for whoever waits until they are ready."""

from __future__ import annotations

import os
import sys


def say(line: str) -> None:
    """Print a line at once. A reader who has gone is no reason to end: from then on nothing is printed."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # what is still buffered has to go somewhere at exit
        os.close(nowhere)
