# SPDX-License-Identifier: Apache-2.0
"""Broker, agents and commands of kmonitor as a user starts them, and the lab that ends them all."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tests.lab.process import LabError, Running
from tests.lab.watch import Watch

R = TypeVar("R", bound=Running)

BIN = Path(sys.executable).parent
"""Where the commands are: beside the interpreter that runs the tests."""

ALL_LABS: list[Lab] = []
"""Those that have processes now: what a failed test shows the words of."""


class Broker(Running):
    """A broker. Its `address`, HOST:PORT, is known when it listens."""

    address = ""

    def __init__(self, argv: Sequence[str | Path]) -> None:
        super().__init__("kmonitor-broker", argv)

    def wait_listening(self) -> None:
        """Until it says where it listens."""
        said = b"kmonitor-broker: listening on "
        line = self.lines[self.wait_line(lambda text: text.startswith(said), "its address")]
        self.address = line.removeprefix(said).decode().strip()


class Agent(Running):
    """An agent of one node."""

    def __init__(self, node: str, argv: Sequence[str | Path]) -> None:
        super().__init__(f"kmonitor-agent {node}", argv)
        self.node = node

    def wait_connected(self, start: int = 0) -> int:
        """Until it says, in a line from `start` on, that it is connected."""
        said = f"kmonitor-agent: {self.node} is connected to".encode()
        return self.wait_line(lambda text: text.startswith(said), "its connection", start=start)


class Lab:
    """Starts what a test needs, and stops it in the reverse order. What ends badly is an error of the test."""

    def __init__(self, pins: Path) -> None:
        self.pins = pins
        self.running: list[Running] = []
        self._ends_as_it_likes: set[int] = set()
        ALL_LABS.append(self)

    def broker(self, *options: str, prefix: Sequence[str] = (), listen: str = "127.0.0.1:0") -> Broker:
        """Start a broker; `prefix` is a command to run it with, such as `ip netns exec NAME`."""
        log = [] if "--log" in options else ["--log", "memory"]
        broker = self.keep(Broker([*prefix, BIN / "kmonitor-broker", "--listen", listen, *log, *options]))
        broker.wait_listening()
        return broker

    def agent(
        self,
        node: str,
        broker: str,
        *options: str,
        source: str = "core",
        scope: str = "host",
        pin: bool = False,
        prefix: Sequence[str] = (),
    ) -> Agent:
        """Start an agent, and wait until it is connected."""
        agent = self.keep(Agent(node, [*prefix, *self.agent_command(node, broker, *options, source=source, scope=scope, pin=pin)]))
        agent.wait_connected()
        return agent

    def agent_command(
        self, node: str, broker: str, *options: str, source: str = "core", scope: str = "host", pin: bool = False
    ) -> list[str | Path]:
        """The command line of an agent."""
        pins: list[str | Path] = ["--pin-root", self.pins] if pin else ["--no-pin"]
        return [BIN / "kmonitor-agent", "--broker", broker, "--node", node, "--source", source, "--scope", scope, *pins, *options]

    def watch(self, broker: str, *options: str, prefix: Sequence[str] = ()) -> Watch:
        """Start `kmon watch --json`."""
        return self.keep(Watch([*prefix, BIN / "kmon", "watch", "--json", "--broker", broker, *options]))

    def command(
        self,
        *argv: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        own_group: bool = False,
        prefix: Sequence[str] = (),
    ) -> Running:
        """Start any command; one of kmonitor's is found by its name. The test itself looks at how it ends."""
        program = BIN / argv[0] if str(argv[0]).startswith("kmon") else argv[0]
        started = Running(Path(argv[0]).name, [*prefix, program, *argv[1:]], env=env, cwd=cwd, own_group=own_group)
        self._ends_as_it_likes.add(started.pid)
        return self.keep(started)

    def run(self, *argv: str | Path, limit: float = 20.0, env: Mapping[str, str] | None = None, prefix: Sequence[str] = ()) -> Done:
        """Run a command to its end."""
        started = self.command(*argv, env=env, prefix=prefix)
        started.close_input()
        started.wait(limit)
        started.wait_closed()
        self.stop(started)
        return Done(started.process.returncode, b"\n".join(started.lines).decode(), started.stderr_text())

    def json_lines(self, *argv: str, prefix: Sequence[str] = ()) -> list[dict[str, Any]]:
        """What `kmon ... --json` prints."""
        done = self.run("kmon", *argv, prefix=prefix)
        if done.code != 0:
            raise LabError(f"kmon {' '.join(argv)}: {done}")
        return [json.loads(line) for line in done.stdout.splitlines()]

    def stop(self, *processes: Running) -> None:
        """Stop these now; how they end is the test's to look at."""
        for process in processes:
            self.running.remove(process)
            process.stop()

    def kill(self, process: Running) -> None:
        """SIGKILL: a fault on purpose."""
        self._ends_as_it_likes.add(process.pid)
        process.send(signal.SIGKILL)
        process.wait()

    def expect(self, process: Running, code: int) -> None:
        """It ends by itself with this exit status, which is no failure of the test."""
        if process.wait() != code:
            raise process.failure(f"expected exit status {code}")
        self._ends_as_it_likes.add(process.pid)

    def keep(self, started: R) -> R:
        """Stop it at the end."""
        self.running.append(started)
        return started

    def close(self) -> None:
        """Stop all. LabError with all that went wrong."""
        wrong: list[str] = []
        for process in reversed(self.running):
            try:
                code = process.stop()
            except LabError as error:
                wrong.append(str(error))
                continue
            if process.pid in self._ends_as_it_likes:
                continue
            if code != 0:
                wrong.append(str(process.failure(f"ended with {code} after SIGTERM")))
            elif "Traceback" in process.stderr_text():
                wrong.append(str(process.failure("wrote a traceback")))
        self.running.clear()
        ALL_LABS.remove(self)
        if wrong:
            raise LabError("\n\n".join(wrong))


class Done:
    """How a command ended."""

    def __init__(self, code: int, stdout: str, stderr: str) -> None:
        self.code = code
        self.stdout = stdout
        self.stderr = stderr

    def __repr__(self) -> str:
        return f"exit status {self.code}\n-- stdout:\n{self.stdout}\n-- stderr:\n{self.stderr}"


def stderr_of_all() -> list[tuple[str, str]]:
    """Name and standard error of each process that a lab holds now."""
    return [(f"stderr of {process.name} ({process.pid})", process.stderr_text()) for lab in ALL_LABS for process in lab.running]
