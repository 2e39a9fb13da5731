# SPDX-License-Identifier: Apache-2.0
"""Files that hold a process id, as daemons write them to /run. Who asks is a monitor, and names any path: what the file is, is looked
at before it is opened, and nothing of what it holds is told but the process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import stat
import threading
from collections.abc import Awaitable, Callable

import grpc.aio

from kmonitor.agent.errors import PidfileError, PidfileMissingError
from kmonitor.agent.listing import to_proto
from kmonitor.agent.pins import filesystem_of
from kmonitor.agent.processes import HIDDEN_ADVICE
from kmonitor.agent.slices import in_thread
from kmonitor.agent.source import Processes
from kmonitor.v1 import agent_pb2, monitor_pb2
from kmonitor.wire.errors import BadSelectorError, KmonitorError
from kmonitor.wire.selectors import check_pid, check_pidfile

LINE_MOST = 64
"""Bytes of the first line. What follows is not read: postmaster.pid(5) has more lines."""
_TIME_LIMIT_S = 3.0
_AT_ONCE = 4
_STUCK_MOST = 32
_NUMBER = re.compile(rb"[ \t]*([0-9]{1,20})[ \t\r]*")
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

_OF_THE_KERNEL = frozenset((0x9FA0, 0x62656572, 0x27E0EB, 0x63677270, 0x64626720, 0x74726163, 0x73636673))
"""File systems: proc, sysfs, cgroup, cgroup2, debugfs, tracefs, securityfs. See include/uapi/linux/magic.h."""

Send = Callable[[agent_pb2.AgentMessage], Awaitable[None]]


def read_pidfile(path: str) -> int:
    """The process id in the first line of a regular file. Raises PidfileMissingError, PidfileError.

    Symbolic links are followed: /var/run is one. It never waits for a FIFO or a device, but may for a file system.
    """
    try:
        check_pidfile(path)
    except BadSelectorError:
        raise PidfileError("is no absolute path") from None
    # O_PATH: to open a FIFO may wait, and to open a device may do something, such as wind a tape (open(2)).
    try:
        there = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise PidfileMissingError("is not there") from None
    except OSError as error:
        raise PidfileError(f"cannot be opened: {error.strerror}") from None
    try:
        found = os.fstat(there)
        if not stat.S_ISREG(found.st_mode):
            raise PidfileError(f"is {_KINDS.get(stat.S_IFMT(found.st_mode), 'no regular file')}")
        # What is in there is no daemon's, and to read it may do something.
        if filesystem_of(there) in _OF_THE_KERNEL:
            raise PidfileError("is a file of the kernel's own, such as those in /proc and /sys")
        # So say the files of tracefs, some of which (trace_pipe) are used up by reading.
        if found.st_size == 0:
            raise PidfileError("is empty")
        text = _first_bytes(there)
    except OSError as error:
        raise PidfileError(f"cannot be read: {error.strerror}") from None
    finally:
        os.close(there)
    return _parse(text)


def _first_bytes(there: int) -> bytes:
    """Of the very file that was looked at, whatever its name means by now."""
    readable = os.open(f"/proc/self/fd/{there}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        return os.read(readable, LINE_MOST + 1)
    finally:
        os.close(readable)


def _parse(text: bytes) -> int:
    line, newline, _ = text.partition(b"\n")
    if not newline and len(text) > LINE_MOST:
        raise PidfileError(f"has a first line of more than {LINE_MOST} bytes")
    number = _NUMBER.fullmatch(line)
    if number is None:
        raise PidfileError("has no process id in its first line")
    try:
        return check_pid(int(number[1]))
    except BadSelectorError:
        raise PidfileError("has a number in its first line that no process can have") from None


class PidfileReader:
    """Answers the calls of one stream after the other. Belongs to one event loop."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._stuck = 0
        """Threads whose file did not answer in time, and has not since."""

    def start(self, call: agent_pb2.ReadPidfileCall, send: Send) -> None:
        """Answer a call with `send`, as soon as may be."""
        task = asyncio.create_task(self._answer(call, send), name="pidfile")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def abandon(self) -> None:
        """The stream has ended: nobody waits for the answers."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, call: agent_pb2.ReadPidfileCall, send: Send) -> None:
        answer = agent_pb2.PidfileRead(call_id=call.call_id)
        try:
            async with self._turns:
                pid = await self._read(call.path)
            look = await in_thread(lambda: self._processes.look_up([pid]))
            found = look.get(pid)
        except PidfileMissingError:
            answer.state = monitor_pb2.REGISTRATION_STATE_NOT_FOUND
        except PidfileError as error:
            answer.error = str(error)
        except (KmonitorError, OSError) as error:
            answer.error = f"names a process that cannot be looked up: {error}"
        else:
            if pid in look.hidden:
                answer.error = f"names process {pid}, which is there, but /proc hides it from the agent: {HIDDEN_ADVICE}"
            elif found is not None and found.live:
                answer.state = monitor_pb2.REGISTRATION_STATE_RUNNING
                answer.process.CopyFrom(to_proto(found))
            else:
                answer.state = monitor_pb2.REGISTRATION_STATE_EXITED
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the stream has ended: who serves it sees why
            await send(agent_pb2.AgentMessage(pidfile_read=answer))

    async def _read(self, path: str) -> int:
        """In a thread: a file system that hangs must not cost the node its lease. A daemon's thread: nor may it keep the agent alive."""
        if self._stuck >= _STUCK_MOST:
            raise PidfileError(f"is not read: {self._stuck} others wait for a file system that does not answer")
        loop = asyncio.get_running_loop()
        result: asyncio.Future[int] = loop.create_future()
        late = False

        def work() -> None:
            try:
                pid = read_pidfile(path)
            except PidfileError as error:
                outcome: int | PidfileError = error
            else:
                outcome = pid
            with contextlib.suppress(RuntimeError):  # the loop is closed: the agent ends
                loop.call_soon_threadsafe(done, outcome)

        def done(outcome: int | PidfileError) -> None:
            if late:
                self._stuck -= 1
            elif isinstance(outcome, PidfileError):
                result.set_exception(outcome)
            else:
                result.set_result(outcome)

        try:
            threading.Thread(target=work, name="pidfile", daemon=True).start()
        except RuntimeError as error:
            raise PidfileError(f"is not read: {error}") from None
        try:
            async with asyncio.timeout(_TIME_LIMIT_S):
                return await asyncio.shield(result)
        except TimeoutError:
            raise PidfileError(f"did not answer in {_TIME_LIMIT_S:g} s") from None
        finally:
            if not result.done():
                late = True
                self._stuck += 1
