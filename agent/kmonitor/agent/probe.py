# SPDX-License-Identifier: Apache-2.0
"""The probe in the kernel: loaded and attached, or found pinned and taken over."""

from __future__ import annotations

import os
import time
import zlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from kmonitor.agent import libbpf
from kmonitor.agent.errors import BpfError, CaptureError, MissingCapabilityError
from kmonitor.agent.maps import Control, pack_config, unpack_namespace
from kmonitor.agent.pins import PinFolder
from kmonitor.agent.ring import Ring

DEFAULT_RING_BYTES = 16 * 1024 * 1024
DEFAULT_WATCHED_MAX = 32768
_HOOKS = ("kmonitor_exit", "kmonitor_free", "kmonitor_signal", "kmonitor_oom", "kmonitor_exec", "kmonitor_fork")
"""In this order: an end that is seen without its beginning does less harm than a process that is followed and never forgotten."""
_ITERATORS = ("kmonitor_tasks", "kmonitor_where")
_MAPS = {"events": "events", "watched": "watched", "watched_cgroups": "watched_cgroups", "control": ".data.control"}


@dataclass(frozen=True, slots=True)
class ProbeOptions:
    """What is fixed when the probe is loaded."""

    scope: str = "host"
    """"host", or "pidns": only the agent's pid namespace and those below it, with the pids seen there."""
    ring_bytes: int = DEFAULT_RING_BYTES
    watched_max: int = DEFAULT_WATCHED_MAX
    force_claim: bool = False
    """Do as on a kernel that does not tell which thread's end is the process's; for tests."""


class Probe:
    """Ring, control and maps of a running probe. `close` detaches it, unless it is pinned."""

    def __init__(self, maps: dict[str, libbpf.Map], iterators: dict[str, int], obj: libbpf.Object | None, *, adopted: bool) -> None:
        self._maps = maps
        self._iterators = iterators
        self._object = obj
        self.adopted = adopted
        """Whether it was running already: an agent before this one made it."""
        self.watched = maps["watched"]
        self.watched_cgroups = maps["watched_cgroups"]
        self.tasks_fd = iterators["kmonitor_tasks"]
        self.control = Control(maps["control"].fd)
        self.ring = Ring(maps["events"].fd, _ring_size(maps["events"].fd), self.control)

    @property
    def epoch(self) -> int:
        """Names the ring: when it was made, in Unix nanoseconds."""
        return self.control["epoch"]

    @property
    def is_current(self) -> bool:
        """Whether this version's object made it."""
        return self.control["object_crc"] == zlib.crc32(_image())

    def close(self) -> None:
        """Give back what this process holds."""
        self.ring.close()
        self.control.close()
        for each in self._maps.values():
            each.close()
        for fd in self._iterators.values():
            os.close(fd)
        if self._object is not None:
            self._object.close()


def open_probe(options: ProbeOptions, pins: PinFolder | None) -> Probe:
    """Take over the probe that is pinned, or load one, and pin it if `pins` is given (it must be open).

    Raises CaptureError, MissingCapabilityError, PinError, BpfError.
    """
    if pins is not None:
        expected = {f"map_{name}" for name in _MAPS} | {f"prog_{name}" for name in _ITERATORS} | {f"link_{name}" for name in _HOOKS}
        found = pins.names()
        if found >= expected:
            return _adopt(options, pins)
        for name in found:  # an agent was killed while it pinned: what there is captures nothing whole
            (pins.path / name).unlink()
    return _load(options, pins)


def _adopt(options: ProbeOptions, pins: PinFolder) -> Probe:
    maps = {name: libbpf.Map(libbpf.open_pinned(pins.path / f"map_{name}"), name) for name in _MAPS}
    iterators = {name: libbpf.open_pinned(pins.path / f"prog_{name}") for name in _ITERATORS}
    probe = Probe(maps, iterators, None, adopted=True)
    if options.scope == "pidns":
        _, inum = _where(iterators)
        if inum != probe.control["pidns_inum"]:
            raise CaptureError(
                f"the pins in {pins.path} belong to another pid namespace: give this agent another --node, or remove them with --unpin"
            )
    return probe


def _load(options: ProbeOptions, pins: PinFolder | None) -> Probe:
    if not Path("/sys/kernel/btf/vmlinux").exists():
        raise CaptureError("the kernel has no BTF (/sys/kernel/btf/vmlinux): it must be built with CONFIG_DEBUG_INFO_BTF (5.12 or later)")
    exit_arguments, victim_arguments = libbpf.tracepoint_arguments("sched_process_exit", "mark_victim")
    inum = Path("/proc/self/ns/pid").stat().st_ino
    image = _image()
    obj = libbpf.Object(image, "kmonitor")
    try:
        obj.set_max_entries("events", options.ring_bytes)
        obj.set_max_entries("watched", options.watched_max)
        obj.set_initial(
            ".rodata.config",
            pack_config(
                pidns_inum=inum if options.scope == "pidns" else 0,
                has_group_dead=exit_arguments >= 2 and not options.force_claim,
                victim_is_task=victim_arguments >= 2,
                fill_mark=options.ring_bytes // 4 * 3,
            ),
        )
        try:
            obj.load()
        except BpfError as error:
            if error.errno in (1, 13):
                raise MissingCapabilityError(
                    "the kernel refuses the probe: run as root, or with CAP_BPF and CAP_PERFMON; see kmon doctor"
                ) from error
            raise
        maps = {name: obj.map(real) for name, real in _MAPS.items()}
        iterators = {name: obj.program_fd(name) for name in _ITERATORS}
        level, _ = _where(iterators)
        _check_scope(options.scope, level)
        probe = Probe(maps, iterators, obj, adopted=False)
        probe.control["pidns_level"] = level
        probe.control["pidns_inum"] = inum
        probe.control["epoch"] = time.time_ns()
        probe.control["object_crc"] = zlib.crc32(image)
        for name in _HOOKS:
            obj.attach(name)
        if pins is not None:
            _pin(obj, pins)
    except BaseException:
        obj.close()
        raise
    return probe


def _pin(obj: libbpf.Object, pins: PinFolder) -> None:
    for name, real in _MAPS.items():
        obj.pin_map(real, pins.path / f"map_{name}")
    for name in _ITERATORS:
        obj.pin_program(name, pins.path / f"prog_{name}")
    for name in _HOOKS:
        obj.pin_link(name, pins.path / f"link_{name}")


def _check_scope(scope: str, level: int) -> None:
    if scope == "host" and level != 0:
        raise CaptureError("scope host needs the initial pid namespace, and this agent runs in another: use --scope pidns")


def _where(iterators: dict[str, int]) -> tuple[int, int]:
    """(level, inode number) of this process's pid namespace."""
    return unpack_namespace(libbpf.read_iterator(iterators["kmonitor_where"]))


def _image() -> bytes:
    try:
        return resources.files("kmonitor.agent").joinpath("kmonitor.bpf.o").read_bytes()
    except FileNotFoundError:
        raise CaptureError("kmonitor.bpf.o is not built: run 'make build' in the source tree, or install a wheel") from None


def _ring_size(fd: int) -> int:
    """max_entries of the map, in bytes, as proc(5) shows it in fdinfo."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "max_entries":
            return int(value)
    raise BpfError("the pinned ring is not a map", 22)
