# SPDX-License-Identifier: Apache-2.0
"""The signal of 2004: a queued real-time signal for each event, for programs that know no gRPC.

The receiver's siginfo_t says: si_code SI_QUEUE, si_pid the process that the event is about, si_uid its real user id, and
si_value.sival_int the event's bit. The kernel passes si_pid through as given, as long as si_code is negative
(rt_sigqueueinfo(2)); it refuses codes from 0 up, which are its own.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import signal

from kmonitor.wire.errors import NotAuthorisedError, UsageError

SI_QUEUE = -1
_SYSCALL = {"x86_64": 129, "aarch64": 138}  # rt_sigqueueinfo: arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h
_NAME = re.compile(r"(?:SIG)?RT(MIN|MAX)([+-]\d+)?", re.IGNORECASE)


class SigInfo(ctypes.Structure):
    """siginfo_t of 64-bit Linux, as far as the _rt member goes: 128 bytes (include/uapi/asm-generic/siginfo.h)."""

    _fields_ = (
        ("si_signo", ctypes.c_int),
        ("si_errno", ctypes.c_int),
        ("si_code", ctypes.c_int),
        ("_align", ctypes.c_int),
        ("si_pid", ctypes.c_int),
        ("si_uid", ctypes.c_uint),
        ("si_value", ctypes.c_uint64),  # a union of int and pointer: the int is its low half on both machines
        ("_rest", ctypes.c_byte * 96),
    )


def parse_signal(text: str) -> int:
    """The number of "SIGRTMIN", "SIGRTMIN+3", "RTMAX-1" or "34". Raises UsageError unless it is a real-time signal."""
    low, high = int(signal.SIGRTMIN), int(signal.SIGRTMAX)
    match = _NAME.fullmatch(text.strip())
    if match is not None:
        number = (low if match[1].upper() == "MIN" else high) + int(match[2] or 0)
    elif text.strip().isdecimal():
        number = int(text)
    else:
        raise UsageError(f"{text!r} is no real-time signal: write SIGRTMIN, SIGRTMIN+3, SIGRTMAX-1, or a number from {low} to {high}")
    if not low <= number <= high:
        raise UsageError(f"signal {text} is {number}, and real-time signals are {low} to {high}: others are not queued, and would be lost")
    return number


class Notifier:
    """Sends the signals to one local process. `lost` counts those that the receiver's full queue did not take."""

    def __init__(self, pid: int, number: int) -> None:
        machine = platform.machine()
        if machine not in _SYSCALL:
            raise UsageError(f"--notify knows x86_64 and aarch64, not {machine}")
        self.pid = pid
        self.number = number
        self.lost = 0
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._syscall.restype = ctypes.c_long
        self._code = ctypes.c_long(_SYSCALL[machine])
        self._info = SigInfo(si_signo=number, si_code=SI_QUEUE)
        self.check()

    def check(self) -> None:
        """Raise the typed error if the process cannot be signalled."""
        try:
            os.kill(self.pid, 0)
        except OSError as error:
            raise self._error(error.errno or errno.ESRCH) from None

    def send(self, bit: int, pid: int, uid: int) -> bool:
        """Queue one signal. False if the receiver's queue is full (RLIMIT_SIGPENDING). Raises UsageError if it is gone."""
        info = self._info
        info.si_pid, info.si_uid, info.si_value = pid, uid, bit
        if self._syscall(self._code, ctypes.c_long(self.pid), ctypes.c_long(self.number), ctypes.byref(info)) == 0:
            return True
        code = ctypes.get_errno()
        if code == errno.EAGAIN:
            self.lost += 1
            return False
        raise self._error(code)

    def _error(self, code: int) -> NotAuthorisedError | UsageError:
        if code == errno.ESRCH:
            return UsageError(f"the process to notify, {self.pid}, is gone")
        if code == errno.EPERM:
            return NotAuthorisedError(f"not allowed to signal process {self.pid}: run as its user, or as root")
        return UsageError(f"cannot signal process {self.pid}: {os.strerror(code)}")
