# SPDX-License-Identifier: Apache-2.0
"""Process 1 of a node: a program that needs nothing but the standard library, and little of that.

    python -I -S init.py NAME [--boot-id FILE] [--alone]

Started in namespaces of its own it makes them a node's: its host name, a /run and a bpf file system of its own, and, with --boot-id,
what its programs take for the kernel's boot id. Then it says so, and waits for children that lost their parents. It ends when its
input does; with --alone, when it is killed. All processes of its pid namespace end with it, and with the last of them its file systems.

A line of input "last-pid N" gives the next process here the pid N + 1, if that is free; it answers "done". Another line is only answered.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

BOOT_ID = "/proc/sys/kernel/random/boot_id"
NODE = "/run/kmonitor-node"
"""By this file programs know that they are in a node."""
MS_BIND = 4096  # sys/mount.h


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    """mount(2). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode() or None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def become_a_node(name: str, boot_id: str) -> None:
    """Raises OSError."""
    write("/proc/sys/kernel/hostname", name)
    if boot_id:
        mount(boot_id, BOOT_ID, "", MS_BIND)
    mount("tmpfs", "/run", "tmpfs", 0, "mode=755")
    os.close(os.open(NODE, os.O_CREAT | os.O_WRONLY, 0o644))
    if os.path.isdir("/sys/fs/bpf"):  # noqa: PTH112 -- pathlib takes as long to import as all the rest
        mount("bpf", "/sys/fs/bpf", "bpf")  # what is pinned in it goes when the node does
    write("/proc/self/comm", "init")


def write(path: str, text: str) -> None:
    """Write a file of the kernel's."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def reap(*_: object) -> None:
    """Wait for all that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def say(text: str) -> None:
    """A line of output."""
    os.write(1, f"{text}\n".encode())


def main(name: str, *options: str) -> int:
    """Run until the end."""
    signal.signal(signal.SIGCHLD, reap)
    try:
        become_a_node(name, options[options.index("--boot-id") + 1] if "--boot-id" in options else "")
    except OSError as error:
        say(f"init: cannot set up {error.filename or name}: {error.strerror}")
        return 1
    say("init: ready")
    while "--alone" in options:
        signal.pause()
    rest = b""
    while chunk := os.read(0, 4096):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"last-pid "):
                write("/proc/sys/kernel/ns_last_pid", line.split()[1].decode())
            say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
