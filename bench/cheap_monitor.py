# SPDX-License-Identifier: Apache-2.0
"""A monitor that takes the stream as bytes, and looks at none but the answers to its requests: what the client costs is not at issue here.

    python -m bench.cheap_monitor BROKER

"register PID" on standard input, 0 for the whole node, is answered by "ok" once the kernel is armed for all events, those of threads too;
"deregister" takes it back; "bytes" is answered by how many came so far.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc

from bench.stack import NODE
from kmonitor.v1 import monitor_pb2

_ALL = 0x7F
_METHOD = "/kmonitor.v1.MonitorService/Watch"


class CheapMonitor:
    """The process, driven from here. One request at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid

    def register(self, pid: int = 0) -> None:
        """For all events of one process, or of the node."""
        self._ask(f"register {pid}")

    def deregister(self) -> None:
        """What was registered last. The kernel's maps may follow a moment later."""
        self._ask("deregister")

    def bytes(self) -> int:
        """How many came so far."""
        return int(self._ask("bytes"))

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        if not answer:
            raise SystemExit("bench: the monitor has ended; see above")
        return answer


@contextlib.contextmanager
def cheap_monitor(address: str) -> Iterator[CheapMonitor]:
    """Started, and ended afterwards."""
    argv = [sys.executable, "-m", "bench.cheap_monitor", address]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield CheapMonitor(process)
        finally:
            process.terminate()


class _Stream:
    def __init__(self, channel: grpc.Channel) -> None:
        self._requests: queue.SimpleQueue[monitor_pb2.WatchRequest] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[monitor_pb2.Notification] = queue.SimpleQueue()
        self._awaited = 0
        self.bytes = 0
        watch: grpc.StreamStreamMultiCallable[monitor_pb2.WatchRequest, bytes] = channel.stream_stream(
            _METHOD, request_serializer=monitor_pb2.WatchRequest.SerializeToString, response_deserializer=None
        )
        self._call = watch(iter(self._requests.get, None))
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, request: monitor_pb2.WatchRequest) -> None:
        self._awaited = request.request_id
        self._requests.put(request)
        answer = self._answers.get()
        error = answer.registered.error or answer.deregistered.error
        if error.message:
            raise SystemExit(f"bench: the broker refuses: {error.message}")

    def _read(self) -> None:
        for data in self._call:
            self.bytes += len(data)
            if not self._awaited:
                continue
            notification = monitor_pb2.Notification.FromString(data)
            kind = notification.WhichOneof("kind")
            if (kind == "registered" and notification.registered.request_id == self._awaited) or (
                kind == "deregistered" and notification.deregistered.request_id == self._awaited
            ):
                self._awaited = 0
                self._answers.put(notification)


def _main() -> None:
    stream = _Stream(grpc.insecure_channel(sys.argv[1], options=[("grpc.enable_http_proxy", 0)]))
    registration = monitor_pb2.Registration()
    for number, line in enumerate(sys.stdin, 1):
        command, *arguments = line.split()
        if command == "bytes":
            print(stream.bytes, flush=True)
            continue
        request = monitor_pb2.WatchRequest(request_id=number)
        if command == "register":
            pid = int(arguments[0])
            target = (
                monitor_pb2.Target(process=monitor_pb2.ProcessTarget(pid=pid))
                if pid
                else monitor_pb2.Target(everything=monitor_pb2.EverythingTarget())
            )
            registration = monitor_pb2.Registration(nodes=monitor_pb2.NodeSelector(names=[NODE]), target=target, event_mask=_ALL)
            request.register.registration.CopyFrom(registration)
        else:
            request.deregister.registration.CopyFrom(registration)
        stream.ask(request)
        print("ok", flush=True)


if __name__ == "__main__":
    _main()
