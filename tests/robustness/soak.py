# SPDX-License-Identifier: Apache-2.0
"""A random run: faults drawn from a seed, under load, and in the end the books are done. `make soak FOR=2m SEED=7 ARGS=...`

    python -m tests.robustness.soak [--for 2m] [--seed N] [--log sqlite|memory] [--nodes 2] [--rate 150] [--keep FOLDER]
        [--without NAME]...

Two nodes with a steady workload each, one of which has a small ring; one broker; monitors of different kinds: one watches whole nodes,
one follows the workloads, one does so and is killed now and then and comes back with its cursor, one is slow. Each fault is printed
with its time: the same seed and options draw the same faults, at the same times as far as the machine is as fast.

At the end all is mended, the workloads stop, and once all is told it prints for each monitor how many events were generated, delivered,
delivered twice, and counted in gaps. Exit status 1 if delivered + in gaps is not generated, for any type of any node, or if anything
came twice, or if an end was told that was not, or not told and not counted either.

The slow one falls behind by more than a session keeps of what has ended, if it goes on for long, and is told of that by a gap without
numbers when the broker is started again (guarantees.md). Then it is held against the one that follows the same workloads: each event
that this was told of, and the slow one was not, lies in a gap of the slow one.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from kmonitor.wire.durations import parse_duration
from tests.lab import bpffs, workload
from tests.lab.process import LabError
from tests.lab.services import Lab, stderr_of_all
from tests.robustness.account import PROCESS, Truth
from tests.robustness.faults import Fault, faults
from tests.robustness.listener import Listener
from tests.robustness.pace import Pace
from tests.robustness.rig import MEMORY, SQLITE, Rig, rig

LEASE = "1s"
RINGS = ("16M", "256K")
"""Of the nodes, in turn: the second one's overflows when its broker is away for some seconds."""
SLOW = ("--pace", "20", "--window", "64")
SETTLED_S = 120.0
"""To be told all, when nothing is wrong any more."""


@dataclass(frozen=True)
class Bout:
    """Faults that happen together. Times in seconds, drawn beforehand: what is drawn must not depend on how fast things went."""

    rest: float
    begins: list[tuple[float, Fault]]
    holds: float
    ends: list[int]


def draw(source: random.Random, all_faults: Sequence[Fault], seconds: float) -> list[Bout]:
    """As many bouts as fill the time."""
    bouts: list[Bout] = []
    while seconds > 0:
        wanted = source.choices((1, 2, 3), (6, 3, 1))[0]
        # By subject first: there are many ways to stop a monitor, and one broker.
        subjects = source.sample(sorted({fault.subject for fault in all_faults}), wanted)
        chosen = [source.choice([fault for fault in all_faults if fault.subject == subject]) for subject in subjects]
        begins = [(source.uniform(0, 0.8), fault) for fault in chosen]
        # Mostly short, now and then for long.
        holds = min(source.expovariate(1 / 1.2), 8.0)
        bout = Bout(source.uniform(0.1, 2.0), begins, holds, source.sample(range(len(chosen)), len(chosen)))
        bouts.append(bout)
        seconds -= bout.rest + bout.holds + sum(wait for wait, _ in begins)
    return bouts


class Soak:
    """One run."""

    def __init__(self, rig: Rig, lab: Lab, *, rate: float, seed: int) -> None:
        self._rig = rig
        self._began = time.monotonic()
        self.paces: dict[str, Pace] = {node: rig.pace(lab, node, rate=rate, seed=seed + number) for number, node in enumerate(rig.machines)}
        trees = [pace.tree for pace in self.paces.values()]
        self.monitors: dict[str, Listener] = {
            "of nodes": rig.listener(lab, {"nodes": list(rig.machines), "events": "process"}),
            "following": rig.listener(lab, *trees),
            "resuming": rig.listener(lab, *trees),
            "slow": rig.listener(lab, *trees, options=SLOW),
        }
        for node in rig.machines:
            rig.agents_did(node)

    def say(self, text: str) -> None:
        """With the time since the start."""
        print(f"{time.monotonic() - self._began:8.2f}  {text}", flush=True)

    def hurt(self, bouts: Sequence[Bout]) -> None:
        """One after the other."""
        for pace in self.paces.values():
            pace.go()
        for bout in bouts:
            time.sleep(bout.rest)
            with contextlib.ExitStack() as left:
                begun: list[contextlib.ExitStack] = []
                for wait, fault in bout.begins:
                    time.sleep(wait)
                    self.say(f"{fault.name}")
                    begun.append(left.enter_context(contextlib.ExitStack()))
                    begun[-1].enter_context(fault.happens())
                time.sleep(bout.holds)
                for number in bout.ends:
                    begun[number].close()
                    self.say(f"    over: {bout.begins[number][1].name}")

    def settle(self) -> bool:
        """Stop the load, wait until all is told, and do the books. Whether they balance."""
        self.monitors["slow"].hurry()
        truths = {node: pace.stop() for node, pace in self.paces.items()}
        of_nodes = {node: (truth + self._rig.agents_did(node)).of_types(PROCESS) for node, truth in truths.items()}
        self.say("the load has stopped")
        balanced = True
        for name, listener in self.monitors.items():
            due = of_nodes if name == "of nodes" else truths
            like = self.monitors["following"] if name == "slow" else None
            balanced &= self._balance(name, listener, due, like)
        return balanced

    def _balance(self, name: str, listener: Listener, due: dict[str, Truth], like: Listener | None) -> bool:
        """`like`: another monitor, which was told all of the same."""
        total = sum(truth.total for truth in due.values())
        wrong: list[str] = []
        try:
            if like is not None:
                listener.wait_reached(like.heartbeat(), limit=SETTLED_S)
            else:
                listener.wait_counted(total, limit=SETTLED_S)
        except LabError as error:
            wrong.append(str(error).splitlines()[0])
        account = listener.account.read()
        wrong += account.differences(due, whole=False)
        self.say(f"monitor {name}: {account.summary(total)}")
        if like is not None and account.unnumbered:
            self.say(f"    was told {len(account.unnumbered)} gaps without numbers: each event of monitor following is looked for")
            wrong += account.uncovered(like.account)
        for text in wrong[:20]:
            self.say(f"    WRONG: {text}")
        return not wrong


def terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends it as Ctrl-C does: nothing is left behind."""
    raise SystemExit(128 + number)


def main(argv: Sequence[str]) -> int:
    """Exit status 0 if the books balance."""
    parser = argparse.ArgumentParser(prog="soak")
    parser.add_argument("--for", dest="seconds", type=parse_duration, default=120.0, metavar="TIME")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--log", choices=("sqlite", "memory"), default="sqlite")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--rate", type=float, default=150.0, help="deeds a second on each node; each is two or three events")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="an empty folder for journals and logs, which stay")
    parser.add_argument("--without", action="append", default=[], metavar="WORDS", help="no faults that have these words in their names")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, terminate)
    print(f"seed {options.seed}, for {options.seconds:g} s, {options.nodes} nodes, log {options.log}", flush=True)
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kmonitor-soak-")))
        folder.mkdir(parents=True, exist_ok=True)
        pins = stack.enter_context(bpffs.mounted())
        programs = workload.build(folder)
        nodes: dict[str, tuple[str, ...]] = {
            f"n{number + 1}": ("--ring-size", RINGS[number % len(RINGS)]) for number in range(options.nodes)
        }
        log = SQLITE if options.log == "sqlite" else MEMORY
        made = stack.enter_context(rig(pins, programs, folder, "--lease", LEASE, nodes=nodes, log=log))
        lab = Lab(pins)
        stack.callback(lab.close)
        run = Soak(made, lab, rate=options.rate, seed=options.seed)
        possible = [
            fault
            for fault in faults(made, run.monitors, {"resuming"})
            if (fault.keeps_log or log != MEMORY) and not any(words in fault.name for words in options.without)
        ]
        try:
            run.hurt(draw(random.Random(options.seed), possible, options.seconds))
            balanced = run.settle()
        except BaseException:
            show_stderr()
            raise
        if not balanced:
            show_stderr()
        print(f"seed {options.seed}: {'all told, once' if balanced else 'WRONG'}", flush=True)
        return 0 if balanced else 1


def show_stderr() -> None:
    """Of all that runs."""
    for name, text in stderr_of_all():
        if text:
            print(f"-- {name}:\n{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
