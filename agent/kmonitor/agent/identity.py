# SPDX-License-Identifier: Apache-2.0
"""Who a node is to its broker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Identity:
    """How this node presents itself."""

    node: str
    scope: str
    labels: Mapping[str, str] = field(default_factory=dict)
