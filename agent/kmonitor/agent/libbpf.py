# SPDX-License-Identifier: Apache-2.0
"""A thin binding to the system's libbpf (1.0 or later): what it takes to load, attach, pin and read the probe.

Only calls and errors: nothing here knows what the probe does. libbpf's own log is kept and goes into the error.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno as errnos
import os
from collections.abc import Iterator
from ctypes import POINTER, c_bool, c_char, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from kmonitor.agent.capabilities import refusal
from kmonitor.agent.errors import BpfError, CaptureError, MissingCapabilityError, PinError

BPF_ANY = 0
BPF_NOEXIST = 1
BPF_EXIST = 2
_BPF_MAP_TYPE_ARRAY = 2
_BPF_TRACE_ITER = 28
_LOG_LIMIT = 64 * 1024


class _OpenOptions(ctypes.Structure):
    """The beginning of struct bpf_object_open_opts."""

    _fields_ = (
        ("sz", c_size_t),
        ("object_name", c_char_p),
        ("relaxed_maps", c_bool),
        ("pin_root_path", c_char_p),
        ("reserved", c_uint32),
        ("kconfig", c_char_p),
        ("btf_custom_path", c_char_p),
    )


class _IterTask(ctypes.Structure):
    """The member `task` of union bpf_iter_link_info (kernel 6.1 and later)."""

    _fields_ = (("tid", c_uint32), ("pid", c_uint32), ("pid_fd", c_uint32))


class _LinkCreateOptions(ctypes.Structure):
    _fields_ = (
        ("sz", c_size_t),
        ("flags", c_uint32),
        ("iter_info", c_void_p),
        ("iter_info_len", c_uint32),
        ("target_btf_id", c_uint32),
    )


class _TestRunOptions(ctypes.Structure):
    """struct bpf_test_run_opts."""

    _fields_ = (
        ("sz", c_size_t),
        ("data_in", c_void_p),
        ("data_out", c_void_p),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("ctx_in", c_char_p),
        ("ctx_out", c_void_p),
        ("ctx_size_in", c_uint32),
        ("ctx_size_out", c_uint32),
        ("retval", c_uint32),
        ("repeat", c_int),
        ("duration", c_uint32),
        ("flags", c_uint32),
        ("cpu", c_uint32),
        ("batch_size", c_uint32),
    )


class _ProgramInfo(ctypes.Structure):
    """The beginning of struct bpf_prog_info, as far as what is wanted of it (kernel 5.12 and later)."""

    _fields_ = (("others", c_char * 208), ("recursion_misses", c_uint64))


_PRINT = ctypes.CFUNCTYPE(c_int, c_int, c_char_p, c_void_p)

# name: (result, arguments), as in bpf/libbpf.h, bpf/bpf.h and bpf/btf.h.
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "libbpf_set_print": (c_void_p, (_PRINT,)),
    "libbpf_version_string": (c_char_p, ()),
    "bpf_object__open_mem": (c_void_p, (c_char_p, c_size_t, POINTER(_OpenOptions))),
    "bpf_object__load": (c_int, (c_void_p,)),
    "bpf_object__close": (None, (c_void_p,)),
    "bpf_object__find_map_by_name": (c_void_p, (c_void_p, c_char_p)),
    "bpf_object__find_program_by_name": (c_void_p, (c_void_p, c_char_p)),
    "bpf_map__fd": (c_int, (c_void_p,)),
    "bpf_map__set_max_entries": (c_int, (c_void_p, c_uint32)),
    "bpf_map__initial_value": (c_void_p, (c_void_p, POINTER(c_size_t))),
    "bpf_program__fd": (c_int, (c_void_p,)),
    "bpf_program__attach": (c_void_p, (c_void_p,)),
    "bpf_program__set_autoload": (c_int, (c_void_p, c_bool)),
    "bpf_link__fd": (c_int, (c_void_p,)),
    "bpf_link__destroy": (c_int, (c_void_p,)),
    "bpf_map_create": (c_int, (c_uint32, c_char_p, c_uint32, c_uint32, c_uint32, c_void_p)),
    "bpf_obj_get": (c_int, (c_char_p,)),
    "bpf_obj_pin": (c_int, (c_int, c_char_p)),
    "bpf_map_lookup_elem": (c_int, (c_int, c_void_p, c_void_p)),
    "bpf_map_update_elem": (c_int, (c_int, c_void_p, c_void_p, c_uint64)),
    "bpf_map_delete_elem": (c_int, (c_int, c_void_p)),
    "bpf_map_get_next_key": (c_int, (c_int, c_void_p, c_void_p)),
    "bpf_link_create": (c_int, (c_int, c_int, c_int, POINTER(_LinkCreateOptions))),
    "bpf_iter_create": (c_int, (c_int,)),
    "bpf_obj_get_info_by_fd": (c_int, (c_int, c_void_p, POINTER(c_uint32))),
    "bpf_prog_test_run_opts": (c_int, (c_int, POINTER(_TestRunOptions))),
    "btf__load_vmlinux_btf": (c_void_p, ()),
    "btf__free": (None, (c_void_p,)),
    "btf__find_by_name_kind": (c_int, (c_void_p, c_char_p, c_uint32)),
    "btf__type_by_id": (POINTER(c_uint32), (c_void_p, c_uint32)),
    "btf__name_by_offset": (c_char_p, (c_void_p, c_uint32)),
}


class _Library:
    """libbpf.so.1, loaded at the first use."""

    def __init__(self) -> None:
        self._calls: Any = None
        self._log = bytearray()
        self._print: Any = None

    def __getattr__(self, name: str) -> Any:
        if self._calls is None:
            self._calls = self._load()
        return getattr(self._calls, name)

    def _load(self) -> ctypes.CDLL:
        try:
            library = ctypes.CDLL("libbpf.so.1", use_errno=True)
        except OSError:
            raise CaptureError("libbpf.so.1 is not installed: install the package libbpf1 (Debian, Ubuntu) or libbpf (others)") from None
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype = result
            function.argtypes = arguments
        vsnprintf = ctypes.CDLL(None).vsnprintf
        vsnprintf.argtypes = (POINTER(c_char), c_size_t, c_char_p, c_void_p)
        line = ctypes.create_string_buffer(_LOG_LIMIT)

        def keep(level: int, form: bytes, arguments: int) -> int:
            # 2 is debug: far too much. A va_list reaches a callback as a pointer on the ABIs of x86-64 and aarch64.
            if level < 2:
                vsnprintf(line, _LOG_LIMIT, form, arguments)
                self._log += line.value
                del self._log[:-_LOG_LIMIT]
            return 0

        self._print = _PRINT(keep)
        library.libbpf_set_print(self._print)
        return library

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Keep no log. To load an object libbpf says hundreds of lines, each for Python's lock, which another thread may hold for 5 ms."""
        self.libbpf_set_print(_PRINT())
        try:
            yield
        finally:
            self.libbpf_set_print(self._print)

    def take_log(self) -> str:
        """What libbpf said since the last call."""
        text = self._log.decode(errors="replace")
        self._log.clear()
        return text


library = _Library()


def version() -> str:
    """Of the installed libbpf, such as "v1.1". Raises CaptureError if there is none."""
    return str(library.libbpf_version_string().decode())


def _fail(what: str, errno: int | None = None) -> BpfError | MissingCapabilityError:
    number = ctypes.get_errno() if errno is None else abs(errno)
    log = library.take_log()
    if number in (errnos.EPERM, errnos.EACCES) and "prog" not in log.lower():
        return refusal(f"{what}: the kernel refuses it", "CAP_BPF", "CAP_PERFMON")
    return BpfError(f"{what}: {os.strerror(number)}", number, log)


class Map:
    """A map by its file descriptor, which it owns. Keys and values are bytes."""

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = name

    def lookup(self, key: bytes, value_size: int) -> bytes | None:
        """The value, or None."""
        value = ctypes.create_string_buffer(value_size)
        if library.bpf_map_lookup_elem(self.fd, key, value) == 0:
            return value.raw
        if ctypes.get_errno() == errnos.ENOENT:
            return None
        raise _fail(f"cannot read map {self.name}")

    def update(self, key: bytes, value: bytes, flags: int = BPF_ANY) -> bool:
        """False if BPF_EXIST or BPF_NOEXIST stood against it. Raises BpfError: E2BIG is a full map."""
        if library.bpf_map_update_elem(self.fd, key, value, flags) == 0:
            return True
        if ctypes.get_errno() in (errnos.ENOENT, errnos.EEXIST):
            return False
        raise _fail(f"cannot write map {self.name}")

    def delete(self, key: bytes) -> bool:
        """False if there was no such entry."""
        if library.bpf_map_delete_elem(self.fd, key) == 0:
            return True
        if ctypes.get_errno() == errnos.ENOENT:
            return False
        raise _fail(f"cannot delete from map {self.name}")

    def keys(self, key_size: int) -> Iterator[bytes]:
        """All keys; one that comes or goes meanwhile may be in it or not."""
        key: bytes | None = None
        following = ctypes.create_string_buffer(key_size)
        while library.bpf_map_get_next_key(self.fd, key, following) == 0:
            key = following.raw
            yield key

    def close(self) -> None:
        """Give the descriptor back."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def make_array(name: str, value: bytes) -> Map:
    """Make a map of one value, at key 0. Raises MissingCapabilityError, BpfError."""
    fd = library.bpf_map_create(_BPF_MAP_TYPE_ARRAY, name.encode(), 4, len(value), 1, None)
    if fd < 0:
        raise _fail(f"cannot make map {name}")
    made = Map(fd, name)
    try:
        made.update(bytes(4), value)
    except BaseException:
        made.close()
        raise
    return made


def open_pinned(path: Path) -> int:
    """A descriptor of a pinned map, program or link; the caller owns it. Raises PinError if it is another user's."""
    fd: int = library.bpf_obj_get(os.fsencode(path))
    if fd < 0:
        if ctypes.get_errno() == errnos.EACCES:  # file permissions: for lack of a capability it is EPERM
            raise PinError(
                f"the pin {path} belongs to another user: run the agent as that one, or remove the pins with --unpin as that one"
            )
        raise _fail(f"cannot open the pin {path}")
    return fd


def pin(fd: int, path: Path) -> None:
    """Keep the map, program or link alive under `path`."""
    result = library.bpf_obj_pin(fd, os.fsencode(path))
    if result:
        raise _fail(f"cannot pin {path}", result)


class Object:
    """An object file: opened, configured, loaded, attached, in that order. `close` gives it back; what it made lives on by the
    descriptors that were given out."""

    def __init__(self, image: bytes, name: str, *, own_btf: Path | None = None) -> None:
        """With `own_btf`, any file with BTF, the running kernel's is not asked for: enough to make maps, not to load programs."""
        options = _OpenOptions(ctypes.sizeof(_OpenOptions), name.encode())
        if own_btf is not None:
            options.btf_custom_path = os.fsencode(own_btf)
        self._handle = library.bpf_object__open_mem(image, len(image), ctypes.byref(options))
        if not self._handle:
            raise _fail("cannot read the BPF object")

    def _map(self, name: str) -> int:
        handle: int | None = library.bpf_object__find_map_by_name(self._handle, name.encode())
        if not handle:
            raise BpfError(f"the BPF object has no map {name}", errnos.ENOENT)
        return handle

    def _program(self, name: str) -> int:
        handle: int | None = library.bpf_object__find_program_by_name(self._handle, name.encode())
        if not handle:
            raise BpfError(f"the BPF object has no program {name}", errnos.ENOENT)
        return handle

    def set_max_entries(self, map_name: str, entries: int) -> None:
        """Before `load`. For a ring: its size in bytes."""
        result = library.bpf_map__set_max_entries(self._map(map_name), entries)
        if result:
            raise _fail(f"cannot size map {map_name}", result)

    def set_initial(self, map_name: str, value: bytes) -> None:
        """Before `load`: the first bytes of a data section."""
        size = c_size_t()
        address = library.bpf_map__initial_value(self._map(map_name), ctypes.byref(size))
        if not address or size.value < len(value):
            raise BpfError(f"section {map_name} has {size.value} bytes, not {len(value)}: rebuild the BPF object", errnos.EINVAL)
        ctypes.memmove(address, value, len(value))

    def load(self, *, quiet: bool = False) -> None:
        """Into the kernel. Raises BpfError with the verifier's log, unless `quiet`, or MissingCapabilityError."""
        library.take_log()
        with library.quiet() if quiet else contextlib.nullcontext():
            result = library.bpf_object__load(self._handle)
        if result:
            raise _fail("cannot load the probe", result)

    def skip_program(self, program: str) -> None:
        """Before `load`: leave it out."""
        library.bpf_program__set_autoload(self._program(program), False)

    def attach(self, program: str) -> int:
        """To the hook that the program's section names. A descriptor of the link, which the caller owns; closing it detaches."""
        link = library.bpf_program__attach(self._program(program))
        if not link:
            raise _fail(f"cannot attach {program}")
        fd = os.dup(library.bpf_link__fd(link))
        library.bpf_link__destroy(link)
        return fd

    def map(self, name: str) -> Map:
        """A map of the loaded object, with a descriptor of its own."""
        return Map(os.dup(library.bpf_map__fd(self._map(name))), name)

    def program_fd(self, name: str) -> int:
        """A descriptor of a loaded program; the caller owns it."""
        return os.dup(library.bpf_program__fd(self._program(name)))

    def close(self) -> None:
        """Free the object."""
        if self._handle:
            library.bpf_object__close(self._handle)
            self._handle = None


def run_program(program_fd: int, context: bytes) -> int:
    """Run a program of a raw tracepoint once, here and now, with these words as its arguments (kernel 5.10 and later): its result.

    Raises BpfError, MissingCapabilityError.
    """
    options = _TestRunOptions(ctypes.sizeof(_TestRunOptions), ctx_in=context, ctx_size_in=len(context))
    result = library.bpf_prog_test_run_opts(program_fd, ctypes.byref(options))
    if result:
        raise _fail("cannot run a program of the probe", result)
    return int(options.retval)


def recursion_misses(program_fd: int) -> int:
    """How often the kernel has skipped a program because it was at work on the same CPU; 0 of a kernel that does not count it.

    Raises BpfError.
    """
    info = _ProgramInfo()
    size = c_uint32(ctypes.sizeof(info))
    if library.bpf_obj_get_info_by_fd(program_fd, ctypes.byref(info), ctypes.byref(size)):
        raise _fail("cannot ask after a program of the probe")
    return int(info.recursion_misses)


def read_iterator(program_fd: int, tid: int = 0) -> bytes:
    """All that an iterator over tasks prints; over one task if `tid` is given and the kernel can (6.1 and later)."""
    info = _IterTask(tid, 0, 0)
    options = _LinkCreateOptions(ctypes.sizeof(_LinkCreateOptions), 0, None, 0, 0)
    if tid:
        options.iter_info = ctypes.addressof(info)
        options.iter_info_len = ctypes.sizeof(info)
    link = library.bpf_link_create(program_fd, 0, _BPF_TRACE_ITER, ctypes.byref(options))
    if link < 0 and tid:
        return read_iterator(program_fd)
    if link < 0:
        raise _fail("cannot read the kernel's list of processes", link)
    with contextlib.closing(_Descriptor(link)):
        fd = library.bpf_iter_create(link)
        if fd < 0:
            raise _fail("cannot read the kernel's list of processes", fd)
        with contextlib.closing(_Descriptor(fd)):
            parts = []
            while part := _read_some(fd):
                parts.append(part)
            return b"".join(parts)


def _read_some(fd: int) -> bytes:
    while True:
        try:
            return os.read(fd, 1 << 18)
        except BlockingIOError:
            continue  # EAGAIN: the iterator gave up the CPU after a long stretch that printed nothing


class _Descriptor:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        os.close(self._fd)


__all__ = [
    "BPF_ANY",
    "BPF_EXIST",
    "BPF_NOEXIST",
    "Map",
    "Object",
    "library",
    "open_pinned",
    "pin",
    "read_iterator",
    "recursion_misses",
    "run_program",
    "version",
]
