# SPDX-License-Identifier: Apache-2.0
"""From the death of a resource's process to the next one, with Pacemaker alone and with kmonitor: the table of docs/ha.md.

    make ha-table [KILLS=10]         or: .venv/bin/python -m tests.ha.table --kills 10

Two real nodes, `ocf:heartbeat:anything` with a monitor every 10 s, killed with SIGKILL at a random phase of it, on both nodes. Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.ha.stage import Stage
from tests.lab import bpffs
from tests.lab.namespaces import network
from tests.lab.pacemaker import Node, primitive
from tests.lab.process import LabError
from tests.lab.services import Lab

INTERVAL_S = 10.0
LIMIT_S = 60.0


def main() -> None:
    """Print the table, as Markdown."""
    parser = argparse.ArgumentParser(description="From a kill to the new process, without and with kmonitor.")
    parser.add_argument("--kills", type=int, default=10, help="of each row")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 16), help="of the moments")
    asked = parser.parse_args()
    random.seed(asked.seed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: what was started is ended, namespaces and pins are removed
    with bpffs.mounted() as pins, network() as net, tempfile.TemporaryDirectory(prefix="kmonitor-ha-") as folder:
        lab = Lab(pins)
        try:
            stage = Stage(lab, net, Path(folder))
            _resource(stage)
            print(f"seed {asked.seed}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs", flush=True)
            rows = [("Pacemaker's own monitor, every 10 s", _kills(stage, asked.kills, None))]
            rows.append(("`crm_resource --fail` at once, nothing asked", _kills(stage, asked.kills, _fail_at_once)))
            before = stage.cluster.failures("any")
            stage.start_tool()
            stage.settled("any", _where(stage).name)
            rows.append(("`kmon ha pacemaker`", _kills(stage, asked.kills, None)))
            told = [each for each in stage.tool.said("outcome", "any") if each["action"] == "failed"]
            failed = stage.cluster.failures("any") - before
            if failed != asked.kills:
                print(*(line.decode() for line in stage.tool.running.lines), sep="\n")
            stage.stop_tool()
            stage.cluster.close()
        finally:
            lab.close()
    print(f"\n| how Pacemaker learns of it | n | mean | median | least | most |\n|---|---|---|---|---|---|\n{_lines(rows)}")
    mean = statistics.mean(each["seconds"] for each in told)
    print(f"\nfrom the event to the end of `crm_resource --fail`: mean {mean:.3f} s; failed {failed} times for {asked.kills} kills")
    if failed != asked.kills:
        raise SystemExit("table: each kill must be told once")


def _resource(stage: Stage) -> None:
    parameters = {"binfile": "/usr/bin/sleep", "cmdline_options": "1000000", "pidfile": "/run/any.pid"}
    meta = {"resource-stickiness": "100"}
    stage.cluster.configure("resources", primitive("any", "heartbeat:anything", parameters, interval=f"{INTERVAL_S:g}s", meta=meta))
    stage.cluster.wait_active("any", "alpha")


def _where(stage: Stage) -> Node:
    [name] = stage.cluster.active_on("any")
    return stage.cluster[name]


def _fail_at_once(node: Node) -> None:
    node.do("crm_resource", "--fail", "--resource", "any", "--node", node.name)


def _kills(stage: Stage, kills: int, then: Callable[[Node], None] | None) -> list[float]:
    """Seconds from the kill to another process's pid in the pidfile."""
    found = []
    for number in range(kills):
        if number == kills // 2:  # the other half on the other node
            other = next(node.name for node in stage.cluster.nodes if node is not _where(stage))
            stage.cluster.nodes[0].do("crm_resource", "--move", "--resource", "any", "--node", other)
            stage.cluster.wait_active("any", other)
            stage.cluster.wait_idle()
            stage.cluster.nodes[0].do("crm_resource", "--clear", "--resource", "any")
        stage.cluster.wait_idle()
        time.sleep(1.5 + random.uniform(0, INTERVAL_S))  # the moment is what is random
        node = _where(stage)
        pid, victim = stage.pid("any", node.name), _host_pid(node, stage.pid("any", node.name))
        began = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        if then is not None:
            then(node)
        where = _wait_other(stage, node, pid)
        found.append(time.monotonic() - began)
        print(f"  {found[-1]:.3f} s, {node.name} to {where}", flush=True)
        stage.cluster.wait_active("any", where)
    return found


def _wait_other(stage: Stage, old_node: Node, old_pid: int) -> str:
    """The node on which the next one is: most often the same."""
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        for node in stage.cluster.nodes:
            with contextlib.suppress(OSError, ValueError):  # not there, or just being written
                if (node, stage.pid("any", node.name)) != (old_node, old_pid):
                    return node.name
        time.sleep(0.001)
    raise LabError(f"no new process in {LIMIT_S:g} s\n{old_node.call('crm_mon', '-1rfo').stdout}")


def _host_pid(node: Node, pid: int) -> int:
    """Of a process of the node, as the initial namespace has it."""
    namespace = (node.machine.root.parent / "ns" / "pid").readlink()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "ns" / "pid").readlink() == namespace and f"\t{pid}\n" in _nspid(entry):
                    return int(entry.name)
            except OSError:
                continue
    raise LabError(f"{node.name} has no process {pid}")


def _nspid(entry: Path) -> str:
    status = (entry / "status").read_text(encoding="utf-8", errors="replace")
    return next((line + "\n" for line in status.splitlines() if line.startswith("NSpid:")), "")


def _lines(rows: list[tuple[str, list[float]]]) -> str:
    lines = []
    for name, found in rows:
        figures = statistics.mean(found), statistics.median(found), min(found), max(found)
        lines.append(f"| {name} | {len(found)} | {' | '.join(f'{figure:.3f} s' for figure in figures)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
