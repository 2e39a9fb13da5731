# SPDX-License-Identifier: Apache-2.0
"""Source "core": the probe compiled once, fitted to the running kernel by libbpf through the kernel's BTF."""

from __future__ import annotations

from kmonitor.agent.kernel_btf import KernelBtf
from kmonitor.agent.misses import SKIPPED
from kmonitor.agent.pins import PinFolder
from kmonitor.agent.probe import INFER, ITERATOR, Config, Probe, ProbeOptions, load_object, open_object, run
from kmonitor.wire.errors import KmonitorError


def load(options: ProbeOptions, pins: PinFolder | None) -> Probe:
    """Load the probe, attach it, and pin it if `pins` is given (it must be open).

    Raises CaptureError, MissingCapabilityError, PinError, BpfError.
    """
    with KernelBtf() as btf:
        has_group_dead = btf.tracepoint_arguments("sched_process_exit") >= 2
        victim_is_task = btf.tracepoint_arguments("mark_victim") >= 2
    config = Config.of(options, has_group_dead=has_group_dead, victim_is_task=victim_is_task)
    obj = open_object(options, config)
    try:
        try:
            load_object(obj, quiet=True)
        except KmonitorError:  # once more, for what libbpf and the verifier say of it
            obj.close()
            obj = open_object(options, config)
            load_object(obj)
        return run("core", obj, config, pins, obj.attach, {program: obj.program_fd(program) for program in (ITERATOR, INFER, *SKIPPED)})
    finally:
        obj.close()  # maps, programs and links live on by their own descriptors
