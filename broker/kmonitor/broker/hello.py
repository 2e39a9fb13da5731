# SPDX-License-Identifier: Apache-2.0
"""What an agent's first message may say, and the proof that it holds the ring that it names.

Everything in it is written by whoever reaches the port: it is looked at here before anything is changed or shown.
"""

from __future__ import annotations

import hashlib
import hmac

from kmonitor.broker.errors import Code, RefusedError
from kmonitor.broker.nodes import Node
from kmonitor.v1 import agent_pb2
from kmonitor.wire.errors import BadSelectorError
from kmonitor.wire.record import RECORD_SIZE, RECORD_VERSION, SLOT_SIZE
from kmonitor.wire.selectors import check_boot_id, check_labels, check_node_name

RING_MOST = 1 << 31
"""Bytes: no kernel makes a larger ring. Taken for an agent that does not say how large its own is."""
POSITION_MOST = 1 << 63
"""No ring comes so far: at a GiB a second that takes 272 years."""
EPOCHS_KNOWN = 16
"""As many rings of a node as the log knows: the secrets of so many are remembered."""
_TEXT_MOST = 128
_SECRET_BYTES = range(16, 65)


def check_hello(hello: agent_pb2.Hello) -> None:
    """Raise RefusedError unless it can be an agent's, of this version, and all that it says can be shown and kept."""
    try:
        check_node_name(hello.node)
        check_boot_id(hello.boot_id)
        check_labels(hello.labels)
    except BadSelectorError as error:
        raise RefusedError(Code.INVALID_ARGUMENT, f"the agent's hello: {error}") from None
    found = (hello.record_version, hello.record_size, hello.slot_size)
    if found != (RECORD_VERSION, RECORD_SIZE, SLOT_SIZE):
        raise RefusedError(
            Code.FAILED_PRECONDITION,
            f"node {hello.node}: records of version {found[0]} ({found[1]} bytes in slots of {found[2]}); this broker takes "
            f"version {RECORD_VERSION} ({RECORD_SIZE} in {SLOT_SIZE}): upgrade the older of agent and broker",
        )
    for name in ("source", "scope", "kernel_release", "agent_version"):
        text = getattr(hello, name)
        if len(text) > _TEXT_MOST or not text.isprintable():
            raise _wrong(hello, f"its {name} is not {_TEXT_MOST} printable characters or less")
    if not hello.epoch:
        raise _wrong(hello, "it has no epoch")
    if hello.secret and len(hello.secret) not in _SECRET_BYTES:
        raise _wrong(hello, f"a secret of {len(hello.secret)} bytes: 16 to 64 are allowed")
    _check_positions(hello)


def ring_bytes(hello: agent_pb2.Hello) -> int:
    """Return how much the agent's ring holds, at most, bytes."""
    return hello.ring_bytes or RING_MOST


def _check_positions(hello: agent_pb2.Hello) -> None:
    ring, position = ring_bytes(hello), hello.position
    if ring > RING_MOST:
        raise _wrong(hello, f"no ring has {ring} bytes")
    if position % SLOT_SIZE or position >= POSITION_MOST:
        raise _wrong(hello, f"no record lies at position {position}")
    end = hello.end_position
    if hello.HasField("end_position") and (end % SLOT_SIZE or not position <= end <= position + ring):
        raise _wrong(hello, f"no ring of {ring} bytes reaches from position {position} to {end}")
    lost = hello.lost
    if lost.from_position % SLOT_SIZE or lost.to_position % SLOT_SIZE or lost.to_position > position + ring:
        raise _wrong(hello, f"a loss between positions {lost.from_position} and {lost.to_position}")


def _wrong(hello: agent_pb2.Hello, why: str) -> RefusedError:
    return RefusedError(Code.INVALID_ARGUMENT, f"node {hello.node}: the agent's hello cannot be: {why}")


def take_secret(hello: agent_pb2.Hello) -> bytes:
    """Take the secret out of a hello, which is kept and shown: its hash, empty if it has none."""
    secret = hello.secret
    hello.ClearField("secret")
    return hashlib.sha256(secret).digest() if secret else b""


def check_proof(node: Node, hello: agent_pb2.Hello, proof: bytes, holder: str | None) -> None:
    """Raise RefusedError if an agent may not have the ring that its hello names. `proof`: of `take_secret`.

    `holder`: the address of an agent that is connected with this very ring; None if none is.
    """
    known = node.secrets.get(hello.epoch, b"")
    if known and not hmac.compare_digest(known, proof):
        if proof and holder is None and hello.HasField("end_position"):
            # Whoever claimed that ring first: the node's own agent must not be kept out by it.
            raise went_back(node, "its secret is another one")
        raise RefusedError(
            Code.PERMISSION_DENIED,
            f"node {node.name}: this agent does not show the secret of the ring that it names; one of an older version has none: "
            "start that with --unpin first, which gives the ring up",
        )
    if not known and holder is not None:
        # An older agent, which shows no secret: anybody could name its ring.
        raise RefusedError(
            Code.ALREADY_EXISTS, f"node {node.name} is connected already, by the agent at {holder}, which has shown no secret"
        )


def remember_secret(node: Node, epoch: int, proof: bytes) -> None:
    """From now on the ring of this epoch is only taken from who shows the same secret."""
    if proof:
        node.secrets.pop(epoch, None)
        node.secrets[epoch] = proof
        while len(node.secrets) > EPOCHS_KNOWN:
            del node.secrets[next(iter(node.secrets))]


def check_ring(node: Node, hello: agent_pb2.Hello, expected: int) -> None:
    """Raise RefusedError if the ring cannot be the one of which all before `expected` has come.

    That is so after a machine was restored from a snapshot: the same boot, the same ring, and it is at an earlier position.
    """
    ring, position = ring_bytes(hello), hello.position
    if node.disproven and hello.HasField("end_position"):
        raise went_back(node, node.disproven)
    if hello.HasField("end_position") and hello.end_position < expected:
        raise went_back(node, f"its records end at position {hello.end_position}, and those up to {expected} have come")
    if not position - ring <= expected <= position + ring:
        raise went_back(node, f"its records begin at position {position}, and {expected} is more than its {ring} bytes away")


def went_back(node: Node, why: str) -> RefusedError:
    """Return what an agent is told whose ring is not the one that the broker knows: it goes on in a new epoch."""
    return RefusedError(
        Code.DATA_LOSS,
        f"node {node.name}: its ring is not the one that this broker knows: {why}; start an agent of an older version with --unpin first",
    )
