# SPDX-License-Identifier: Apache-2.0
"""The facts about this machine, and about who asks, that decide what the agent can do. Each check only reads."""

from __future__ import annotations

import os
import platform
import re
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kmonitor.agent import libbpf
from kmonitor.agent.capabilities import effective, in_initial_user_namespace, missing
from kmonitor.agent.cgroups import hierarchy_root
from kmonitor.agent.errors import PinError
from kmonitor.agent.kernel_btf import KernelBtf
from kmonitor.agent.pins import is_bpffs, open_folder
from kmonitor.agent.probe import COPIES_MOST, HOOKS, preempts
from kmonitor.agent.processes import HIDDEN_ADVICE
from kmonitor.agent.procfs import how_hidden
from kmonitor.wire.errors import KmonitorError

_INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO, include/linux/proc_ns.h
_MIN_KERNEL = (5, 10)  # programs that user space runs (BPF_PROG_TEST_RUN); ring buffer, task iterator and CAP_BPF are older
_NETLINK_CONNECTOR = 11  # include/uapi/linux/netlink.h
_BCC_FOLDERS = "python3*/*-packages/bcc"  # below /usr/lib: where distributions have it, for their own interpreter


@dataclass(frozen=True, slots=True)
class Check:
    """One line: `status` ok, warn (works, but less) or fail (the best source does not work with it); what was found; what to do."""

    status: Literal["ok", "warn", "fail"]
    name: str
    found: str
    advice: str = ""


def facts(pin_root: Path) -> list[Check]:
    """In the order in which one would mend them."""
    return [
        kernel(),
        btf(),
        tracepoints(),
        library(),
        user(),
        *capabilities(),
        user_namespace(),
        pid_namespace(),
        proc(),
        lockdown(),
        unprivileged(),
        bpffs(pin_root),
        cgroup(),
        bcc(),
        headers(),
        connector(),
    ]


def kernel() -> Check:
    """uname(2)."""
    release = platform.release()
    match = re.match(r"(\d+)\.(\d+)", release)
    if match is not None and (int(match[1]), int(match[2])) >= _MIN_KERNEL:
        return Check("ok", "kernel", release)
    return Check("fail", "kernel", release, "the probe needs Linux 5.10 or later; source netlink any")


def btf() -> Check:
    """The kernel's own description of its types."""
    path = Path("/sys/kernel/btf/vmlinux")
    if os.access(path, os.R_OK):
        return Check("ok", "BTF", f"{path}, {path.stat().st_size / 1e6:.1f} MB")
    if not Path("/sys/kernel").exists():
        return Check("fail", "BTF", "sysfs is not mounted", "mount -t sysfs sysfs /sys")
    return Check("fail", "BTF", f"no {path}", "take a kernel with CONFIG_DEBUG_INFO_BTF=y; or source bcc or netlink")


def tracepoints() -> Check:
    """Those that the probe attaches to, as the kernel's BTF has them."""
    names = list(HOOKS.values())
    try:
        with KernelBtf() as btf:
            arguments = [btf.tracepoint_arguments(name) for name in names]
    except KmonitorError:
        return Check("warn", "tracepoints", "not known: there is no BTF, or no libbpf, to tell them", "see BTF and libbpf")
    absent = [name for name, count in zip(names, arguments, strict=True) if count == 0]
    if absent:
        return Check(
            "fail", "tracepoints", f"not in this kernel: {', '.join(absent)}", "take a kernel with CONFIG_TRACEPOINTS; or source netlink"
        )
    copies = f"; a program may be preempted here: {COPIES_MOST} copies of those that make records" if preempts() else ""
    return Check("ok", "tracepoints", ", ".join(names) + copies)


def library() -> Check:
    """The system's libbpf, which loads the probe."""
    try:
        return Check("ok", "libbpf", f"libbpf.so.1 ({libbpf.version()})")
    except KmonitorError:
        return Check("fail", "libbpf", "no libbpf.so.1", "apt install libbpf1, dnf install libbpf, or apk add libbpf")


def user() -> Check:
    """Who asks."""
    return Check("ok", "user", f"uid {os.geteuid()}" + (" (root)" if os.geteuid() == 0 else ""))


def capabilities() -> Iterator[Check]:
    """The effective ones, one by one. What is not there does no harm where another source or less will do."""
    have = effective()
    for name, use in (("CAP_BPF", "to load the probe"), ("CAP_PERFMON", "to attach it and to read the kernel's memory")):
        if name in have:
            yield Check("ok", name, "effective")
        elif not missing(name):
            yield Check("ok", name, "not effective, but CAP_SYS_ADMIN contains it")
        else:
            yield Check("fail", name, f"not effective: needed {use}", "run the agent as root, or with CAP_BPF and CAP_PERFMON")
    for name, use in (
        ("CAP_SYS_ADMIN", "not needed: CAP_BPF and CAP_PERFMON do"),
        ("CAP_NET_ADMIN", "needed for source netlink only"),
        ("CAP_SYS_NICE", "the agent runs at the priority that it was started with"),
        ("CAP_SYS_RESOURCE", "not needed: from 5.11 on the kernel does not count BPF maps as locked memory"),
    ):
        yield Check("ok", name, "effective" if name in have else f"not effective; {use}")


def user_namespace() -> Check:
    """See capabilities.in_initial_user_namespace."""
    if in_initial_user_namespace():
        return Check("ok", "user namespace", "initial")
    return Check(
        "fail", "user namespace", "not the initial one: capabilities do not count here", "run outside of it, or a container with the host's"
    )


def pid_namespace() -> Check:
    """In another than the initial one, host pids mean nothing."""
    try:
        name = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - a magic link, no path
    except OSError:
        return Check("warn", "pid namespace", "not known", "mount -t proc proc /proc")
    if name == _INITIAL_PID_NAMESPACE:
        return Check("ok", "pid namespace", "initial")
    return Check("warn", "pid namespace", name, "host pids are not seen here: kmonitor-agent --scope pidns, or docker run --pid=host")


def proc() -> Check:
    """What /proc hides. The kernel's own list of processes, which source core reads, is whole all the same."""
    try:
        how = how_hidden()
    except OSError:
        return Check("warn", "/proc", "not mounted", "mount -t proc proc /proc")
    if how:
        return Check("warn", "/proc", f"hides other users' processes ({how}): sources bcc and netlink need to see them", HIDDEN_ADVICE)
    return Check("ok", "/proc", "shows every process")


def lockdown() -> Check:
    """kernel_lockdown(7): in confidentiality mode BPF may not read kernel memory."""
    text = _read("/sys/kernel/security/lockdown")
    match = re.search(r"\[(\w+)\]", text or "")
    mode = match[1] if match else "none"
    if mode == "confidentiality":
        return Check("fail", "lockdown", mode, "BPF may not read kernel memory: boot with lockdown=integrity; or source netlink")
    return Check("ok", "lockdown", mode if match else "not in this kernel, or securityfs is not mounted")


def unprivileged() -> Check:
    """Only told: the agent asks for capabilities in any case."""
    text = (_read("/proc/sys/kernel/unprivileged_bpf_disabled") or "").strip()
    if text == "0":
        return Check("warn", "unprivileged BPF", "allowed", "safer, and enough for kmonitor: sysctl kernel.unprivileged_bpf_disabled=2")
    return Check("ok", "unprivileged BPF", f"disabled ({text})" if text else "not told by this kernel")


def bpffs(pin_root: Path) -> Check:
    """Where the agent pins its ring, so that a restart loses nothing: the nearest folder that is there must be in a bpffs."""
    folder = pin_root
    while not _is_there(folder) and folder != folder.parent:
        folder = folder.parent
    if not is_bpffs(folder):
        advice = "mount -t bpf bpf /sys/fs/bpf; or kmonitor-agent --no-pin, and a restart loses events"
        return Check("warn", "bpffs", f"{pin_root} is not in one", advice)
    if not os.access(folder, os.X_OK):
        advice = "see 'Running as a service' in docs/operation.md; or kmonitor-agent --no-pin, and a restart loses events"
        return Check("warn", "bpffs", f"{folder} is closed to this user", advice)
    if not os.access(folder, os.W_OK):
        advice = f"as root: install -d -o {os.geteuid()} {pin_root}; or kmonitor-agent --no-pin, and a restart loses events"
        return Check("warn", "bpffs", f"{folder} is not writable for this user", advice)
    try:
        os.close(open_folder(folder, make=False))
    except PinError as error:
        if folder == pin_root:
            return Check("warn", "bpffs", str(error), "or kmonitor-agent --no-pin, and a restart loses events")
    return Check("ok", "bpffs", f"{folder} is writable")


def cgroup() -> Check:
    """The v2 hierarchy: for --cgroup and --unit."""
    try:
        return Check("ok", "cgroup v2", f"mounted at {hierarchy_root()}")
    except (KmonitorError, OSError):
        return Check("warn", "cgroup v2", "not mounted", "--cgroup and --unit do not work: mount -t cgroup2 cgroup2 /sys/fs/cgroup")


def bcc() -> Check:
    """For the source bcc: the distribution's package. The package of that name on PyPI is another thing.

    By its files, in this interpreter's path and in those of the distribution: to import it takes longer than all that is here.
    """
    folders = [Path(folder) / "bcc" for folder in sys.path if folder] + sorted(Path("/usr/lib").glob(_BCC_FOLDERS))
    found = [folder for folder in folders if (folder / "__init__.py").exists()]
    for folder in found:
        if (folder / "libbcc.py").exists():
            match = re.search(r"__version__\s*=\s*['\"](.+?)['\"]", _read(str(folder / "version.py")) or "")
            return Check("ok", "bcc", f"{match[1] if match else 'of no known version'} in {folder}")
    if found:
        return Check(
            "warn", "bcc", f"{found[0]} is another package of that name", "source bcc wants the distribution's: apt install python3-bpfcc"
        )
    return Check("ok", "bcc", "not installed; source bcc wants python3-bpfcc")


def headers() -> Check:
    """For the source bcc, where there is no BTF."""
    for path in (Path("/lib/modules") / platform.release() / "build", Path("/sys/kernel/kheaders.tar.xz")):
        if path.exists():
            return Check("ok", "kernel headers", str(path))
    return Check("ok", "kernel headers", "none; only source bcc on a kernel without BTF wants them")


def connector() -> Check:
    """For the source netlink. Whether events come takes CAP_NET_ADMIN to find out."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_CONNECTOR):
            return Check("ok", "proc connector", "netlink connector is in this kernel")
    except OSError as error:
        return Check("ok", "proc connector", f"{error.strerror}; source netlink wants CONFIG_PROC_EVENTS")


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:  # a folder above may not be entered
        return False


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
