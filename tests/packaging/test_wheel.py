# SPDX-License-Identifier: Apache-2.0
"""The wheel, built and installed as a user would have it, and the tests that need nothing else run against it."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OBJECT = "kmonitor/agent/kmonitor.bpf.o"
EM_BPF = 247  # elf.h

pytestmark = [pytest.mark.wheel, pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Installed:
    """A virtual environment with kmonitor from the wheel, and its dependencies from where this runs."""

    wheel: Path
    folder: Path

    def run(self, command: str, *arguments: str) -> str:
        """Output of one of the environment's commands, run outside of the checkout; fails unless it ends with 0."""
        environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV", "PYTEST_ADDOPTS"}}
        done = subprocess.run(
            [self.folder / "bin" / command, *arguments],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    dist = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", dist, ROOT], check=True)
    (wheel,) = dist.glob("kmonitor-*.whl")
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    # A path in a .pth file gives what lies in the folder, but does not read the .pth files there, of which one is
    # this checkout's editable install.
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return Installed(wheel, folder)


def test_the_wheel_holds_the_object_the_protocol_and_the_licences(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        names = set(wheel.namelist())
        head = wheel.read(OBJECT)[:20]
    assert head[:4] == b"\x7fELF"
    assert struct.unpack_from("=H", head, 18) == (EM_BPF,)
    # What source "bcc" compiles on the node.
    assert {f"kmonitor/agent/bpf/{path.name}" for path in (ROOT / "bpf").glob("*.[ch]")} <= names
    assert "kmonitor/__init__.py" not in names
    assert {f"kmonitor/{part}/py.typed" for part in ("agent", "broker", "clients", "v1", "wire")} <= names
    assert {"kmonitor/v1/monitor.proto", "kmonitor/v1/monitor_pb2.pyi"} <= names
    assert {name.partition("licenses/")[2] for name in names if ".dist-info/licenses/" in name} == {
        "LICENSE",
        "LICENSES/Apache-2.0.txt",
        "LICENSES/GPL-2.0-only.txt",
    }
    assert {name.split("/")[0] for name in names} == {"kmonitor", next(name for name in names if ".dist-info/" in name).split("/")[0]}


def test_the_object_does_not_name_the_machine_it_was_made_on(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        assert str(ROOT).encode() not in wheel.read(OBJECT)


def test_everything_is_imported_from_the_wheel(installed: Installed) -> None:
    program = """
import importlib.resources, kmonitor, kmonitor.wire
print(*kmonitor.__path__, importlib.resources.files("kmonitor.agent") / "kmonitor.bpf.o")
"""
    paths = installed.run("python", "-c", program).split()
    assert len(paths) == 2
    assert all(Path(path).is_relative_to(installed.folder) for path in paths)


@pytest.mark.parametrize("command", ["kmon", "kmonitor-agent", "kmonitor-broker"])
def test_the_commands_are_there(installed: Installed, command: str) -> None:
    assert "--help" in installed.run(command, "--help")


def test_the_tests_that_need_only_the_wheel(installed: Installed) -> None:
    output = installed.run(
        "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "-m", "wheel_ok", str(ROOT / "tests")
    )
    assert " passed" in output
