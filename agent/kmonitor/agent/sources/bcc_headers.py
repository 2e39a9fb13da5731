# SPDX-License-Identifier: Apache-2.0
"""What bcc's own prelude takes from the kernel's headers, for a node that has none: some types, and a version.

bcc's programs may use all of the kernel's headers; the probe does not, where the kernel's BTF says where fields lie.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path

_TYPES = """
#ifndef KMONITOR_TYPES
#define KMONITOR_TYPES
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
_EMPTY = ("uapi/linux/bpf.h", "uapi/linux/if_packet.h", "linux/bpf_common.h", "linux/log2.h", "asm/page.h")


def write(folder: Path) -> None:
    """Fill `folder` so that BCC_KERNEL_SOURCE may name it."""
    numbers = [*re.findall(r"\d+", platform.release())[:3], "0", "0"][:3]
    files = dict.fromkeys(_EMPTY, "")
    files["linux/types.h"] = _TYPES
    files["linux/kconfig.h"] = "#include <linux/types.h>\n#define CONFIG_BPF_SYSCALL 1\n"
    files["linux/version.h"] = f"""
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + ((c) > 255 ? 255 : (c)))
#define LINUX_VERSION_CODE KERNEL_VERSION({", ".join(numbers)})
"""
    for name, text in files.items():
        file = folder / "include" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="ascii")
