# SPDX-License-Identifier: Apache-2.0
"""A Docker engine with Compose: whether there is one, and a lab on it that leaves nothing behind."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.lab.process import LabError, Running
from tests.lab.requires import Lack, skip

TOP = Path(__file__).parents[2]

BUILD_LIMIT = 1200.0
"""Seconds that all images may take to build: clang and the packages are fetched."""


def need_engine() -> None:
    """Skip the running test where `make lab-test` did not ask for it, or nothing can run it."""
    if os.environ.get("KMONITOR_LAB_TEST") != "1":
        skip(Lack.LAB_TEST)
    if shutil.which("docker") is None:
        skip(Lack.ENGINE, "there is no docker command")
    for command in (["docker", "version", "--format", "{{.Server.Version}}"], ["docker", "compose", "version"]):
        done = _run(command, limit=30)
        if done.returncode != 0:
            skip(Lack.ENGINE, (done.stderr.strip().splitlines() or [f"{' '.join(command)} ends with {done.returncode}"])[-1])


class Compose:
    """A project of its own, so that a lab that runs already is left alone."""

    def __init__(self, subnet: str) -> None:
        self.project = f"kmonitor-lab-test-{os.getpid()}"
        self.env = {"COMPOSE_PROJECT_NAME": self.project, "KMONITOR_LAB_SUBNET": subnet}

    def environment(self) -> dict[str, str]:
        """Of this process, and what makes the page's commands mean this project."""
        return {**os.environ, **self.env}

    def command(self, text: str) -> list[str]:
        """A command line of the page, for a shell: it means this project."""
        return ["bash", "-c", text.replace("kmonitor-lab", self.project)]

    def run(self, *words: str, limit: float = 120.0) -> str:
        """Run `docker compose ...`; its standard output. LabError if it fails."""
        done = _run(["docker", "compose", *words], env=self.env, limit=limit)
        if done.returncode != 0:
            raise LabError(f"docker compose {' '.join(words)}: exit status {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        return done.stdout

    def inspect(self, service: str) -> str:
        """What the engine knows of a service's container, as JSON."""
        return _run(["docker", "inspect", self.run("ps", "--quiet", service).strip()]).stdout

    def start(self, text: str) -> Running:
        """Start a command of the page that goes on until it is stopped. Its standard error comes in between, as in a terminal."""
        return Running(text, self.command(f"{text} 2>&1"), env=self.env, cwd=TOP)

    def left(self) -> list[str]:
        """Containers, networks and volumes of this project."""
        mine = f"label=com.docker.compose.project={self.project}"
        listings = (["ps", "--all"], ["network", "ls"], ["volume", "ls"])
        return [line for words in listings for line in _run(["docker", *words, "--quiet", "--filter", mine]).stdout.split()]


@contextmanager
def compose(*profiles: str) -> Iterator[Compose]:
    """Images that are built, and a project that is gone at the end. Images and the build's cache stay, for the next time."""
    need_engine()
    lab = Compose(_free_subnet())
    options = [word for name in profiles for word in ("--profile", name)]
    _need_base_images(json.loads(lab.run(*options, "config", "--format", "json")))
    lab.run(*options, "build", limit=BUILD_LIMIT)
    try:
        yield lab
    finally:
        lab.run("--profile", "*", "down", "--volumes", "--remove-orphans", "--timeout", "5")


def _need_base_images(config: dict[str, Any]) -> None:
    builds = [service["build"] for service in config["services"].values() if "build" in service]
    for image in sorted({image for build in builds for image in build["args"].values()}):
        if _run(["docker", "image", "inspect", image]).returncode == 0:
            continue
        done = _run(["docker", "pull", "--quiet", image], limit=300)
        if done.returncode != 0:
            skip(Lack.BASE_IMAGE, (done.stderr.strip().splitlines() or [image])[-1])


def _free_subnet() -> str:
    """A subnet that neither a route of this machine nor a network of the engine has."""
    taken = []
    for line in Path("/proc/net/route").read_text(encoding="ascii").splitlines()[1:]:
        fields = line.split()
        address, mask = (int.from_bytes(bytes.fromhex(fields[at]), "little") for at in (1, 7))
        if mask:
            taken.append(ipaddress.ip_network((address, bin(mask).count("1"))))
    names = _run(["docker", "network", "ls", "--quiet"]).stdout.split()
    for network in json.loads(_run(["docker", "network", "inspect", *names]).stdout or "[]"):
        taken += [ipaddress.ip_network(entry["Subnet"]) for entry in network["IPAM"]["Config"] or [] if ":" not in entry["Subnet"]]
    for third in range(22, 255):
        subnet = ipaddress.ip_network(f"10.77.{third}.0/24")
        if not any(subnet.overlaps(other) for other in taken):
            return str(subnet)
    raise LabError("no free subnet in 10.77.0.0/16")


def _run(argv: Sequence[str], *, env: dict[str, str] | None = None, limit: float = 60.0) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            argv,
            cwd=TOP,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{' '.join(argv)} did not end in {limit:g} s: {str(error.stdout or '')[-2000:]}") from None
