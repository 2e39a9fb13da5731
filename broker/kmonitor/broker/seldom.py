# SPDX-License-Identifier: Apache-2.0
"""Lines in the broker's own log that others can cause at will: not more of them than somebody can read."""

from __future__ import annotations

import logging
import time

from kmonitor.wire.plain import plain_text

MOST = 20
PER_S = 10.0


class Seldom:
    """Warns at most MOST times in PER_S seconds, and then says how many lines were left out."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._began = float("-inf")
        self._count = 0

    def warning(self, text: str, *arguments: object) -> None:
        """One line; control characters in it are shown as escapes."""
        now = time.monotonic()
        if now - self._began >= PER_S:
            if self._count > MOST:
                self._logger.warning("%d more lines like these were left out", self._count - MOST)
            self._began, self._count = now, 0
        self._count += 1
        if self._count <= MOST:
            self._logger.warning("%s", plain_text(text % arguments))
