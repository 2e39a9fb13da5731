# SPDX-License-Identifier: Apache-2.0
"""What gRPC says of a connection that failed, in words for people. It needs no gRPC: it is given the text of a status."""

from __future__ import annotations

import re

_LAST = re.compile(r"last error: [A-Z_]+: (?:\S+: )?(?:Failed to connect to remote host: )?(.+?)\)?$")
_NAME = re.compile(r"(?:DNS resolution failed for|.*errors resolving) (\S+?):? ")
_WORDS = (
    ("ping timeout", "it does not answer"),
    ("keepalive", "it does not answer"),
    ("Socket closed", "the connection was closed"),
    ("Connection reset", "the connection was closed"),
    ("Broken pipe", "the connection was closed"),
    ("Cancelling all calls", "it ended"),
    ("GOAWAY", "it ended"),
    ("RST_STREAM", "the connection broke"),
    ("Internal error from Core", "the connection broke"),
)


def plain_reason(details: str) -> str:
    """Return one line for the details of a status: "connection refused". What gRPC did not make up is returned as it is."""
    text = " ".join(details.split())
    if name := _NAME.match(text):
        return f"the name {name[1].rpartition(':')[0] or name[1]} has no address"
    if "failed to connect to all addresses" in text and (last := _LAST.search(text)):
        text = last[1]
        if text.startswith("connection attempt timed out") or "Timeout" in text:
            return "it does not answer"
        return f"{text[:1].lower()}{text[1:]}" if text[:2].istitle() else text
    for sign, words in _WORDS:
        if sign in text:
            return words
    return text
