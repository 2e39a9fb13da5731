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
from kmonitor.agent.pins import PinFolder
from kmonitor.agent.probe import (
    CAPABILITIES,
    HOOKS,
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
_LIMIT_S = 60.0
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
        for program in (*HOOKS, ITERATOR, INFER):
            obj.skip_program(program)
        load_object(obj)
        made = _compile(sources, obj, config, offsets)
        try:
            return run("bcc", obj, config, pins, lambda program: os.dup(made[program]), {INFER: os.dup(made[INFER])})
        finally:
            for fd in made.values():
                os.close(fd)
    finally:
        obj.close()


def version() -> str:
    """Of the bcc that is installed. Raises CaptureError if there is none."""
    return str(_ask({"hooks": [], "routines": [], "headers": None})["version"])


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
    """Have the programs compiled for these maps, loaded and attached: a descriptor of the link of each, and of the
    program that is not attached; the caller owns them."""
    with contextlib.ExitStack() as stack:
        maps = {name: stack.enter_context(contextlib.closing(obj.map(real))).fd for name, real in _MAPS.items()}
        # With offsets at hand the kernel's headers are not wanted, even if there are some: they define what kernel.h does.
        headers = None if offsets is None else str(stack.enter_context(_stub_headers()))
        flags = ["-DKMONITOR_BCC", "-Wno-everything", f"-I{sources}"]
        flags += [f"-DKMONITOR_FD_{name}={fd}" for name, fd in maps.items()]
        flags.append(f"-DKMONITOR_CONFIG={{{','.join(str(int(value)) for value in astuple(config))}}}")
        if offsets is None:
            flags.append("-DKMONITOR_KERNEL_HEADERS")
        else:
            flags += [f"-DKMONITOR_OFFSET_{name}={offset}" for name, offset in offsets.items()]
        ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
        order = {
            "source": sources.joinpath("kmonitor.bpf.c").read_text(encoding="utf-8"),
            "flags": flags,
            "headers": headers,
            "hooks": list(HOOKS.items()),
            "routines": [INFER],
            "socket": theirs.fileno(),
        }
        _ask(order, (*maps.values(), theirs.fileno()))
        theirs.close()
        _, made, _, _ = socket.recv_fds(ours, 16, len(HOOKS) + 1)
        return dict(zip((*HOOKS, INFER), made, strict=True))


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
    try:
        # -I: neither variables of this environment nor modules in the working directory have a part in it.
        done = subprocess.run(
            [interpreter, "-I", _LOADER], input=json.dumps(order), capture_output=True, text=True, errors="replace",
            pass_fds=descriptors, timeout=_LIMIT_S, check=False,
        )  # fmt: skip
        return json.loads(done.stdout), done.stderr
    except OSError as error:
        return {"error": f"cannot run {interpreter}: {error.strerror}", "missing": True}, ""
    except subprocess.TimeoutExpired:
        raise CaptureError(f"bcc took longer than {_LIMIT_S:.0f} s to compile the probe") from None
    except ValueError:
        raise BpfError(f"bcc's loader ended with status {done.returncode}", 0, done.stderr) from None


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
