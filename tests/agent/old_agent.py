# SPDX-License-Identifier: Apache-2.0
"""An agent of another version: this one, with another probe and other records.

python -m tests.agent.old_agent OBJECT RECORD_VERSION WATCHED_PADDING OPTION...
"""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[2] / "bpf"


def build(folder: Path, version: int, *, padding: int = 0) -> Path:
    """The probe with that record version, and so many bytes more in each value of `watched`; its object file."""
    changes = {
        "#define KMONITOR_RECORD_VERSION 1": f"#define KMONITOR_RECORD_VERSION {version}",
        "\tunsigned int unused;\n};": f"\tunsigned int unused;\n\tchar padding[{padding}];\n}};",
    }
    for source in SOURCES.glob("*.[ch]"):
        text = source.read_text(encoding="utf-8")
        if source.name == "kmonitor.h":
            for old, new in changes.items():
                assert text.count(old) == 1
                text = text.replace(old, new)
        (folder / source.name).write_text(text, encoding="utf-8")
    multiarch = subprocess.run(["cc", "-print-multiarch"], capture_output=True, text=True, check=True).stdout.strip()
    made = folder / "kmonitor.bpf.o"
    flags = ["-g", "-O2", "-target", "bpf", "-mcpu=v3", "-w", "-isystem", f"/usr/include/{multiarch}"]
    subprocess.run(["clang", *flags, "-c", "kmonitor.bpf.c", "-o", made], cwd=folder, check=True)
    return made


def command(made: Path, version: int, *options: str, padding: int = 0) -> list[str | Path]:
    """The command line that runs it."""
    return [sys.executable, "-m", "tests.agent.old_agent", made, str(version), str(padding), *options]


def main() -> None:
    """Put the other version in this one's place before anything takes its own from there."""
    made, version, padding = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    del sys.argv[1:4]

    from kmonitor.wire import record

    record.RECORD_VERSION = version
    from kmonitor.agent import maps

    maps._WATCHED = struct.Struct(f"<QIIQIIII{padding}x")
    maps.WATCHED_SIZE = maps._WATCHED.size
    from kmonitor.agent import probe

    probe.object_path = lambda: made
    from kmonitor.agent.cli import main as agent

    agent()


if __name__ == "__main__":
    main()
