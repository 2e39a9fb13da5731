# SPDX-License-Identifier: Apache-2.0
"""Compile, load and attach the probe with bcc. A program of its own, run by the interpreter that has bcc: a distribution's package
is one for the distribution's Python. It ends when it is done, and with it the 120 MB that a compiler takes.

Nothing of kmonitor is imported here. Standard input is a JSON object:

    source    the C text, without includes that are not the system's
    flags     for the compiler
    headers   a folder to use as the kernel's headers, or null for those that bcc finds
    hooks     [[program, tracepoint], ...]: attached in this order
    programs  [program, ...]: loaded, and attached only if they are among the hooks
    socket    descriptor of a Unix socket, to which the descriptors of the links, and then of these programs, are sent, in the same order

Standard output is a JSON object: {"version": ...}; or {"error": one line, "errno": number or 0}; or {"error": one line, "missing": true} if
this interpreter has no bcc. Standard error is what the compiler or the verifier said.
"""

import ctypes
import json
import os
import socket
import sys
from typing import Any


def load(order: dict[str, Any]) -> dict[str, Any]:
    """Do as told; the answer."""
    if order["headers"] is not None:
        os.environ["BCC_KERNEL_SOURCE"] = order["headers"]
    try:
        import bcc  # noqa: PLC0415 - an answer, not a traceback, if it is not there
    except (ImportError, OSError) as error:
        return {"error": _line(error), "missing": True}
    if not hasattr(bcc, "BPF"):  # on PyPI the name is another project's
        return {"error": f"the Python package at {bcc.__file__} is not the BPF Compiler Collection", "missing": True}
    version = getattr(bcc, "__version__", "of unknown version")
    if not order["hooks"]:
        return {"version": version}
    try:
        probe = bcc.BPF(text=order["source"].encode(), cflags=order["flags"])
    except Exception as error:  # noqa: BLE001 - bcc raises nothing more special
        return {"error": f"bcc {version} does not compile the probe: {_line(error)}", "errno": 0}
    made = []
    for program, tracepoint in [*order["hooks"], *((program, None) for program in order["programs"])]:
        ctypes.set_errno(0)
        try:
            loaded = probe.load_func(program.encode(), bcc.BPF.RAW_TRACEPOINT)
        except Exception as error:  # noqa: BLE001
            return {"error": f"bcc {version} does not load {program}: {_line(error)}", "errno": ctypes.get_errno()}
        if tracepoint is None:
            made.append(loaded.fd)
            continue
        link = bcc.lib.bpf_attach_raw_tracepoint(loaded.fd, tracepoint.encode())
        if link < 0:
            return {
                "error": f"bcc {version} cannot attach {program} to {tracepoint}: {os.strerror(ctypes.get_errno())}",
                "errno": ctypes.get_errno(),
            }
        made.append(link)
    with socket.socket(fileno=order["socket"]) as channel:
        socket.send_fds(channel, [b"made"], made)
    return {"version": version}


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    json.dump(load(json.load(sys.stdin)), sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # bcc's clean-up at exit would only take time: the links that were sent live on
