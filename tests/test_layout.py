# SPDX-License-Identifier: Apache-2.0
"""What the folders of this repository must be like."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("agent", "broker", "clients", "proto")
PARTS = ("agent/kmonitor/agent", "broker/kmonitor/broker", "clients/kmonitor/clients", "proto/kmonitor/v1", "proto/kmonitor/wire")


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


def source_files() -> list[Path]:
    """What git keeps, or would if it were added; skips where there is no git checkout, as in an unpacked sdist."""
    # The checkout may belong to another user than the one who runs this, as in a container.
    listed = run("git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("folder", FOLDERS)
def test_kmonitor_is_a_namespace(folder: str) -> None:
    # One such file, and the parts in the other folders could not be imported any more.
    assert not (ROOT / folder / "kmonitor" / "__init__.py").exists()


@pytest.mark.parametrize("part", PARTS)
def test_each_part_tells_type_checkers_that_it_is_typed(part: str) -> None:
    assert (ROOT / part / "py.typed").is_file()


def test_no_part_has_been_forgotten_here() -> None:
    found = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder / "kmonitor").iterdir() if path.is_dir()}
    assert {name for name in found if not name.endswith("__pycache__")} == set(PARTS)


def test_no_package_registry_is_named() -> None:
    # Where packages come from is the business of the machine's own settings. In pieces, so that this file does not name them.
    hosts = ["".join(pieces).encode() for pieces in REGISTRIES]
    found = [f"{path.relative_to(ROOT)}: {host.decode()}" for path in source_files() for host in hosts if host in path.read_bytes()]
    assert not found


REGISTRIES = (
    ("pypi", ".org"),
    ("python", "hosted.org"),
    ("registry", ".npmjs"),
    ("registry", ".yarnpkg"),
    ("npmmirror", ".com"),
    ("deb", ".debian.org"),
    ("archive", ".ubuntu.com"),
    ("security", ".ubuntu.com"),
    ("proxy", ".golang.org"),
    ("static.crates", ".io"),
    ("index-", "url"),
    ("find-", "links ="),
)


def test_every_source_file_says_its_licence() -> None:
    checked = run(ROOT / "tools" / "check_spdx.sh")
    assert checked.returncode == 0, checked.stdout


def test_a_source_file_without_a_licence_is_noticed(tmp_path: Path) -> None:
    run("git", "init", "-q", ".", cwd=tmp_path)
    (tmp_path / "with.py").write_text("# SPDX-License-Identifier: Apache-2.0\n", encoding="utf-8")
    (tmp_path / "events_pb2.py").write_text("# generated\n", encoding="utf-8")
    assert run(ROOT / "tools" / "check_spdx.sh", tmp_path).returncode == 0
    (tmp_path / "without.c").write_text("int x;\n", encoding="utf-8")
    checked = run(ROOT / "tools" / "check_spdx.sh", tmp_path)
    assert checked.returncode == 1
    assert "without.c" in checked.stdout


def test_the_probe_is_gpl_and_its_header_is_either() -> None:
    # The kernel's helpers that it calls are for GPL programs only; Python reads the header's layout.
    first_line = {name: (ROOT / "bpf" / name).read_text(encoding="utf-8").splitlines()[0] for name in ("kmonitor.bpf.c", "kmonitor.h")}
    assert first_line["kmonitor.bpf.c"].endswith("SPDX-License-Identifier: GPL-2.0-only")
    assert "(GPL-2.0-only OR Apache-2.0)" in first_line["kmonitor.h"]


def lint_imports(checkout: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter over a copy. -S: without the editable install, which would add the folders of this checkout."""
    paths = [*(str(checkout / folder) for folder in FOLDERS), sysconfig.get_path("purelib")]
    program = f"import sys; sys.path[:0] = {paths!r}; from importlinter.cli import lint_imports_command; lint_imports_command()"
    return run(sys.executable, "-S", "-c", program, "--no-logo", "--no-cache", cwd=checkout)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("clients/kmonitor/clients/planted.py", "from kmonitor.broker import cli\n", "stay apart, above wire, above v1 BROKEN"),
        ("proto/kmonitor/wire/planted.py", "from kmonitor.agent import cli\n", "stay apart, above wire, above v1 BROKEN"),
        ("proto/kmonitor/wire/errors.py", "import grpc\n", "knows nothing of gRPC BROKEN"),
        ("broker/kmonitor/broker/log/__init__.py", "import grpc.aio\n", "knows nothing of gRPC BROKEN"),
    ],
)
def test_the_import_contracts_catch(checkout: Path, module: str, line: str, contract: str) -> None:
    with (checkout / module).open("a", encoding="utf-8") as file:
        file.write(line)
    checked = lint_imports(checkout)
    assert checked.returncode == 1, checked.stdout
    assert contract in checked.stdout.replace("\n", " ")
