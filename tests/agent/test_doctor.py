# SPDX-License-Identifier: Apache-2.0
"""`kmonitor-agent --check`: as whom and where it is run decides what works, and it says why."""

from __future__ import annotations

import json
import platform
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kmonitor.agent import checks
from kmonitor.agent.doctor import try_sources
from tests.lab.privileges import as_nobody, need_another_user
from tests.lab.requires import Lack, need, tools_lack
from tests.lab.services import Lab

Lines = dict[str, dict[str, Any]]
NAMES = [
    *("kernel", "BTF", "tracepoints", "libbpf", "user"),
    *("CAP_BPF", "CAP_PERFMON", "CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_SYS_NICE", "CAP_SYS_RESOURCE"),
    *("user namespace", "pid namespace", "/proc", "lockdown", "unprivileged BPF", "bpffs", "cgroup v2"),
    *("bcc", "kernel headers", "proc connector"),
    *("source core", "source bcc", "source netlink", "auto"),
]


def checked(lab: Lab, *options: str, prefix: tuple[str, ...] | list[str] = ()) -> tuple[int, Lines]:
    """Exit status, and the lines by name: always the same ones, and coherent."""
    agent = lab.agent_command("", "")[0]
    done = lab.run(*prefix, agent, "--check", "--json", *options)
    assert not done.stderr, done
    lines = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert list(lines) == NAMES
    assert all(line["advice"] for line in lines.values() if line["status"] != "ok")
    sources = [line for name, line in lines.items() if name.startswith("source ")]
    works = any(line["works"] for line in sources)
    assert done.code == (0 if works else 2)
    assert lines["auto"]["works"] == works
    assert lines["auto"]["source"] == next((line["source"] for line in sources if line["works"]), None)
    assert works != any(line["status"] == "fail" for line in lines.values()), "only what stands against every source fails"
    return done.code, lines


def in_new_mounts(script: str) -> tuple[str, ...]:
    """A prefix; skips the running test without unshare."""
    need(partial(tools_lack, Lack.NAMESPACES, "unshare"))
    return ("unshare", "--mount", "sh", "-c", f'{script} && exec "$0" "$@"')


def test_root(lab: Lab) -> None:
    status, lines = checked(lab)
    assert status == 0
    assert lines["source core"]["works"]
    assert lines["auto"]["found"] == "takes source core, the first choice, and it works"
    assert lines["auto"]["scope"] == "host"
    assert {line["needs"] for line in lines.values() if "needs" in line}


def test_ordinary_user(lab: Lab) -> None:
    need_another_user()
    status, lines = checked(lab, prefix=as_nobody())
    for name in ("core", "bcc"):
        assert "CAP_BPF and CAP_PERFMON are missing" in lines[f"source {name}"]["found"]
    # From 6.6 on anybody may listen to the connector (drivers/connector/cn_proc.c).
    works = tuple(map(int, platform.release().split(".")[:2])) >= (6, 6)
    assert (status, lines["auto"]["source"]) == ((0, "netlink") if works else (2, None))
    assert {lines[name]["status"] for name in ("CAP_BPF", "CAP_PERFMON")} == {"warn" if works else "fail"}
    assert works or "CAP_NET_ADMIN is missing" in lines["source netlink"]["found"]


@pytest.mark.parametrize(("given", "missing"), [("bpf", "CAP_PERFMON"), ("perfmon", "CAP_BPF")])
def test_one_capability_is_not_enough(lab: Lab, given: str, missing: str) -> None:
    need_another_user()
    _, lines = checked(lab, prefix=as_nobody(given))
    assert not lines["source core"]["works"]
    assert f"{missing} is missing" in lines["source core"]["found"]


def test_least_privilege_is_enough(lab: Lab) -> None:
    need_another_user()
    status, lines = checked(lab, prefix=as_nobody("bpf", "perfmon"))
    assert status == 0
    assert lines["auto"]["source"] == "core"
    _, closed = checked(lab, "--pin-root", str(lab.pins / "kmonitor"), prefix=as_nobody("bpf", "perfmon"))
    assert closed["bpffs"]["found"] == f"{lab.pins} is closed to this user"
    assert lines["CAP_SYS_NICE"]["found"].startswith("not effective")


def test_user_namespace(lab: Lab) -> None:
    need(partial(tools_lack, Lack.NAMESPACES, "unshare"))
    status, lines = checked(lab, prefix=("unshare", "--user", "--map-root-user"))
    assert status == 2
    assert lines["user namespace"]["status"] == "fail"
    assert lines["CAP_BPF"]["found"] == "effective"
    assert "user namespace" in lines["source core"]["found"]


def test_child_pid_namespace(lab: Lab) -> None:
    need(partial(tools_lack, Lack.NAMESPACES, "unshare"))
    inside = ("unshare", "--pid", "--fork", "--mount-proc")
    status, lines = checked(lab, prefix=inside)
    assert status == 0
    assert (lines["auto"]["scope"], lines["auto"]["status"]) == ("pidns", "warn")
    assert "--scope pidns" in lines["auto"]["advice"]
    status, lines = checked(lab, "--scope", "host", prefix=inside)
    assert status == 2
    assert "--scope pidns" in lines["source core"]["found"]


@pytest.mark.parametrize("script", ["umount -R -l /sys", "umount -R -l /sys && umount -l /proc"], ids=["no sys", "no sys, no proc"])
def test_without_the_kernels_file_systems(lab: Lab, script: str) -> None:
    _, lines = checked(lab, prefix=in_new_mounts(script))
    assert lines["BTF"]["found"] == "sysfs is not mounted"
    assert not lines["source core"]["works"]
    assert lines["bpffs"]["status"] == "warn"


def test_what_is_read_by_people(lab: Lab) -> None:
    done = lab.run(lab.agent_command("", "")[0], "--check")
    assert done.code == 0
    assert [line.split()[0] for line in done.stdout.splitlines()].count("ok") > 10
    assert "source core" in done.stdout


def test_a_trial_leaves_nothing_behind(pins: Path) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def pins_there() -> list[Path]:
        return sorted(each for each in pins.parent.iterdir() if not each.name.startswith("kmonitor-test-"))  # those come and go

    try_sources("host")
    before = descriptors()
    pinned = pins_there()
    assert not try_sources("host")[0].refusal
    assert descriptors() == before
    assert pins_there() == pinned


def test_the_bcc_of_another_maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "bcc"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(checks, "_BCC_FOLDERS", "no such folder")
    found = checks.bcc()
    assert (found.status, found.found) == ("warn", f"{package} is another package of that name")
    (package / "libbcc.py").touch()
    (package / "version.py").write_text("__version__ = '0.26.0'\n", encoding="utf-8")
    assert checks.bcc() == checks.Check("ok", "bcc", f"0.26.0 in {package}")


def test_the_folder_of_pins(pins: Path, tmp_path: Path) -> None:
    assert checks.bpffs(pins / "one" / "two").status == "ok"
    assert checks.bpffs(tmp_path / "one").found == f"{tmp_path / 'one'} is not in one"
