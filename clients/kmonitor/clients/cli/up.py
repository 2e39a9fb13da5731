# SPDX-License-Identifier: Apache-2.0
"""`kmon up`: a broker and an agent of this host, and its live events, in one command."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import os
import re
import signal
import socket
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Annotated

import typer

from kmonitor.clients.cli.beside import program
from kmonitor.clients.cli.options import Comms, Events, Failed, Json, Uids, duration, event_filters, run
from kmonitor.clients.cli.output import say
from kmonitor.wire import selectors
from kmonitor.wire.errors import BadSelectorError, BrokerUnreachableError, KmonitorError, NotAuthorisedError, UsageError

if TYPE_CHECKING:
    from kmonitor.clients.cli.view import Plan, Sink
    from kmonitor.clients.monitor import Monitor
    from kmonitor.clients.selection import Selection

_PORT = 7221
_PATIENCE_S = 10.0
"""After so long it is said what is waited for."""
_STOP_TIMEOUT_S = 30.0
_PR_SET_PDEATHSIG = 1  # prctl(2)
_BROKER_LINE = re.compile(r"kmonitor-broker: listening on (\S+)")
_AGENT_LINE = re.compile(r"kmonitor-agent: (\S+) is connected to \S+ \(source (\w+)")
_libc = ctypes.CDLL(None)


def up(
    *,
    comm: Comms = None,
    uid: Uids = None,
    failed: Failed = False,
    events: Events = None,
    for_: Annotated[str | None, typer.Option("--for", metavar="TIME", help="End after this long: 500ms, 10s, 2m, 1h, 1d.")] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Run a small workload, show what it does and nothing else, and end with it.")
    ] = False,
    json: Json = False,
) -> None:
    """Start a broker and an agent for this host, and show what happens on it. They end with it.

    Needs root, or CAP_BPF and CAP_PERFMON (kmon doctor tells what else will do). Exit status: that of the one that failed, else 0.

    \b
    Examples:
      kmon up --demo
      kmon up --failed --for 10m
    """
    seconds = duration(for_)
    run(_up(seconds, event_filters(events, comm, uid, failed), demo=demo, json=json))


async def _up(seconds: float | None, filters: Selection, *, demo: bool, json: bool) -> int:
    async with contextlib.AsyncExitStack() as stack:
        wanted = f"127.0.0.1:{_PORT}" if _is_free(_PORT) else "127.0.0.1:0"
        broker = await stack.enter_async_context(_child("kmonitor-broker", "--listen", wanted, "--log", "memory"))
        address = (await broker.line(_BROKER_LINE))[1]
        agent = await stack.enter_async_context(_child("kmonitor-agent", "--broker", address, "--node", _node_name(), "--no-pin"))
        # Not earlier: what grpc starts must not be there when children are made with a preexec function. Not later: the agent
        # takes as long to start as these do.
        from kmonitor.clients.cli.view import Plan, show  # noqa: PLC0415
        from kmonitor.clients.cli.watch import filters_text, make_sink  # noqa: PLC0415
        from kmonitor.clients.monitor import connect  # noqa: PLC0415

        match = await agent.line(_AGENT_LINE)
        if match[2] != "core":
            say(f"this machine's events come from source {match[2]}, since core does not work here: kmon doctor says why")
        elsewhere = "" if demo else "; what you start in another terminal shows here"
        say(f"broker and agent of {match[1]} run at {address}{elsewhere}")
        plan = Plan([filters], seconds=seconds)
        monitor = await stack.enter_async_context(connect(address))
        sink = await make_sink(monitor, json=json, progress=False, heading=filters_text(filters))
        shown = asyncio.ensure_future(_show_demo(monitor, sink, plan) if demo else show(monitor, sink, plan))
        ends = {asyncio.ensure_future(child.ended()) for child in (broker, agent)}
        try:
            done, _ = await asyncio.wait({shown, *ends}, return_when=asyncio.FIRST_COMPLETED)
            if shown in done:
                return shown.result()
            raise ends.intersection(done).pop().result()
        finally:
            for task in (shown, *ends):
                task.cancel()
            await asyncio.gather(shown, *ends, return_exceptions=True)


async def _show_demo(monitor: Monitor, sink: Sink, plan: Plan) -> int:
    """Show the workload and nothing else, then what to do next."""
    from kmonitor.clients.cli import demo  # noqa: PLC0415
    from kmonitor.clients.cli.view import show  # noqa: PLC0415

    counting = demo.Counting(sink)
    async with demo.workload() as workload:
        assert workload.stdin is not None
        filters = plan.selections[0].copy()
        filters["pid"], filters["follow"] = workload.pid, True
        counting.on_armed = workload.stdin.close
        status = await show(monitor, counting, dataclasses.replace(plan, selections=[filters], ends_seen=True, follow=True))
    say(counting.summary())
    say("next: kmon up shows all that this machine does; kmon watch --help, for a cluster; kmon lab up, for one on this machine")
    return status


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the broker will: a connection that lingers is no obstacle
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _node_name() -> str:
    try:
        return selectors.check_node_name(socket.gethostname())
    except BadSelectorError:
        return "localhost"


@contextlib.asynccontextmanager
async def _child(name: str, *arguments: str) -> AsyncIterator[_Child]:
    parent = os.getpid()

    def tie() -> None:  # in the child, before exec: whatever becomes of kmon, it goes too
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    process = await asyncio.create_subprocess_exec(
        program(name),
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        start_new_session=True,  # the terminal's Ctrl-C is for kmon, which ends them in order
        preexec_fn=tie,
    )
    child = _Child(name, process)
    try:
        yield child
    finally:
        await child.stop()


class _Child:
    """One of the two programs. Its stdout and stderr are read to the end, so that it never blocks on them."""

    def __init__(self, name: str, process: Process) -> None:
        self._name = name
        self._process = process
        self._lines: asyncio.Queue[str] = asyncio.Queue()
        self._said = ""  # the last line on stderr
        assert process.stdout is not None
        assert process.stderr is not None
        self._readers = [
            asyncio.create_task(self._read(process.stdout, self._lines.put_nowait)),
            asyncio.create_task(self._read(process.stderr, self._note)),
        ]

    async def line(self, pattern: re.Pattern[str]) -> re.Match[str]:
        """Wait for a line on stdout, for as long as the program lives. Raises what `ended` returns if it ends first."""
        ended = asyncio.ensure_future(self.ended())
        impatient = asyncio.ensure_future(self._say_what_is_waited_for())
        try:
            while True:
                line = asyncio.ensure_future(self._lines.get())
                await asyncio.wait({line, ended}, return_when=asyncio.FIRST_COMPLETED)
                if not line.done():
                    line.cancel()
                    raise ended.result()
                match = pattern.match(line.result())
                if match is not None:
                    return match
        finally:
            ended.cancel()
            impatient.cancel()

    async def _say_what_is_waited_for(self) -> None:
        patience = _PATIENCE_S
        while True:
            await asyncio.sleep(patience)
            said = f"; it said last: {self._said}" if self._said else ""
            say(f"still waiting for {self._name} to get ready (Ctrl-C ends it){said}")
            patience *= 2

    async def ended(self) -> KmonitorError:
        """Wait for the program's end; returns the error that says why, with its exit status."""
        status = await self._process.wait()
        await asyncio.gather(*self._readers)
        kinds: dict[int, type[KmonitorError]] = {2: UsageError, 3: BrokerUnreachableError, 4: NotAuthorisedError}
        return kinds.get(status, KmonitorError)(self._said or f"{self._name} ended with status {status}")

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL for one that does not heed it, or if the user insists."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT_S)
            except (TimeoutError, asyncio.CancelledError) as error:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
                await self._process.wait()
                if isinstance(error, asyncio.CancelledError):
                    raise
        await asyncio.gather(*self._readers)

    def _note(self, line: str) -> None:
        if line.strip():
            self._said = line.strip()

    async def _read(self, stream: asyncio.StreamReader, take: Callable[[str], None]) -> None:
        async for line in stream:
            take(line.decode(errors="replace").rstrip("\n"))
