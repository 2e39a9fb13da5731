# SPDX-License-Identifier: Apache-2.0
"""What a pidfile may hold, and a file system that does not answer. Files of all kinds: tests/capture/test_pidfile.py."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kmonitor.agent import pidfile
from kmonitor.agent.errors import PidfileError, PidfileMissingError
from kmonitor.agent.processes import ProcessTable
from kmonitor.v1 import agent_pb2, monitor_pb2
from kmonitor.wire.selectors import PID_MAX

blank = st.text(" \t", max_size=4)
LIMIT = 10.0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pid=st.integers(1, PID_MAX),
    before=blank,
    after=blank,
    rest=st.one_of(st.just(b""), st.binary(max_size=200).map(lambda tail: b"\n" + tail)),
)
def test_a_number_and_what_is_around_it(tmp_path: Path, pid: int, before: str, after: str, rest: bytes) -> None:
    file = tmp_path / "x.pid"
    file.write_bytes(f"{before}{pid}{after}".encode() + rest)
    assert pidfile.read_pidfile(str(file)) == pid


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.binary(max_size=100) | st.text("0123456789 \n\r\t-+x\0", max_size=80).map(str.encode))
def test_any_bytes(tmp_path: Path, text: bytes) -> None:
    """A pid that can be, written in the first line, or an error of one line that tells nothing of what the file holds."""
    file = tmp_path / "x.pid"
    file.write_bytes(text)
    first = text.split(b"\n")[0]
    digits = first.lstrip(b" \t").rstrip(b" \t\r")
    if len(first) <= pidfile.LINE_MOST and digits.isdigit() and 0 < int(digits) <= PID_MAX and len(digits) <= 20:
        assert pidfile.read_pidfile(str(file)) == int(digits)
        return
    with pytest.raises(PidfileError, match=r"\A(is empty|has (no|a)( \w+)+ first line[a-z0-9 ]*)\Z") as caught:
        pidfile.read_pidfile(str(file))
    assert not isinstance(caught.value, PidfileMissingError)


@pytest.mark.parametrize("path", ["", "x.pid", "./x.pid", "/x\0.pid", "/" + "x" * 4096, "/\udcff"])
def test_what_is_no_absolute_path(path: str) -> None:
    with pytest.raises(PidfileError, match="is no absolute path"):
        pidfile.read_pidfile(path)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "good").write_text("1\n")
    (tmp_path / "bad").write_text("x\n")
    before = {path.name for path in Path("/proc/self/fd").iterdir()}
    for name in ("good", "bad", "missing", ""):
        try:
            pidfile.read_pidfile(str(tmp_path / name))
        except PidfileError:
            assert name != "good"
    assert {path.name for path in Path("/proc/self/fd").iterdir()} == before


class Answers:
    """What a reader sends."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[agent_pb2.PidfileRead] = asyncio.Queue()

    async def send(self, message: agent_pb2.AgentMessage) -> None:
        await self.queue.put(message.pidfile_read)

    async def next(self) -> agent_pb2.PidfileRead:
        async with asyncio.timeout(LIMIT):
            return await self.queue.get()


async def test_a_file_system_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a server that is away are answered with an error. Once too many wait for it, no more are tried, until it is back."""
    back = threading.Event()

    def read(path: str) -> int:
        if path == "/hangs":
            back.wait()
            return 1
        raise PidfileMissingError("is not there")

    monkeypatch.setattr(pidfile, "read_pidfile", read)
    monkeypatch.setattr(pidfile, "_TIME_LIMIT_S", 0.05)
    monkeypatch.setattr(pidfile, "_STUCK_MOST", 2)
    reader, answers = pidfile.PidfileReader(cast("ProcessTable", None)), Answers()
    for number in (1, 2):
        reader.start(agent_pb2.ReadPidfileCall(call_id=number, path="/hangs"), answers.send)
    told = [await answers.next(), await answers.next()]
    assert {(answer.call_id, answer.state, answer.error) for answer in told} == {(n, 0, "did not answer in 0.05 s") for n in (1, 2)}
    reader.start(agent_pb2.ReadPidfileCall(call_id=3, path="/missing"), answers.send)
    answer = await answers.next()
    assert (answer.call_id, answer.error) == (3, "is not read: 2 others wait for a file system that does not answer")
    back.set()
    for thread in threading.enumerate():
        if thread.name == "pidfile":
            await asyncio.to_thread(thread.join)
    reader.start(agent_pb2.ReadPidfileCall(call_id=4, path="/missing"), answers.send)
    answer = await answers.next()
    assert (answer.call_id, answer.state, answer.error) == (4, monitor_pb2.REGISTRATION_STATE_NOT_FOUND, "")
    await reader.abandon()
