# SPDX-License-Identifier: Apache-2.0
"""The agent's probe, attached and detached at will while the agent goes on: a comparison with no probe takes turns of milliseconds.

On a virtual machine the same loop is 5 to 10 % faster or slower from one second to the next. An agent takes a second to start; its
programs are attached in 0.2 ms. So the probe is loaded and pinned here, as an agent does it; the agent that is started then finds
it and carries on with it, as after any restart; and the links, which nobody but this process holds then, are made and closed.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from bench.stack import NODE
from kmonitor.agent import libbpf
from kmonitor.agent.kernel_btf import KernelBtf
from kmonitor.agent.maps import Control
from kmonitor.agent.misses import SKIPPED
from kmonitor.agent.pins import PinFolder
from kmonitor.agent.probe import INFER, ITERATOR, Config, ProbeOptions, load_object, open_control, open_object, run

_ROOT = Path("/sys/fs/bpf")
_FORGET_SECONDS = 10


class Attached:
    """Detached at first. `root` is where an agent of NODE finds the pins."""

    def __init__(self, obj: libbpf.Object, config: Config, pins: PinFolder, control: Control) -> None:
        self._object = obj
        self._config = config
        self._pins = pins
        self._control = control
        self._links: list[int] = []
        self.root = pins.path.parent

    def adopted(self) -> None:
        """The agent has started: from here on nothing is attached but by `attach`."""
        for link in self._pins.path.glob("link_*"):  # by its path: the folder's lock is the agent's
            link.unlink()

    def attach(self) -> None:
        """As the agent does: the same programs in the same order."""
        for program in self._config.hooks():
            self._links.append(self._object.attach(program))

    def nobody_asks(self) -> None:
        """Wait until the kernel's masks say that no monitor wants anything. Raises SystemExit if they never do."""
        deadline = time.monotonic() + _FORGET_SECONDS
        while self._control["any_mask"]:
            if time.monotonic() > deadline:
                raise SystemExit("bench: the agent does not forget what was deregistered")
            time.sleep(0.001)  # memory of the kernel: nothing tells that it changes

    @contextlib.contextmanager
    def programs(self) -> Iterator[list[int]]:
        """Descriptors of the programs that `attach` attaches."""
        opened: list[int] = []
        try:
            opened += (self._object.program_fd(program) for program in self._config.hooks())
            yield opened
        finally:
            for program in opened:
                os.close(program)

    def lost(self) -> int:
        """Events that the ring could not take, so far."""
        return sum(map(sum, self._control.lost()))

    def detach(self) -> None:
        """No program is attached any more when this returns."""
        while self._links:
            os.close(self._links.pop())


@contextlib.contextmanager
def attached() -> Iterator[Attached]:
    """Load it and pin it in a folder of its own, which is removed afterwards. Raises CaptureError, BpfError, PinError."""
    options = ProbeOptions()
    with KernelBtf() as btf:
        has_group_dead = btf.tracepoint_arguments("sched_process_exit") >= 2
        victim_is_task = btf.tracepoint_arguments("mark_victim") >= 2
    config = Config.of(options, has_group_dead=has_group_dead, victim_is_task=victim_is_task)
    pins = PinFolder(_ROOT / f"kmonitor-bench-{os.getpid()}", NODE, options.scope)
    with contextlib.ExitStack() as undo:
        obj = open_object(options, config)
        undo.callback(obj.close)
        load_object(obj)
        undo.callback(_remove, pins)
        pins.open()
        run("core", obj, config, pins, obj.attach, {program: obj.program_fd(program) for program in (ITERATOR, INFER, *SKIPPED)}).close()
        pins.close()
        control = undo.enter_context(contextlib.closing(open_control(pins)))
        probe = Attached(obj, config, pins, control)
        undo.callback(probe.detach)
        yield probe


def _remove(pins: PinFolder) -> None:
    if pins.path.exists():
        for pinned in pins.path.iterdir():
            pinned.unlink()
        pins.path.rmdir()
    with contextlib.suppress(FileNotFoundError):
        pins.path.parent.rmdir()
