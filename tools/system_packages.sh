#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Install the system packages that are missing, and only those.
#
#   system_packages.sh run     what building and running takes
#   system_packages.sh test    that, and what the tests take
#   system_packages.sh bench   what running takes, and the peers that are measured beside
#
# PYTHON names the interpreter that .venv is made with. Each package is looked for by what it is needed for, not by its name,
# so that a clang or a node from elsewhere is as good.
set -eu

python=${PYTHON:-python3}
purpose=${1:-run}

die() {
    echo "kmonitor: $*" >&2
    exit 1
}

command -v "$python" >/dev/null 2>&1 || die "no $python on this machine: install Python 3.11 or newer, or name one with PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$("$python" --version) is too old: Python 3.11 or newer is needed, name one with PYTHON=..."

# Print the packages whose purpose is not served.
missing() {
    command -v clang >/dev/null 2>&1 || echo clang
    [ -e /usr/include/bpf/bpf_helpers.h ] || [ -e /usr/local/include/bpf/bpf_helpers.h ] || echo libbpf-dev
    "$python" -c 'import ctypes; ctypes.CDLL("libbpf.so.1")' 2>/dev/null || echo libbpf1
    "$python" -c 'import ensurepip, venv' 2>/dev/null || "$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'
    if [ "$purpose" = bench ]; then
        command -v cc >/dev/null 2>&1 || echo gcc
        [ -e /usr/include/stdio.h ] || echo libc6-dev
        /usr/bin/python3 -c 'from bcc import BPF' 2>/dev/null || echo python3-bpfcc
        for peer in forkstat bpftrace nats-server; do
            PATH=$PATH:/usr/sbin:/sbin command -v "$peer" >/dev/null 2>&1 || echo "$peer"
        done
    fi
    [ "$purpose" = test ] || return 0
    # The tests compile small programs, make network namespaces with keepalived in them, and talk to the broker from another language.
    command -v cc >/dev/null 2>&1 || echo gcc
    [ -e /usr/include/stdio.h ] || echo libc6-dev
    PATH=$PATH:/usr/sbin:/sbin command -v ip >/dev/null 2>&1 || echo iproute2
    PATH=$PATH:/usr/sbin:/sbin command -v keepalived >/dev/null 2>&1 || echo keepalived
    command -v node >/dev/null 2>&1 || echo nodejs
    command -v npm >/dev/null 2>&1 || echo npm
    # bcc is a distribution's package, for the distribution's interpreter.
    /usr/bin/python3 -c 'from bcc import BPF' 2>/dev/null || echo python3-bpfcc
}

packages=$(missing | tr '\n' ' ')
packages=${packages% }
[ -n "$packages" ] || exit 0
manual="install them with: sudo apt-get install $packages"

command -v apt-get >/dev/null 2>&1 ||
    die "missing (by their Debian names): $packages; this system has no apt-get, so install them its own way"
if [ "$(id -u)" = 0 ]; then
    as_root="env"
elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
    as_root="sudo -n env"
else
    die "missing system packages: $packages; $manual"
fi

mkdir -p build
log=build/system-packages.log
install() {
    # shellcheck disable=SC2086 # both are lists of words
    $as_root DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 install -qq -y --no-install-recommends $packages </dev/null >>"$log" 2>&1
}
echo "Installing system packages: $packages"
: >"$log"
# A fresh machine has no package lists, or old ones: fetch them only if it does not work without.
if ! install; then
    $as_root apt-get -o DPkg::Lock::Timeout=120 update -qq </dev/null >>"$log" 2>&1 || true
    install || {
        tail -n 15 "$log" >&2
        die "apt-get could not install: $packages (its output is in $log); $manual"
    }
fi
packages=$(missing | tr '\n' ' ')
[ -z "$packages" ] || die "still missing after the installation: $packages(apt-get's output is in $log)"
