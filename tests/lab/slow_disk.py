# SPDX-License-Identifier: Apache-2.0
"""A disk that can be made to hang: a file system on a loop device, on a file that a process of ours serves through FUSE.

While that process is stopped no block is read or written: who touches what is not in memory waits. Run as a program it is the server.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MEBIBYTE = 1 << 20
_LIMIT_S = 30.0
_IMAGE = b"disk"
_ROOT, _FILE = 1, 2

# include/uapi/linux/fuse.h
_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _WRITE, _STATFS, _RELEASE, _FSYNC, _FLUSH = 1, 2, 3, 14, 15, 16, 17, 18, 20, 25
_INIT, _BATCH_FORGET = 26, 42
_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_WRITE_MOST = 128 << 10


class SlowDisk:
    """Mounted at `folder`."""

    def __init__(self, folder: Path, server: subprocess.Popen[bytes]) -> None:
        self.folder = folder
        self._server = server

    @contextlib.contextmanager
    def hangs(self) -> Iterator[None]:
        """Within, it does not answer."""
        self._server.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._server.send_signal(signal.SIGCONT)

    def forget(self) -> None:
        """Nothing of it is in memory any more: what is read next is read from it. No file on it may be open."""
        subprocess.run(["umount", self.folder], check=True)
        _mount(self.folder)


@contextlib.contextmanager
def slow_disk(parent: Path, megabytes: int = 128) -> Iterator[SlowDisk]:
    """As root."""
    served, folder = parent / "served", parent / "disk"
    served.mkdir()
    folder.mkdir()
    server = subprocess.Popen([sys.executable, __file__, served, str(megabytes << 20)], stdout=subprocess.PIPE)
    device = ""
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == b"serves\n"
        found = subprocess.run(["losetup", "--find", "--show", served / "disk"], check=True, capture_output=True, timeout=_LIMIT_S)
        device = found.stdout.decode().strip()
        subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,nodiscard", device], check=True, timeout=_LIMIT_S)
        (parent / "device").write_text(device, encoding="ascii")
        _mount(folder)
        yield SlowDisk(folder, server)
    finally:
        server.send_signal(signal.SIGCONT)
        subprocess.run(["umount", folder], check=False, timeout=_LIMIT_S)
        if device:
            subprocess.run(["losetup", "--detach", device], check=False, timeout=_LIMIT_S)
        subprocess.run(["umount", "-l", served], check=False, timeout=_LIMIT_S)
        server.kill()
        server.wait()
        server.__exit__(None, None, None)


def _mount(folder: Path) -> None:
    device = (folder.parent / "device").read_text(encoding="ascii")
    until = time.monotonic() + _LIMIT_S
    while subprocess.run(["mount", "-o", "noatime", device, folder], check=False).returncode and time.monotonic() < until:
        time.sleep(0.1)  # what was just unmounted is still held for a moment


def _serve(folder: str, size: int) -> None:
    """One file of this size, in memory, until the kernel says that it is over."""
    image = bytearray(size)
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,max_read={_WRITE_MOST}"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"kmonitor-test", os.fsencode(folder), b"fuse", 6, options.encode()):  # MS_NOSUID | MS_NODEV
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    sys.stdout.write("serves\n")
    sys.stdout.flush()
    while True:
        try:
            message = os.read(fuse, _WRITE_MOST + 4096)
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.EINTR, errno.EAGAIN}:
                continue
            return
        _, opcode, unique, node, *_ = _IN.unpack_from(message)
        if opcode in {_FORGET, _BATCH_FORGET}:
            continue
        failure, answer = _answer(image, opcode, node, memoryview(message)[_IN.size :])
        with contextlib.suppress(OSError):
            os.write(fuse, _OUT.pack(_OUT.size + len(answer), -failure, unique) + answer)


def _answer(image: bytearray, opcode: int, node: int, body: memoryview) -> tuple[int, bytes]:
    if opcode == _INIT:
        _, _, readahead, _ = struct.unpack_from("<IIII", body)
        return 0, struct.pack("<IIIIHHIIHH32x", 7, 31, readahead, 0, 16, 12, _WRITE_MOST, 1, 0, 0)
    if opcode == _LOOKUP:
        if bytes(body).rstrip(b"\0") != _IMAGE:
            return errno.ENOENT, b""
        return 0, struct.pack("<QQQQII", _FILE, 0, 3600, 3600, 0, 0) + _attributes(_FILE, len(image))
    if opcode == _GETATTR:
        return 0, struct.pack("<QII", 3600, 0, 0) + _attributes(node, len(image))
    if opcode == _OPEN:
        return 0, struct.pack("<QII", 1, 0, 0)
    if opcode in {_READ, _WRITE}:
        _, offset, size = struct.unpack_from("<QQI", body)
        if opcode == _READ:
            return 0, bytes(image[offset : offset + size])
        image[offset : offset + size] = body[40 : 40 + size]
        return 0, struct.pack("<II", size, 0)
    if opcode == _STATFS:
        return 0, struct.pack("<QQQQQIIII24x", len(image) // 4096, 0, 0, 2, 0, 4096, 255, 4096, 0)
    return (0, b"") if opcode in {_RELEASE, _FSYNC, _FLUSH} else (errno.ENOSYS, b"")


def _attributes(node: int, size: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if node == _ROOT else stat.S_IFREG | 0o600
    size = 0 if node == _ROOT else size
    return _ATTR.pack(node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
