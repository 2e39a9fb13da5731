# SPDX-License-Identifier: Apache-2.0
"""Encoded records."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class Encoded:
    """Elements of `EventBatch.events`: `data[offsets[i]:offsets[i + 1]]` is that of row i."""

    __slots__ = ("data", "offsets")

    def __init__(self, data: bytes, offsets: npt.NDArray[np.int64]) -> None:
        self.data = data
        self.offsets = offsets

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return len(self.data) + self.offsets.nbytes


def utf8(raw: bytes) -> bytes:
    """The bytes as valid UTF-8: proto3 strings must be."""
    return raw if raw.isascii() else raw.decode("utf-8", "replace").encode()
