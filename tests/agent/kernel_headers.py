# SPDX-License-Identifier: Apache-2.0
"""Headers of the running kernel, as far as the probe reads its structs: made from its BTF, with each field where it is.

They stand in for a distribution's linux-headers package, which is there for its own kernels only.
"""

from __future__ import annotations

import re
from pathlib import Path

from kmonitor.agent.kernel_btf import KernelBtf
from kmonitor.agent.sources import bcc_headers

_KERNEL_H = Path(__file__).resolve().parents[2] / "bpf" / "kernel.h"
_OTHERS = "binfmts.h cgroup-defs.h cred.h kernfs.h mm_types.h pid.h pid_namespace.h sched/signal.h signal_types.h"


def make(folder: Path) -> None:
    """Fill `folder` so that BCC_KERNEL_SOURCE may name it."""
    bcc_headers.write(folder)
    include = folder / "include" / "linux"
    for name in _OTHERS.split():
        (include / name).parent.mkdir(exist_ok=True)
        (include / name).write_text("", encoding="ascii")
    (include / "sched.h").write_text(_structs(), encoding="ascii")


def _structs() -> str:
    text = _KERNEL_H.read_text(encoding="ascii").replace("AS_IN_KERNEL", "")
    text = text[text.index("typedef") : text.rindex("#endif")]
    with KernelBtf() as btf:
        return re.sub(r"struct (\w+) \{\n(.*?)\} ;", lambda match: _placed(btf, match[1], match[2]), text, flags=re.DOTALL)


def _placed(btf: KernelBtf, struct: str, body: str) -> str:
    """The struct with padding, so that each member that the kernel's has lies where it does there."""
    members = []
    for line in body.splitlines():
        declaration = line.split("/*", maxsplit=1)[0].strip()
        match = re.search(r"(\w+)(\[\d*\])?;$", declaration)
        offset = btf.offset(struct, match[1]) if match else None
        if offset is not None:
            members.append((offset, declaration))
    if not members:
        return f"struct {struct} {{\n{body}}};"
    # A union's members may lie anywhere, and overlap: no sizes need be known.
    places = "\n".join(
        f"struct {{ char at_{offset}[{offset}]; {declaration} }} __attribute__((packed));" for offset, declaration in members
    )
    return f"struct {struct} {{ union {{\n{places}\n}}; }};"
