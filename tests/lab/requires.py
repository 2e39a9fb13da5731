# SPDX-License-Identifier: Apache-2.0
"""What a test needs of the machine, and why one that lacks it is skipped: always with a reason of this module."""

from __future__ import annotations

import enum
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


class Lack(enum.Enum):
    """Something that the machine does not have; the value says what to do."""

    ROOT = "needs root: BPF programs are loaded"
    BTF = "needs a kernel with BTF: /sys/kernel/btf/vmlinux is not there"
    BASE_IMAGE = "needs base images that the engine neither has nor gets: see docker/README.md"
    BPFFS = "needs the kernel's bpf file system"
    COMPILER = "needs cc to build the workloads: apt-get install gcc libc6-dev"
    CONNECTOR = "needs CONFIG_PROC_EVENTS, and the initial network namespace"
    ENGINE = "needs a Docker engine with Compose that answers"
    LAB_TEST = "builds images and starts containers, and is run by: make lab-test"
    NAMESPACES = "needs ip, unshare and nsenter: apt-get install iproute2 util-linux"
    KEEPALIVED = "needs keepalived: apt-get install --no-install-recommends keepalived"
    PACEMAKER = "needs Pacemaker and Corosync: apt-get install pacemaker pacemaker-cli-utils corosync resource-agents"
    NODE = "needs node and npm: apt-get install nodejs npm"
    NPM_REGISTRY = "needs the packages of tests/interop/package.json, and npm could not get them"
    SETPRIV = "needs setpriv: apt-get install util-linux"
    READABLE = "needs a checkout and an interpreter that every user may read"
    CGROUP2 = "needs root, and a mounted cgroup2 hierarchy"
    SLOW_DISK = "needs root, FUSE and loop devices"
    MEMORY_CGROUP = "needs a control group hierarchy with the memory controller"


def skip(lack: Lack, detail: str = "") -> None:
    """Skip the running test."""
    pytest.skip(f"{lack.name}: {lack.value}{': ' + detail if detail else ''}")


@functools.cache
def capture_lack() -> Lack | None:
    """Why events of this kernel cannot be captured; None if they can."""
    if os.geteuid() != 0:
        return Lack.ROOT
    if not Path("/sys/kernel/btf/vmlinux").exists():
        return Lack.BTF
    if "\tbpf\n" not in Path("/proc/filesystems").read_text(encoding="ascii"):
        return Lack.BPFFS
    if shutil.which("cc") is None:
        return Lack.COMPILER
    return None


def tools_lack(lack: Lack, *names: str) -> Lack | None:
    """`lack` if one of the commands is not there."""
    return None if all(shutil.which(name) for name in names) else lack


def need(*checks: Callable[[], Lack | None]) -> None:
    """Skip the running test for the first lack that a check finds."""
    for check in checks:
        lack = check()
        if lack is not None:
            skip(lack)
