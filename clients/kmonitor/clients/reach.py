# SPDX-License-Identifier: Apache-2.0
"""Why a broker does not answer: what its address says to a plain connection. gRPC does not tell these apart, and takes long to import."""

from __future__ import annotations

import enum
import os
import socket
import time

_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""RFC 9113, 3.4: a client's preface, and its SETTINGS. A server's first frame is its own."""
_HEADER_BYTES = 9
_SETTINGS = 4


class Reach(enum.Enum):
    """How far one comes."""

    SERVED = "served"
    """It answers as gRPC does."""
    SILENT = "silent"
    """It takes the connection, and says nothing in the time given."""
    STRANGER = "stranger"
    """It says something else, or hangs up."""
    REFUSED = "refused"
    """Nobody listens there."""
    AWAY = "away"
    """Nothing comes back, or there is no way there."""
    UNNAMED = "unnamed"
    """The name has no address."""


def look(address: str, limit: float) -> tuple[Reach, str]:
    """Try HOST:PORT for so many seconds; how far one comes, and the system's words for what is in the way. Of several addresses that of
    the name which one comes furthest with."""
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except OSError as error:
        return Reach.UNNAMED, error.strerror or str(error)
    share = limit / len(found)
    order = list(Reach)
    return min((_try(family, where, share) for family, _, _, _, where in found), key=lambda each: order.index(each[0]))


def in_words(address: str, found: Reach, reason: str) -> str:
    """What that means for a broker, and what to do: one line."""
    if found is Reach.SILENT:
        return (
            f"no answer from the broker at {address}, though connections are taken: it is stopped, overloaded, or at its limit of open "
            "files; look at its log, and at LimitNOFILE= of its unit"
        )
    if found is Reach.STRANGER:
        return f"what listens at {address} is no kmonitor broker: set --broker / KMONITOR_BROKER"
    if found is Reach.AWAY:
        return f"no broker answers at {address} ({reason}): see that the machine is up and reachable, or set --broker / KMONITOR_BROKER"
    if found is Reach.UNNAMED:
        return f"no broker answers at {address}: its name has no address ({reason}): set --broker / KMONITOR_BROKER"
    if found is Reach.SERVED:
        return f"the broker at {address} answers, and this connection to it broke all the same: try again"
    return f"no broker answers at {address}: start kmonitor-broker, or set --broker / KMONITOR_BROKER"


def _try(family: int, where: tuple[object, ...], limit: float) -> tuple[Reach, str]:
    until = time.monotonic() + limit
    with socket.socket(family, socket.SOCK_STREAM) as to:
        to.settimeout(limit)
        try:
            to.connect(where)
        except ConnectionRefusedError as error:
            return Reach.REFUSED, _text(error)
        except OSError as error:
            return Reach.AWAY, _text(error)
        try:
            to.sendall(_HELLO)
            answer = b""
            while len(answer) < _HEADER_BYTES:
                to.settimeout(max(0.001, until - time.monotonic()))
                if not (more := to.recv(_HEADER_BYTES - len(answer))):
                    return Reach.STRANGER, "it hangs up"
                answer += more
        except TimeoutError as error:
            return Reach.SILENT, _text(error)
        except OSError as error:
            return Reach.STRANGER, _text(error)
    return (Reach.SERVED, "") if answer[3] == _SETTINGS else (Reach.STRANGER, "it speaks no HTTP/2")


def _text(error: OSError) -> str:
    if isinstance(error, TimeoutError) and error.errno is None:
        return "no answer"
    return error.strerror or os.strerror(error.errno or 0)
