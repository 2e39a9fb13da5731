# SPDX-License-Identifier: Apache-2.0
"""One node's namespaces: network, pids, mounts and host name. Its process 1 (init.py) holds them; they end with it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from kmonitor.clients.lab.network import NETNS

INIT = Path(__file__).with_name("init.py")
READY = "init: ready"
"""What it says when the node is there. Any other first line says what is wrong."""


def init_command(name: str, namespace: str, *options: str) -> list[str]:
    """What makes a node in a network namespace: unshare(1), whose only child is the node's process 1. `options` are init.py's."""
    unshare = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return ["nsenter", f"--net={NETNS / namespace}", *unshare, sys.executable, "-I", "-S", str(INIT), name, *options]


class Machine:
    """A node that is there, by its process 1 as this machine has it."""

    def __init__(self, init: int) -> None:
        self.init = init
        self.prefix = ["nsenter", "--target", str(init), "--net", "--pid", "--mount", "--uts"]
        """What to run a command with, so that it runs in the node: as the child of nsenter(1), which stays outside. Before `--`."""
        self.beside = ["nsenter", "--target", str(init), "--net", "--mount", "--uts", "--"]
        """The same for one that keeps its pid: it is in the node's network, sees its files, and is none of its processes."""
        self.root = Path(f"/proc/{init}/root")
        """The node's files, as one from outside can reach them: what is mounted in there too."""

    def within(self, command: Sequence[str | Path], folder: str | Path = "/") -> list[str | Path]:
        """A command line that runs this one in the node, in a folder of the node's."""
        return [*self.prefix, f"--wdns={folder}", "--", *command]
