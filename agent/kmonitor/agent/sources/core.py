# SPDX-License-Identifier: Apache-2.0
"""Source "core": the probe compiled once, fitted to the running kernel by libbpf through the kernel's BTF."""

from __future__ import annotations

import errno
from pathlib import Path

from kmonitor.agent import libbpf
from kmonitor.agent.capabilities import missing, refusal
from kmonitor.agent.errors import BpfError, CaptureError
from kmonitor.agent.pins import PinFolder
from kmonitor.agent.probe import ITERATOR, Config, Probe, ProbeOptions, open_object, run

KERNEL_BTF = Path("/sys/kernel/btf/vmlinux")


def load(options: ProbeOptions, pins: PinFolder | None) -> Probe:
    """Load the probe, attach it, and pin it if `pins` is given (it must be open).

    Raises CaptureError, MissingCapabilityError, PinError, BpfError.
    """
    if not KERNEL_BTF.exists():
        raise CaptureError(f"the kernel has no BTF ({KERNEL_BTF}): it must be built with CONFIG_DEBUG_INFO_BTF (5.12 or later)")
    exit_arguments, victim_arguments = libbpf.tracepoint_arguments("sched_process_exit", "mark_victim")
    config = Config.of(options, has_group_dead=exit_arguments >= 2, victim_is_task=victim_arguments >= 2)
    obj = open_object(options, config)
    try:
        try:
            obj.load()
        except BpfError as error:
            # EACCES is the verifier's word too, for a program that it does not like.
            if error.errno == errno.EPERM or (error.errno == errno.EACCES and missing("CAP_BPF", "CAP_PERFMON")):
                raise refusal("the kernel refuses the probe", "CAP_BPF", "CAP_PERFMON") from error
            raise
        return run("core", obj, config, pins, obj.attach, obj.program_fd(ITERATOR))
    finally:
        obj.close()  # maps, programs and links live on by their own descriptors
