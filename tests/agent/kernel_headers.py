# SPDX-License-Identifier: Apache-2.0
"""Headers of the running kernel, as far as the probe reads its structs: made from its BTF, with each field where it is.

They stand in for a distribution's linux-headers package, which is there for its own kernels only.
"""

from __future__ import annotations

import re
from pathlib import Path

from kmonitor.agent.kernel_btf import KernelBtf

_KERNEL_H = Path(__file__).resolve().parents[2] / "bpf" / "kernel.h"
_TYPES = """
#ifndef TYPES
#define TYPES
typedef unsigned char __u8, u8;
typedef unsigned short __u16, u16, __be16, __sum16;
typedef unsigned int __u32, u32, __be32, __wsum;
typedef unsigned long long __u64, u64, __be64;
typedef signed char __s8, s8;
typedef signed short __s16, s16;
typedef signed int __s32, s32;
typedef signed long long __s64, s64;
typedef __SIZE_TYPE__ size_t;
typedef __UINTPTR_TYPE__ uintptr_t;
#define __aligned_u64 __u64 __attribute__((aligned(8)))
#define __always_inline inline __attribute__((always_inline))
#endif
"""
_VERSION = """
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE KERNEL_VERSION(5, 15, 0)
"""
_OTHERS = """bpf_common.h binfmts.h cgroup-defs.h cred.h kernfs.h log2.h mm_types.h pid.h pid_namespace.h sched/signal.h signal_types.h"""


def make(folder: Path) -> None:
    """Fill `folder` so that BCC_KERNEL_SOURCE may name it."""
    include = folder / "include"
    for name in ("uapi/linux/bpf.h", "uapi/linux/if_packet.h", "asm/page.h", *(f"linux/{name}" for name in _OTHERS.split())):
        (include / name).parent.mkdir(parents=True, exist_ok=True)
        (include / name).write_text("", encoding="ascii")
    (include / "linux/types.h").write_text(_TYPES, encoding="ascii")
    (include / "linux/version.h").write_text(_VERSION, encoding="ascii")
    (include / "linux/kconfig.h").write_text("#include <linux/types.h>\n#define CONFIG_BPF_SYSCALL 1\n", encoding="ascii")
    (include / "linux/sched.h").write_text(_structs(), encoding="ascii")


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
