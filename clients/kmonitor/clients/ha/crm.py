# SPDX-License-Identifier: Apache-2.0
"""Pacemaker's commands, each with a time limit, and what they say as text or as one typed error.

They are run as they come with Pacemaker (2.1 and newer), for its libraries have no stable binary interface. Each takes 10 to 20 ms of CPU,
most of it to be linked.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import math
import os
import shutil
import subprocess
import xml.etree.ElementTree as ET

from kmonitor.wire.errors import KmonitorError

COMMAND_LIMIT_S = 10.0
FIRST_QUESTION_S, LONGEST_QUESTION_S = 0.5, 4.0
"""Of the two short questions that a death waits for: better to ask again than to wait for an answer that was lost. They take 20 to 70 ms;
on a machine on which they take longer each has twice the time of the one before."""
_NOT_CONNECTED = frozenset({102, 103, 107, 111})
"""Exit codes: not connected, no DC, and transport errors."""
_NO_RIGHT = frozenset({4, 77})
_ELSEWHERE = "/usr/sbin:/sbin"
"""Where they are too, and the PATH of an ordinary user does not lead."""
IDLE = "S_IDLE"
"""The state of a DC's controller that has nothing to do: all that it ever asked of a node was answered."""


class CrmError(KmonitorError):
    """A command of Pacemaker's failed."""

    exit_status = 2


class CrmAwayError(CrmError):
    """Pacemaker does not run on this node, or did not answer in time. It may do so again."""


class CrmPermissionError(CrmError):
    """Neither root, nor of the group haclient."""

    exit_status = 4


class Crm:
    """Asks and tells the cluster, from one of its nodes."""

    def __init__(self, limit: float = COMMAND_LIMIT_S) -> None:
        self._limit = limit
        self._question_limit = FIRST_QUESTION_S

    async def local_node(self) -> str:
        """The name of the node that this runs on."""
        return (await self._run("crm_node", "--name")).strip()

    async def version(self) -> str:
        """Which content the CIB has, as this node knows it: cheap, to see whether anything has changed. See `cluster_state.version_of`."""
        return await self._run("cibadmin", "--query", "--local", "--xpath", "/cib", "--no-children")

    async def cib(self, node: str = "") -> str:
        """The CIB as XML: this node's copy, or that of `node`.

        Asked of another node the question goes the way of all changes (Corosync's totally ordered messages), so that the answer has every
        change that any node had seen when this was called. The copy of this node may be behind.
        """
        return await self._run("cibadmin", "--query", *(("--node", node) if node else ("--local",)))

    async def cib_version(self, node: str) -> str:
        """As `cib`, without the content: see `version`."""
        return await self._question("cibadmin", "--query", "--node", node, "--xpath", "/cib", "--no-children")

    async def monitor(self, cib: str) -> ET.Element:
        """What crm_mon makes of a CIB: with all defaults, templates and rules applied."""
        with _in_memory(cib) as (path, fd):
            said = await self._run(
                "crm_mon", "--output-as=xml", "--inactive", "--one-shot", "--show-detail", env={"CIB_file": path}, pass_fds=(fd,)
            )
        return _parsed("crm_mon", said)

    async def planned(self, cib: str) -> set[str]:
        """The resources that Pacemaker's scheduler, given this CIB, would not leave as they are."""
        with _in_memory(cib) as (path, fd):
            said = await self._run("crm_simulate", "--simulate", "--xml-file", path, "--output-as=xml", pass_fds=(fd,))
        actions = _parsed("crm_simulate", said).iter("rsc_action")
        return {each.get("resource", "") for each in actions if each.get("action", "").lower() not in ("", "leave")}

    async def controller_state(self, node: str) -> str:
        """Of a node's controller: S_IDLE or another of a DC, S_NOT_DC."""
        said = await self._question("crmadmin", "--status", node, "--output-as=xml")
        found = _parsed("crmadmin", said).find("crmd")
        return "" if found is None else found.get("state", "")

    async def fail(self, resource: str, node: str) -> None:
        """Tell the cluster that a resource has failed on a node."""
        await self._run("crm_resource", "--fail", "--resource", resource, "--node", node)

    async def attribute(self, node: str, name: str, value: str) -> None:
        """Set a node's attribute, until the node's next start; an empty value removes it."""
        what = ("--update", value) if value else ("--delete",)
        await self._run("attrd_updater", "--node", node, "--name", name, *what)

    async def parameter(self, resource: str, name: str) -> str:
        """A resource's parameter as its agent gets it here; empty if it has none."""
        try:
            return (await self._run("crm_resource", "--resource", resource, "--get-parameter", name)).strip()
        except CrmAwayError:
            raise
        except CrmError:
            return ""

    async def metadata(self, agent: str) -> ET.Element:
        """What an agent ("ocf:heartbeat:anything") says of itself. Raises CrmError if it is not installed here."""
        return _parsed("crm_resource", await self._run("crm_resource", "--show-metadata", agent))

    async def _question(self, *argv: str) -> str:
        try:
            said = await self._run(*argv, limit=self._question_limit)
        except CrmAwayError:
            self._question_limit = min(2 * self._question_limit, LONGEST_QUESTION_S)
            raise
        self._question_limit = FIRST_QUESTION_S
        return said

    async def _run(self, *argv: str, env: dict[str, str] | None = None, pass_fds: tuple[int, ...] = (), limit: float = math.inf) -> str:
        limit = min(limit, self._limit)
        program = shutil.which(argv[0]) or shutil.which(argv[0], path=_ELSEWHERE)
        if program is None:
            raise CrmError(
                f"{argv[0]} is not here: install Pacemaker's command line tools (pacemaker-cli-utils), or run this on a cluster node"
            )
        # Output goes to memory, and the end is seen by a pidfd: no thread for each child, as asyncio's own way has up to Python 3.11, which
        # mixes up two children of which the second got the pid of the first.
        with _in_memory() as (_, out), _in_memory() as (_, err):
            process = subprocess.Popen(  # noqa: ASYNC220 - a vfork
                [program, *argv[1:]],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, **(env or {})},
                pass_fds=pass_fds,
            )
            try:
                async with asyncio.timeout(limit):
                    await _ended(process.pid)
            except TimeoutError:
                raise CrmAwayError(f"{argv[0]} did not answer in {limit:g} s") from None
            finally:
                process.kill()  # of one that has ended this does nothing
                code = process.wait()
            if code:
                raise _error(argv[0], code, _text(err) or _text(out))
            return _text(out)


class _in_memory:  # noqa: N801 - a context manager that is used as a function
    """A file with a path, for programs that get its descriptor. It lies on no disk: a CIB may hold passwords."""

    def __init__(self, text: str = "") -> None:
        self._fd = os.memfd_create("kmonitor", os.MFD_CLOEXEC)
        with os.fdopen(os.dup(self._fd), "w", encoding="utf-8") as file:
            file.write(text)

    def __enter__(self) -> tuple[str, int]:
        return f"/proc/self/fd/{self._fd}", self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _text(fd: int) -> str:
    return os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")


async def _ended(pid: int) -> None:
    """Until a child has ended; it is not reaped."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    pidfd = os.pidfd_open(pid)
    loop.add_reader(pidfd, lambda: None if ended.done() else ended.set_result(None))
    try:
        await ended
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def _parsed(command: str, text: str) -> ET.Element:
    try:
        return ET.fromstring(text)
    except ET.ParseError as error:
        raise CrmError(f"{command} printed what is no XML ({error}): Pacemaker 2.1 or newer is needed") from None


def _may() -> bool:
    """Whether Pacemaker lets this user in: who may not is told the same as where it does not run."""
    names = set()
    for group in {os.getegid(), *os.getgroups()}:
        with contextlib.suppress(KeyError):
            names.add(grp.getgrgid(group).gr_name)
    return os.geteuid() == 0 or "haclient" in names


def _error(command: str, code: int, said: str) -> CrmError:
    """From the last line that the command printed: what went before are details."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.lstrip().startswith("<")]
    last = lines[-1].removeprefix(f"{command}: ").removeprefix("error: ") if lines else f"exit status {code}"
    if code in _NO_RIGHT or (code in _NOT_CONNECTED and not _may()):
        return CrmPermissionError(f"{command}: {last}: run this as root, or as a member of the group haclient")
    if code in _NOT_CONNECTED:
        return CrmAwayError(f"{command}: {last}: Pacemaker does not answer on this node, or does not run here")
    return CrmError(f"{command}: {last}")
