# SPDX-License-Identifier: Apache-2.0
"""The probe in the kernel, whoever loaded it: its maps, its ring, its links; made to run, or found pinned and taken over."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kmonitor.agent import libbpf
from kmonitor.agent.capabilities import missing, refusal
from kmonitor.agent.errors import BpfError, CaptureError
from kmonitor.agent.maps import ANY_LEARN, Control, pack_config, pack_gone
from kmonitor.agent.misses import SKIPPED, Misses
from kmonitor.agent.pins import PinFolder
from kmonitor.agent.processes import Found, ProcessTable, comm_bytes
from kmonitor.agent.procfs import ProcTable
from kmonitor.agent.ring import Ring
from kmonitor.agent.secret import make_secret, pin_secret, pinned_secret
from kmonitor.wire.record import RECORD_VERSION

DEFAULT_RING_BYTES = 16 * 1024 * 1024
DEFAULT_WATCHED_MAX = 32768
HOOKS = {
    "kmonitor_exit": "sched_process_exit",
    "kmonitor_signal": "signal_generate",
    "kmonitor_deliver": "signal_deliver",
    "kmonitor_oom": "mark_victim",
    "kmonitor_exec": "sched_process_exec",
    "kmonitor_fork": "sched_process_fork",
}
"""Program and tracepoint, in the order of attaching: an end that is seen without its beginning does less harm than a process that is
followed and never forgotten."""
COPIES_MOST = 3
"""KMONITOR_COPIES."""
_PREEMPTS_SINCE = 7, 0
"""From this Linux on tracepoints, and so programs, may be preempted. Elsewhere only what interrupts finds one at work, and no process
forks or ends in an interrupt."""
_TURNS = 8192
ITERATOR = "kmonitor_tasks"
INFER = "kmonitor_infer"
"""Attached nowhere: run to tell the end of a process that was found gone."""
CAPABILITIES = ("CAP_BPF", "CAP_PERFMON")
"""That it takes to load, attach and pin it, and to look processes up."""
MAPS = {"events": "events", "watched": "watched", "watched_cgroups": "watched_cgroups", "control": ".data.control"}
"""Pinned, by their names as pins; and as the object file has them."""
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO, include/linux/proc_ns.h
_FILL_MARK = 3, 4


@dataclass(frozen=True, slots=True)
class ProbeOptions:
    """What is fixed when the probe is loaded."""

    scope: str = "host"
    """"host", or "pidns": only the agent's pid namespace and those below it, with the pids seen there."""
    ring_bytes: int = DEFAULT_RING_BYTES
    watched_max: int = DEFAULT_WATCHED_MAX
    force_claim: bool = False
    """Do as on a kernel that does not tell which thread's end is the process's; for tests."""
    force_copies: bool = False
    """Do as on a kernel that preempts programs; for tests."""


@dataclass(frozen=True, slots=True)
class Config:
    """struct kmonitor_config."""

    pidns_inum: int
    has_group_dead: bool
    victim_is_task: bool
    fill_mark: int
    copies: int

    @classmethod
    def of(cls, options: ProbeOptions, *, has_group_dead: bool, victim_is_task: bool) -> Config:
        """For this process. Raises CaptureError if the scope is not possible where it runs."""
        inum = _own_namespace()
        if options.scope == "host" and inum != _INITIAL_PID_NAMESPACE:
            raise CaptureError("scope host needs the initial pid namespace, and this agent runs in another: use --scope pidns")
        most, of = _FILL_MARK
        return cls(
            inum if options.scope == "pidns" else 0,
            has_group_dead and not options.force_claim,
            victim_is_task,
            options.ring_bytes // of * most,
            COPIES_MOST if options.force_copies or preempts() else 1,
        )

    def pack(self) -> bytes:
        """As in the object's section .rodata.config."""
        return pack_config(
            pidns_inum=self.pidns_inum,
            has_group_dead=self.has_group_dead,
            victim_is_task=self.victim_is_task,
            fill_mark=self.fill_mark,
            copies=self.copies,
        )

    def hooks(self) -> dict[str, str]:
        """Program and tracepoint, as HOOKS has them, and copies behind the first of each."""
        return {
            copy: tracepoint
            for program, tracepoint in HOOKS.items()
            for copy in ([copy_of(program, number) for number in range(1, self.copies + 1)] if program in SKIPPED else [program])
        }


def copy_of(program: str, number: int) -> str:
    """As PROBE_COPIES names it."""
    return program if number == 1 else f"{program}_{number}"


def preempts() -> bool:
    """Whether this kernel may preempt a program that is attached to a tracepoint."""
    return tuple(int(number) for number in re.findall(r"\d+", platform.release())[:2]) >= _PREEMPTS_SINCE


class Probe:
    """Ring, control and maps of a running probe. `close` detaches it, unless it is pinned."""

    def __init__(
        self, name: str, maps: dict[str, libbpf.Map], programs: dict[str, int], links: dict[str, int], *, adopted: bool, secret: bytes = b""
    ) -> None:
        """Owns all that it is given. `programs`: INFER, those of SKIPPED, and ITERATOR, without which processes are looked up
        in /proc. `links` by program; none are needed of a probe that is pinned."""
        self.name = name
        self.record_version = RECORD_VERSION
        self._maps = maps
        self._programs = programs
        self._links = links
        self.adopted = adopted
        """Whether it was running already: an agent before this one made it."""
        self.secret = secret or make_secret()
        """Proves that this agent holds the ring."""
        self.watched = maps["watched"]
        self.watched_cgroups = maps["watched_cgroups"]
        self.processes = ProcessTable(programs[ITERATOR]) if ITERATOR in programs else ProcTable()
        self._misses = Misses({name: os.dup(fd) for name, fd in programs.items() if name in SKIPPED})
        self.control = Control(maps["control"].fd, self._misses)
        self.ring = Ring(maps["events"].fd, _map_info(maps["events"].fd, "max_entries"), self.control)

    @property
    def epoch(self) -> int:
        """Names the ring: when it was made, in Unix nanoseconds."""
        return self.control["epoch"]

    async def prepare(self, node_mask: int) -> None:
        """The kernel knows every process."""
        del node_mask

    def begin_epoch(self) -> None:
        """Name the ring anew, with what is in it: its positions mean something else from here on."""
        self.control["epoch"] = max(time.time_ns(), self.epoch + 1)

    def catch_up(self) -> None:
        """The kernel matches each event when it happens: nothing is ever behind."""

    def infer_exit(self, pid: int, start_boottime_ns: int, known: Found | None = None) -> bool:
        """Have the probe tell the end of a process that is gone; False if the ring has no room for it. See source.Source."""
        comm, ppid, uid, gid, cgroup_id = b"", 0, 0, 0, 0
        if known is not None:
            comm, ppid, uid, gid, cgroup_id = comm_bytes(known.comm), known.ppid, known.uid, known.gid, known.cgroup_id
        gone = pack_gone(start_boottime_ns, cgroup_id, pid, ppid, uid, gid, comm)
        return libbpf.run_program(self._programs[INFER], gone) == 1

    def pin(self, pins: PinFolder) -> None:
        """Have it outlive this process. `pins` is open and empty. Raises PinError, BpfError."""
        pin_secret(pins, self.secret)
        for name, each in self._maps.items():
            libbpf.pin(each.fd, pins.path / f"map_{name}")
        for name, fd in self._programs.items():
            libbpf.pin(fd, pins.path / f"prog_{name}")
        for name, fd in reversed(self._links.items()):  # the last, and of these the first copies: with them it is whole
            libbpf.pin(fd, pins.path / f"link_{name}")

    def close(self) -> None:
        """Give back what this process holds."""
        self.ring.close()
        self.control.close()
        self._misses.close()
        for each in self._maps.values():
            each.close()
        for fd in (*self._links.values(), *self._programs.values()):
            os.close(fd)


def open_object(options: ProbeOptions, config: Config, *, own_btf: Path | None = None) -> libbpf.Object:
    """The object file, with its maps sized and its constants set; not loaded. For `own_btf` see libbpf.Object.

    Raises BpfError, CaptureError.
    """
    obj = libbpf.Object(image(), "kmonitor", own_btf=own_btf)
    try:
        obj.set_max_entries("events", options.ring_bytes)
        obj.set_max_entries("watched", options.watched_max)
        if config.copies > 1:
            obj.set_max_entries("turns", _TURNS)
        for program in SKIPPED:
            for number in range(config.copies + 1, COPIES_MOST + 1):
                obj.skip_program(copy_of(program, number))
        obj.set_initial(".rodata.config", config.pack())
    except BaseException:
        obj.close()
        raise
    return obj


def load_object(obj: libbpf.Object, *, quiet: bool = False) -> None:
    """Into the kernel. Raises MissingCapabilityError, which names what is missing, or BpfError, of which there is a log unless `quiet`."""
    try:
        obj.load(quiet=quiet)
    except BpfError as error:
        if is_refusal(error.errno):
            raise refusal("the kernel refuses the probe", *CAPABILITIES) from error
        raise


def is_refusal(number: int) -> bool:
    """Whether an errno of bpf(2) is for lack of a capability. EACCES is the verifier's word too, for a program that it does not like."""
    return number == errno.EPERM or (number == errno.EACCES and bool(missing(*CAPABILITIES)))


def run(
    name: str, obj: libbpf.Object, config: Config, pins: PinFolder | None, attach: Callable[[str], int], programs: dict[str, int]
) -> Probe:
    """Make a probe of a loaded object: attach its programs, and pin all if `pins` is given (it must be open).

    `attach` gives the descriptor of a program's link. `programs`: see Probe; this takes them over, if it fails too.
    Raises MissingCapabilityError, PinError, BpfError.
    """
    maps = {mine: obj.map(real) for mine, real in MAPS.items()}
    links: dict[str, int] = {}
    control = Control(maps["control"].fd)
    try:
        control["epoch"] = time.time_ns()
        control["object_crc"] = zlib.crc32(image())
        for program in config.hooks():
            links[program] = attach(program)
        if config.pidns_inum:
            _learn_level(control, config.pidns_inum)
        probe = Probe(name, maps, programs, links, adopted=False)
    except BaseException:
        for each in maps.values():
            each.close()
        for fd in (*links.values(), *programs.values()):
            os.close(fd)
        raise
    finally:
        control.close()
    if pins is not None:
        try:
            probe.pin(pins)
        except BaseException:
            probe.close()
            raise
    return probe


def is_current(pins: PinFolder) -> bool:
    """Whether the probe that is pinned is whole, and made from this version's object. Raises PinError, BpfError."""
    # Links come last: with all of them there, nothing is missing but the iterator, which source bcc has not.
    whole = {f"map_{name}" for name in MAPS} | {f"prog_{name}" for name in (INFER, *SKIPPED)} | {f"link_{program}" for program in HOOKS}
    if pins.version != RECORD_VERSION or not pins.names() >= whole:
        return False
    with contextlib.closing(open_control(pins)) as control:
        return control["object_crc"] == zlib.crc32(image())


def can_adopt(pins: PinFolder, choice: str) -> bool:
    """Whether an agent with this source can go on with the probe that is pinned; "auto" with any. Raises PinError, BpfError."""
    return choice in ("auto", source_of(pins.names())) and is_current(pins)


def source_of(names: set[str]) -> str:
    """Which source has made the probe that is pinned, by the names of its pins."""
    return "core" if f"prog_{ITERATOR}" in names else "bcc"


def open_control(pins: PinFolder, misses: Misses | None = None) -> Control:
    """That of any version's probe. Raises PinError, BpfError."""
    fd = libbpf.open_pinned(pins.path / "map_control")
    try:
        return Control(fd, misses)
    finally:
        os.close(fd)


def open_misses(pins: PinFolder) -> Misses:
    """Those of any version's probe, as far as it has pinned what is counted. Raises PinError, BpfError."""
    return Misses({name: libbpf.open_pinned(pins.path / f"prog_{name}") for name in SKIPPED if f"prog_{name}" in pins.names()})


def open_ring(pins: PinFolder, control: Control) -> Ring:
    """That of any version's probe. Raises PinError, BpfError."""
    fd = libbpf.open_pinned(pins.path / "map_events")
    try:
        return Ring(fd, _map_info(fd, "max_entries"), control)
    finally:
        os.close(fd)


def adopt(options: ProbeOptions, pins: PinFolder) -> Probe | None:
    """Take over the probe that is pinned; None if there is none.

    Raises CaptureError if it is another version's or another namespace's, PinError, BpfError, MissingCapabilityError.
    """
    found = pins.names()
    if not found:
        return None
    if not is_current(pins):
        raise CaptureError(f"what is pinned in {pins.path} is another version's: remove it with --unpin")
    programs = {name: libbpf.open_pinned(pins.path / f"prog_{name}") for name in (ITERATOR, INFER, *SKIPPED) if f"prog_{name}" in found}
    maps = {name: libbpf.Map(libbpf.open_pinned(pins.path / f"map_{name}"), name) for name in MAPS}
    secret = pinned_secret(pins)
    if not secret:  # the pins of an older version
        secret = make_secret()
        pin_secret(pins, secret)
    probe = Probe(source_of(found), maps, programs, {}, adopted=True, secret=secret)
    if options.scope == "pidns" and probe.control["pidns_inum"] != _own_namespace():
        probe.close()
        raise CaptureError(
            f"the pins in {pins.path} belong to another pid namespace: give this agent another --node, or remove them with --unpin"
        )
    return probe


def _own_namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino


def _learn_level(control: Control, inum: int) -> None:
    """Have the fork probe see this process make a thread: so it learns how deep the namespace lies."""
    control["any_mask"] = ANY_LEARN
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    control["any_mask"] = 0
    if control["pidns_inum"] != inum:
        raise CaptureError("scope pidns: the probe did not find this agent's pid namespace; please report it, with the kernel's version")


def object_path() -> Path:
    """Where the object file is."""
    return Path(__file__).with_name("kmonitor.bpf.o")


def image() -> bytes:
    """The object file's bytes. Raises CaptureError if it was not built."""
    try:
        return object_path().read_bytes()
    except FileNotFoundError:
        raise CaptureError("kmonitor.bpf.o is not built: run 'make build' in the source tree, or install a wheel") from None


def _map_info(fd: int, name: str) -> int:
    """A number of a map, as proc(5) shows it in fdinfo: "max_entries" (of a ring: its bytes), "value_size"."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii").splitlines():
        found, _, value = line.partition(":")
        if found == name:
            return int(value)
    raise BpfError("what is pinned as a map is none", errno.EINVAL)
