# SPDX-License-Identifier: Apache-2.0
"""Which capabilities this process has (capabilities(7)), and what to say when the kernel refuses for lack of one."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from kmonitor.agent.errors import MissingCapabilityError

_BITS = {  # include/uapi/linux/capability.h
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_NICE": 23,
    "CAP_SYS_RESOURCE": 24,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}
_WITHIN_ADMIN = {"CAP_BPF", "CAP_PERFMON"}  # bpf_capable() and perfmon_capable() take CAP_SYS_ADMIN as well
_INITIAL_USER_NAMESPACE = 0xEFFFFFFD  # PROC_USER_INIT_INO, include/linux/proc_ns.h


def effective() -> frozenset[str]:
    """Those of the seven that this process has in its effective set, as /proc/self/status tells; none if it does not."""
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        found = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
        mask = int(found[1], 16) if found else 0
        return frozenset(name for name, bit in _BITS.items() if mask >> bit & 1)
    return frozenset()


def missing(*names: str) -> list[str]:
    """Which of `names` this process lacks: neither has, nor has CAP_SYS_ADMIN in its place."""
    have = effective()
    return [name for name in names if name not in have and not (name in _WITHIN_ADMIN and "CAP_SYS_ADMIN" in have)]


def in_initial_user_namespace() -> bool:
    """Elsewhere the kernel does not count capabilities for BPF, nor for the proc connector: they are over that namespace only."""
    try:
        return Path("/proc/self/ns/user").stat().st_ino == _INITIAL_USER_NAMESPACE
    except OSError:
        return True  # a kernel without user namespaces


def refusal(what: str, *names: str) -> MissingCapabilityError:
    """The error for `what` that the kernel did not allow, though it takes just the capabilities `names`: it says which is missing."""
    together = " and ".join(names)
    advice = f"run as root, or with {together}; see kmon doctor"
    if not in_initial_user_namespace():
        return MissingCapabilityError(f"{what}: capabilities do not count in a user namespace: outside of it, {advice}")
    absent = missing(*names)
    if absent:
        return MissingCapabilityError(f"{what}: {' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing: {advice}")
    return MissingCapabilityError(
        f"{what}, though it has {together}: a container's seccomp filter, a security module or kernel lockdown forbids it; see kmon doctor"
    )
