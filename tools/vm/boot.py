# SPDX-License-Identifier: Apache-2.0
"""Run a script of this folder on the stock kernels of Debian, each in a virtual machine of its own.

    python3 -m tools.vm.boot load 5.10 6.1 6.12 7.3
    python3 -m tools.vm.boot miss 7.3

Kernels are downloaded, not installed: from wherever this machine's own apt has its packages, with an apt configuration of their own. The
guest has no disk and no network. Its root is this machine's, read-only, with a layer in the guest's memory on top: so the checkout, its
.venv, libbpf and bcc are there as they are here. It takes no KVM, and is 10 to 30 times slower than the machine. Needs root: to read all
that is to be shared.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
BUILD = CHECKOUT / "build" / "vm"
SUITES = ("bullseye", "bookworm", "trixie", "trixie-backports")
KERNELS = ("5.10", "6.1", "6.12", "7.3")
MODULES = ("virtio_pci", "9p", "9pnet_virtio", "overlay")
"""That it takes to mount the root."""
TOOLS = {"qemu-system-x86_64": "qemu-system-x86", "busybox": "busybox-static", "cpio": "cpio", "zstd": "zstd", "dpkg": "dpkg"}
LIMIT_S = 3000.0
"""For a guest, from its boot to its end; one that hangs is stopped."""
_DONE = re.compile(r"kmonitor-vm: status (\d+)")


def main() -> int:
    """0 if the script ended well on every kernel."""
    parser = argparse.ArgumentParser(prog="python3 -m tools.vm.boot", description="Run a script on the stock kernels of Debian.")
    parser.add_argument("script", choices=sorted(path.stem.removeprefix("guest_") for path in HERE.glob("guest_*.py")))
    parser.add_argument("kernels", nargs="*", default=KERNELS, metavar="KERNEL", help="such as 6.1 or 7.3.4")
    parser.add_argument("--arguments", default="", help="for the script")
    given = parser.parse_args()
    lacking = {package for tool, package in TOOLS.items() if shutil.which(tool) is None}
    if lacking:
        print(f"missing: apt-get install {' '.join(sorted(lacking))}", file=sys.stderr)
        return 2
    script = f"guest_{given.script}"
    statuses = {}
    for version in given.kernels:
        folder = fetch(version)
        began = time.monotonic()
        statuses[version] = boot(folder, script, given.arguments)
        print(f"== {version}: {verdict(statuses[version])}, {time.monotonic() - began:.0f} s", flush=True)
    for version, status in statuses.items():
        print(f"{version:8} {script} {verdict(status)}")
    return 0 if not any(statuses.values()) else 1


def verdict(status: int | None) -> str:
    """In a word."""
    return "ok" if status == 0 else "did not come to an end" if status is None else f"failed ({status})"


def apt(*arguments: str, cwd: Path | None = None) -> str:
    """Run one of apt's commands on lists of our own: what it prints."""
    folder = BUILD / "apt"
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    sources = folder / "sources.list"
    if not sources.exists():
        found = subprocess.run(
            ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"], capture_output=True, text=True, check=True
        )
        # Where the kernel of a release is, all of them are: its security updates are another tree.
        archives = [uri for uri in dict.fromkeys(found.stdout.split()) if uri.rstrip("/").endswith("/debian")]
        if not archives:
            raise SystemExit("apt's sources on this machine name no archive of Debian")
        sources.write_text("".join(f"deb {archives[0]} {suite} main\n" for suite in SUITES))
    options = {
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::Lists": folder / "lists",
        "Dir::Cache": folder / "cache",
        "APT::Sandbox::User": "root",
        "APT::Update::Post-Invoke-Success::": "",
        "Acquire::Languages": "none",
    }
    command, *others = arguments
    flags = [flag for name, value in options.items() for flag in ("-o", f"{name}={value}")]
    done = subprocess.run([command, *flags, *others], cwd=cwd, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def fetch(version: str) -> Path:
    """The folder with the newest kernel of a version: image, modules, and an initrd for them; made if it is not there."""
    folder = BUILD / "kernels" / version
    if (folder / "initrd").exists():
        if (folder / "initrd").stat().st_mtime < (HERE / "init").stat().st_mtime:
            make(folder)
        return folder
    print(f"== {version}: downloading", flush=True)
    apt("apt-get", "update", "-q")  # each time: an archive drops what lists that are older name
    packages = packages_of(version, apt("apt-cache", "pkgnames", "linux-").split())
    if not packages:
        raise SystemExit(f"no kernel {version} in {', '.join(SUITES)}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as name_of_work:
        work = Path(name_of_work)
        for package in packages:
            apt("apt-get", "download", "-q", package, cwd=work)
        for archive in work.glob("*.deb"):
            subprocess.run(["dpkg", "-x", archive, work / "kernel"], check=True)
        make(work / "kernel")
        shutil.rmtree(folder, ignore_errors=True)
        (work / "kernel").rename(folder)
    return folder


def packages_of(version: str, names: Iterable[str]) -> list[str]:
    """Of all packages those of the newest kernel of a version."""
    name = re.compile(rf"linux-(?:image|binary|modules)-({re.escape(version)}(?:\.\d+)*(?:-\d+)?(?:\+deb\d+)?)-amd64")
    found: dict[str, list[str]] = {}
    for each in names:
        if match := name.fullmatch(each):
            found.setdefault(match[1], []).append(each)
    newest = max(found, key=lambda text: [int(number) for number in re.findall(r"\d+", text)], default="")
    return sorted(found.get(newest, []))


def make(folder: Path) -> None:
    """The kernel's image and an initrd, from unpacked packages."""
    image = next(path for pattern in ("boot/vmlinuz-*", "usr/lib/modules/*/vmlinuz") for path in sorted(folder.glob(pattern)))
    there = {_name(path): path for path in folder.rglob("*.ko*")}
    if not there:
        raise SystemExit(f"the archive has {image.name} without its modules: name another version, such as 6.1.0 or 7.3.4")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for each in ("bin", "dev", "proc", "sys", "modules", "host", "memory", "root"):
            (root / each).mkdir()
        shutil.copy(shutil.which("busybox") or "", root / "bin" / "busybox")
        (root / "bin" / "sh").symlink_to("busybox")
        shutil.copy(HERE / "init", root / "init")
        (root / "init").chmod(0o755)
        for number, module in enumerate(in_order(there)):
            (root / "modules" / f"{number:02}-{module}.ko").write_bytes(_unpacked(there[module]))
        listing = subprocess.run(["find", "."], cwd=root, capture_output=True, check=True).stdout
        archive = subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=root, input=listing, capture_output=True, check=True).stdout
    (folder / "initrd").write_bytes(gzip.compress(archive, 1))
    shutil.copy(image, folder / "vmlinuz")


def in_order(there: dict[str, Path]) -> list[str]:
    """The modules that the guest needs, each after those that it depends on. What is not there is built in."""
    order: list[str] = []

    def add(module: str) -> None:
        if module in there and module not in order:
            depends = re.search(rb"\0depends=([^\0]*)\0", _unpacked(there[module]))
            for each in depends[1].decode().split(",") if depends else ():
                add(each)
            order.append(module)

    for module in MODULES:
        add(module)
    return order


def _name(path: Path) -> str:
    return path.name.split(".ko")[0].replace("-", "_")


def _unpacked(path: Path) -> bytes:
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dc", path], capture_output=True, check=True).stdout
    return path.read_bytes()


def boot(folder: Path, script: str, arguments: str) -> int | None:
    """Run the script on this kernel, and print what it prints: its status; None if it came to no end."""
    # no_timer_check: an emulated clock that is held up is taken for a broken one ("8254 timer not connected to IO-APIC").
    words = f"console=ttyS0 quiet loglevel=4 panic=-1 no_timer_check kmonitor.checkout={CHECKOUT} kmonitor.script={script}"
    command: list[str | Path] = [
        "nice", "-n", "10", "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "2048",
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio", "-nic", "none",
        "-kernel", folder / "vmlinuz", "-initrd", folder / "initrd", "-append", f"{words} -- {arguments}",
        "-virtfs", "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap",
    ]  # fmt: skip
    status = None
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as guest:
        assert guest.stdout is not None
        stop = threading.Timer(LIMIT_S, guest.kill)  # one that hangs says nothing
        stop.start()
        try:
            for line in guest.stdout:
                text = line.decode(errors="replace").rstrip()
                if match := _DONE.search(text):
                    status = int(match[1])
                elif text:
                    print("  ", "".join(char if char.isprintable() else "?" for char in text), flush=True)
        finally:
            stop.cancel()
            guest.kill()
    return status


if __name__ == "__main__":
    raise SystemExit(main())
