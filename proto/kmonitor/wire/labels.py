# SPDX-License-Identifier: Apache-2.0
"""Labels of nodes on a command line. Apart from what checks them, which takes longer to import than --help may."""

from __future__ import annotations

from kmonitor.wire.errors import UsageError


def parse_labels(texts: list[str]) -> dict[str, str]:
    """Return {"zone": "a"} for ["zone=a"]: see kmonitor.wire.selectors.check_labels. Raises UsageError."""
    labels: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"label {text!r}: write NAME=VALUE")
        if key in labels:
            raise UsageError(f"label {key} is given twice")
        labels[key] = value
    return labels
