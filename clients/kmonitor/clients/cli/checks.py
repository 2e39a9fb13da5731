# SPDX-License-Identifier: Apache-2.0
"""What `kmon doctor` looks at. Each check reads the system, changes nothing, and needs no agent."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kmonitor.wire.errors import KmonitorError

_CAPABILITIES = {"CAP_BPF": 39, "CAP_PERFMON": 38, "CAP_SYS_ADMIN": 21, "CAP_NET_ADMIN": 12}  # include/uapi/linux/capability.h
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO, include/linux/proc_ns.h
_BPF_FS_MAGIC = 0xCAFE4A11  # include/uapi/linux/magic.h
_MIN_KERNEL = (5, 12)  # atomics in BPF; ring buffer, task iterator and CAP_BPF are older


@dataclass(frozen=True, slots=True)
class Check:
    """One line: `status` ok, warn (works, but less) or fail (the core source does not); what was found; what to do."""

    status: Literal["ok", "warn", "fail"]
    name: str
    found: str
    advice: str = ""


def all_checks(broker: str) -> list[Check]:
    """In the order in which one would mend them."""
    return [
        kernel(),
        btf(),
        *capabilities(),
        bpffs(),
        lockdown(),
        unprivileged(),
        libbpf(),
        pid_namespace(),
        cgroup(),
        reachable(broker),
    ]


def kernel() -> Check:
    """uname(2)."""
    release = platform.release()
    match = re.match(r"(\d+)\.(\d+)", release)
    if match is not None and (int(match[1]), int(match[2])) >= _MIN_KERNEL:
        return Check("ok", "kernel", release)
    return Check("fail", "kernel", release, "the probe needs Linux 5.12 or later")


def btf() -> Check:
    """The kernel's own description of its types."""
    path = Path("/sys/kernel/btf/vmlinux")
    if os.access(path, os.R_OK):
        return Check("ok", "BTF", f"{path}, {path.stat().st_size / 1e6:.1f} MB")
    return Check("fail", "BTF", f"no {path}", "take a kernel with CONFIG_DEBUG_INFO_BTF=y, or kmonitor-agent --source bcc")


def capabilities() -> list[Check]:
    """The effective ones, of /proc/self/status, one by one."""
    status = _read("/proc/self/status") or ""
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    have = int(match[1], 16) if match else 0
    admin = bool(have >> _CAPABILITIES["CAP_SYS_ADMIN"] & 1)
    found = [Check("ok", "user", f"uid {os.geteuid()}" + (" (root)" if os.geteuid() == 0 else ""))]
    for name, bit in _CAPABILITIES.items():
        if have >> bit & 1:
            found.append(Check("ok", name, "effective"))
        elif name in ("CAP_BPF", "CAP_PERFMON") and admin:
            found.append(Check("ok", name, "not effective, but CAP_SYS_ADMIN contains it"))
        elif name in ("CAP_BPF", "CAP_PERFMON"):
            found.append(Check("fail", name, "not effective", "run the agent as root, or with CAP_BPF and CAP_PERFMON"))
        else:
            found.append(Check("ok", name, "not effective, and not needed"))
    return found


def bpffs() -> Check:
    """Where the agent pins its ring, so that a restart loses nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = (ctypes.c_long * 32)()  # struct statfs begins with f_type, a long, on 64-bit machines
    if libc.statfs(b"/sys/fs/bpf", ctypes.byref(buffer)) == 0 and buffer[0] & 0xFFFFFFFF == _BPF_FS_MAGIC:
        if os.access("/sys/fs/bpf", os.W_OK):
            return Check("ok", "bpffs", "mounted at /sys/fs/bpf")
        return Check(
            "warn",
            "bpffs",
            "/sys/fs/bpf is not writable for this user",
            "run as root, or kmonitor-agent --no-pin",
        )
    return Check("warn", "bpffs", "not mounted at /sys/fs/bpf", "mount -t bpf bpf /sys/fs/bpf; or --no-pin, and a restart loses events")


def lockdown() -> Check:
    """kernel_lockdown(7): in confidentiality mode BPF may not read kernel memory."""
    text = _read("/sys/kernel/security/lockdown")
    match = re.search(r"\[(\w+)\]", text or "")
    mode = match[1] if match else "none"
    if mode == "confidentiality":
        return Check("fail", "lockdown", mode, "BPF may not read kernel memory: boot with lockdown=integrity")
    return Check("ok", "lockdown", mode if match else "not in this kernel, or securityfs is not mounted")


def unprivileged() -> Check:
    """Only told: the agent asks for capabilities in any case."""
    text = (_read("/proc/sys/kernel/unprivileged_bpf_disabled") or "").strip()
    if text == "0":
        return Check("warn", "unprivileged BPF", "allowed", "safer, and enough for kmonitor: sysctl kernel.unprivileged_bpf_disabled=2")
    return Check("ok", "unprivileged BPF", f"disabled ({text})" if text else "not told by this kernel")


def libbpf() -> Check:
    """The system's library, which loads the probe."""
    try:
        library = ctypes.CDLL("libbpf.so.1")
        library.libbpf_version_string.restype = ctypes.c_char_p
        return Check("ok", "libbpf", f"libbpf.so.1 ({library.libbpf_version_string().decode()})")
    except (OSError, AttributeError):
        return Check("fail", "libbpf", "no libbpf.so.1", "apt install libbpf1, dnf install libbpf, or apk add libbpf")


def pid_namespace() -> Check:
    """In another than the initial one, host pids mean nothing."""
    try:
        name = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - a magic link, no path
    except OSError:
        return Check("warn", "pid namespace", "not known", "mount /proc")
    if name == _INITIAL_PID_NAMESPACE:
        return Check("ok", "pid namespace", "initial")
    return Check("warn", "pid namespace", name, "host pids are not seen here: kmonitor-agent --scope pidns, or docker run --pid=host")


def cgroup() -> Check:
    """The v2 hierarchy: for --cgroup and --unit."""
    for line in (_read("/proc/self/mountinfo") or "").splitlines():
        fields = line.split()
        if " - cgroup2 " in line and len(fields) > 4:
            return Check("ok", "cgroup v2", f"mounted at {fields[4]}")
    return Check("warn", "cgroup v2", "not mounted", "--cgroup and --unit do not work: mount -t cgroup2 cgroup2 /sys/fs/cgroup")


def reachable(broker: str) -> Check:
    """Only that the port answers; gRPC takes longer to import than all other checks take together."""
    try:
        host, port = _host_and_port(broker)
        with socket.create_connection((host, port), timeout=2):
            return Check("ok", "broker", f"answers at {broker}")
    except (OSError, KmonitorError) as error:
        reason = str(error) if isinstance(error, KmonitorError) else (error.strerror or str(error))
        return Check("warn", "broker", f"{broker}: {reason}", "start kmonitor-broker, or set --broker / KMONITOR_BROKER")


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise KmonitorError("no address: write HOST:PORT")
    return host.strip("[]"), int(port)


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
