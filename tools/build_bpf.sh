#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Compile bpf/kmonitor.bpf.c to agent/kmonitor/agent/kmonitor.bpf.o, unless that is newer than all it is made of; and put the source
# beside it, which source "bcc" compiles on the node.
# Called by the Makefile and by the build hook of the Python package (tools/hatch_build.py).
set -eu
cd "$(dirname "$0")/.."

source=bpf/kmonitor.bpf.c
object=agent/kmonitor/agent/kmonitor.bpf.o

die() {
    echo "kmonitor: $*" >&2
    exit 1
}

[ -e "$source" ] || die "$source is not here: build from a complete checkout"
copies=agent/kmonitor/agent/bpf
if [ -e "$object" ] && [ -d "$copies" ] && [ -z "$(find bpf -name '*.[ch]' -newer "$object")" ]; then
    exit 0
fi

clang=${CLANG:-clang}
command -v "$clang" >/dev/null 2>&1 || die "$clang is missing, and it compiles the BPF program: sudo apt-get install clang libbpf-dev"
[ -e /usr/include/bpf/bpf_helpers.h ] || [ -e /usr/local/include/bpf/bpf_helpers.h ] ||
    die "bpf/bpf_helpers.h is missing, and the BPF program includes it: sudo apt-get install libbpf-dev"

# Debian keeps asm/types.h in a folder by architecture, in which clang does not look when the target is bpf.
multiarch=$(cc -print-multiarch 2>/dev/null || "$clang" -print-multiarch 2>/dev/null || true)

made=$object.$$
trap 'rm -f "$made"' EXIT
# -g: BTF, without which there is no CO-RE. -mcpu=v3: 32-bit jumps. Of its atomics only an addition whose result nobody wants is used: the others are
# newer than the oldest kernel that the probe is for, 5.10.
# A probe takes the arguments its tracepoint has, needed or not. The prefix map keeps this machine's folders out of the object.
"$clang" -g -O2 -Wall -Wextra -Wno-unused-parameter -target bpf -mcpu=v3 -ffile-prefix-map="$PWD"=. -I bpf ${multiarch:+-isystem "/usr/include/$multiarch"} \
    -c "$source" -o "$made" || die "$source does not compile"
# What stays is BTF; DWARF is ten times its size and nobody reads it. Optional, as llvm-strip is a package of its own.
if command -v llvm-strip >/dev/null 2>&1; then
    llvm-strip -g "$made"
fi
chmod 0644 "$made"
mv "$made" "$object"
rm -rf "$copies"
mkdir "$copies"
cp bpf/*.c bpf/*.h "$copies"
