# SPDX-License-Identifier: Apache-2.0
"""Source "bcc": the same probe, compiled on this node by bcc, for kernels that were built without BTF.

libbpf makes the maps from the object file, as for source "core": that takes no BTF of the kernel. The programs are compiled from the source
that lies beside the object. Where the kernel's fields lie is read from its BTF if it has one, else from its headers.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import astuple
from importlib import resources
from pathlib import Path
from typing import Any

from kmonitor.agent.capabilities import refusal
from kmonitor.agent.errors import BpfError, CaptureError
from kmonitor.agent.kernel_btf import KernelBtf, has_kernel_btf
from kmonitor.agent.libbpf import Object
from kmonitor.agent.misses import SKIPPED
from kmonitor.agent.pins import PinFolder
from kmonitor.agent.probe import (
    CAPABILITIES,
    INFER,
    ITERATOR,
    Config,
    Probe,
    ProbeOptions,
    is_refusal,
    load_object,
    object_path,
    open_object,
    run,
)
from kmonitor.agent.sources import bcc_headers

INTERPRETERS = (sys.executable, "/usr/bin/python3")
"""Which are asked for bcc. A distribution's package belongs to the distribution's interpreter, which need not be the one that runs this."""
_LOADER = Path(__file__).with_name("bcc_loader.py")
STALL_S = 30.0
"""Without any CPU time used, after which its compiler is given up."""
_VICTIM_IS_TASK_SINCE = 6, 8
_MAPS = {
    "events": "events",
    "watched": "watched",
    "watched_cgroups": "watched_cgroups",
    "waiting": "waiting",
    "killers": "killers",
    "kernel_kills": "kernel_kills",
    "claims": "claims",
    "ended": "ended",
    "filenames": "filenames",
    "turns": "turns",
    "control": ".data.control",
}
"""All that the programs use: as the source names it, and as the object file does."""


def load(options: ProbeOptions, pins: PinFolder | None) -> Probe:
    """Compile the probe, load and attach it, and pin it if `pins` is given (it must be open).

    Raises CaptureError, MissingCapabilityError, PinError, BpfError.
    """
    sources = Path(str(resources.files("kmonitor.agent").joinpath("bpf")))
    if not sources.is_dir():
        raise CaptureError("the probe's source is not beside its object: run 'make build' in the source tree, or install a wheel")
    has_group_dead, victim_is_task, offsets = _fit(sources)
    config = Config.of(options, has_group_dead=has_group_dead, victim_is_task=victim_is_task)
    obj = open_object(options, config, own_btf=object_path())
    try:
        for program in (*config.hooks(), ITERATOR, INFER):
            obj.skip_program(program)
        load_object(obj)
        made = _compile(sources, obj, config, offsets)
        try:
            programs = {program: os.dup(made[f"prog_{program}"]) for program in (INFER, *SKIPPED)}
            return run("bcc", obj, config, pins, lambda program: os.dup(made[program]), programs)
        finally:
            for fd in made.values():
                os.close(fd)
    finally:
        obj.close()


def version() -> str:
    """Of the bcc that is installed. Raises CaptureError if there is none."""
    return str(_ask({"hooks": [], "programs": [], "headers": None})["version"])


def _fit(sources: Path) -> tuple[bool, bool, dict[str, int] | None]:
    """(whether the exit tracepoint has group_dead, whether mark_victim gives a task, offsets of fields or None for the headers')."""
    if not has_kernel_btf():
        if not _has_kernel_headers():
            raise CaptureError(
                "the kernel has no BTF, and its headers are not installed:"
                f" apt install linux-headers-{platform.release()}, or name a folder in BCC_KERNEL_SOURCE"
            )
        # Raw tracepoints give no types. What the exit probe claims for itself is right on every kernel.
        release = tuple(int(number) for number in re.findall(r"\d+", platform.release())[:2])
        return False, release >= _VICTIM_IS_TASK_SINCE, None
    text = "".join(sources.joinpath(name).read_text(encoding="utf-8") for name in ("kmonitor.bpf.c", "loader.h"))
    with KernelBtf() as btf:
        # What looks like FIELD(..., struct, member) and is not has no offset either; one that is missing does not compile.
        pairs = set(re.findall(r", (\w+), (\w+)\)", text))
        found = {f"{struct}_{member}": btf.offset(struct, member) for struct, member in pairs}
        offsets = {name: offset for name, offset in found.items() if offset is not None}
        return btf.tracepoint_arguments("sched_process_exit") >= 2, btf.tracepoint_arguments("mark_victim") >= 2, offsets


def _compile(sources: Path, obj: Object, config: Config, offsets: dict[str, int] | None) -> dict[str, int]:
    """Have the programs compiled for these maps, loaded and attached: a descriptor of the link of each, and, as prog_NAME, of those
    programs that are run, or asked for what was skipped; the caller owns them."""
    with contextlib.ExitStack() as stack:
        maps = {name: stack.enter_context(contextlib.closing(obj.map(real))).fd for name, real in _MAPS.items()}
        # With offsets at hand the kernel's headers are not wanted, even if there are some: they define what kernel.h does.
        headers = None if offsets is None else str(stack.enter_context(_stub_headers()))
        flags = ["-DKMONITOR_BCC", "-Wno-everything", f"-I{sources}"]
        flags += [f"-DKMONITOR_FD_{name}={fd}" for name, fd in maps.items()]
        flags.append(f"-DKMONITOR_CONFIG={{{','.join(str(int(value)) for value in astuple(config))}}}")
        if config.copies == 1:
            flags.append("-DKMONITOR_NO_COPIES")
        if offsets is None:
            flags.append("-DKMONITOR_KERNEL_HEADERS")
        else:
            flags += [f"-DKMONITOR_OFFSET_{name}={offset}" for name, offset in offsets.items()]
        programs = [INFER, *SKIPPED]
        names = [*config.hooks(), *(f"prog_{program}" for program in programs)]
        ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
        order = {
            "source": sources.joinpath("kmonitor.bpf.c").read_text(encoding="utf-8"),
            "flags": flags,
            "headers": headers,
            "hooks": list(config.hooks().items()),
            "programs": programs,
            "socket": theirs.fileno(),
        }
        _ask(order, (*maps.values(), theirs.fileno()))
        theirs.close()
        _, made, _, _ = socket.recv_fds(ours, 16, len(names))
        return dict(zip(names, made, strict=True))


def _ask(order: dict[str, Any], descriptors: tuple[int, ...] = ()) -> dict[str, Any]:
    """The loader's answer. Raises CaptureError, MissingCapabilityError, BpfError."""
    answer: dict[str, Any] = {}
    log = ""
    for interpreter in dict.fromkeys(INTERPRETERS):
        answer, log = _run_loader(interpreter, order, descriptors)
        if not answer.get("missing"):
            break
    if "error" not in answer:
        return answer
    if answer.get("missing"):
        raise CaptureError(f"bcc is not installed: apt install python3-bpfcc, or dnf install python3-bcc ({answer['error']})")
    if is_refusal(answer["errno"]):
        raise refusal("the kernel refuses the probe", *CAPABILITIES)
    raise BpfError(answer["error"], answer["errno"], log)


def _run_loader(interpreter: str, order: dict[str, Any], descriptors: tuple[int, ...]) -> tuple[dict[str, Any], str]:
    """(its answer, what the compiler and the verifier said)."""
    environment = dict(os.environ)
    if "BCC_KERNEL_SOURCE" in environment:
        environment["BCC_KERNEL_SOURCE"] = os.path.abspath(environment["BCC_KERNEL_SOURCE"])  # noqa: PTH100 - links are followed there
    try:
        # -I: neither variables of this environment nor modules in the working directory have a part in it. Nor need this user be allowed
        # to read that folder, which the compiler would.
        child = subprocess.Popen(
            [interpreter, "-I", _LOADER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", pass_fds=descriptors, cwd="/", env=environment,
        )  # fmt: skip
    except OSError as error:
        return {"error": f"cannot run {interpreter}: {error.strerror}", "missing": True}, ""
    with child:
        try:
            out, err = _await(child, json.dumps(order))
        except BaseException:
            child.kill()
            raise
    try:
        return json.loads(out), err
    except ValueError:
        raise BpfError(f"bcc's loader ended with status {child.returncode}", 0, err) from None


def _await(child: subprocess.Popen[str], order: str) -> tuple[str, str]:
    """What it prints on stdout and stderr. Raises CaptureError if it does nothing any more: a slow machine is given the time it takes."""
    worked = -1
    given: str | None = order
    while True:
        try:
            return child.communicate(given, STALL_S)
        except subprocess.TimeoutExpired:
            given = None
            before, worked = worked, _ticks(child.pid)
            if worked <= before:
                raise CaptureError(f"bcc has not done anything for {STALL_S:g} s while it compiled the probe") from None


def _ticks(pid: int) -> int:
    """Of CPU time, its own and that of what it runs and has run, so far."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return 0
    return sum(int(field) for field in fields[11:15]) + sum(_ticks(int(child)) for child in children)


def _has_kernel_headers() -> bool:
    """Whether bcc finds some by itself: named ones, installed ones, or those that the kernel carries (CONFIG_IKHEADERS)."""
    return (
        "BCC_KERNEL_SOURCE" in os.environ
        or Path("/lib/modules", platform.release(), "build").exists()
        or Path("/sys/kernel/kheaders.tar.xz").exists()
    )


@contextlib.contextmanager
def _stub_headers() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kmonitor-headers-") as name:
        bcc_headers.write(Path(name))
        yield Path(name)
