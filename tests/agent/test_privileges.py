# SPDX-License-Identifier: Apache-2.0
"""The agent as an ordinary user with CAP_BPF and CAP_PERFMON and nothing else, as deploy/systemd starts it."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bad_input.refusal import refused
from tests.lab.bpffs import remove_pins
from tests.lab.privileges import NOBODY, as_nobody, need_another_user
from tests.lab.requires import Lack, need, tools_lack
from tests.lab.services import BIN, Lab

ENOUGH = ("bpf", "perfmon")
BITS = 1 << 38 | 1 << 39  # CAP_PERFMON, CAP_BPF: include/uapi/linux/capability.h
NOBODY_THERE = "127.0.0.1:1"
SEEN_AT = "/mnt"
"""Where an agent in a mount namespace of its own sees the folder of pins."""

# What a service manager does for MemoryDenyWriteExecute=, on Linux 6.3 and later: PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN. Older
# kernels do not know it, and the test shows that much less.
NO_WRITE_EXECUTE = "import ctypes, os, sys; ctypes.CDLL(None).prctl(65, 1, 0, 0, 0); os.execvp(sys.argv[1], sys.argv[1:])"


@pytest.fixture(autouse=True)
def _needs_another_user() -> None:
    need_another_user()


def test_two_capabilities_capture_everything(lab: Lab) -> None:
    """Ends and who caused them, what is run and with which arguments, and look-ups of processes."""
    broker = lab.broker()
    agent = lab.agent("least", broker.address, prefix=as_nobody(*ENOUGH))
    status = Path(f"/proc/{agent.pid}/status").read_text(encoding="ascii")
    for kind in ("Eff", "Prm", "Bnd"):
        found = re.search(rf"^Cap{kind}:\s*(\w+)", status, re.MULTILINE)
        assert found is not None
        assert int(found[1], 16) == BITS
    assert os.getpriority(os.PRIO_PROCESS, agent.pid) == os.getpriority(os.PRIO_PROCESS, 0), "it cannot raise it, and goes on"

    shell = lab.command("sh", "-c", "read go; /bin/echo hello; kill -9 $$")
    watch = lab.watch(broker.address, "--node", "least", "--pid", str(shell.pid), "--follow")
    [registered] = watch.wait_registered(1, "RUNNING")
    listed = lab.json_lines("ps", "--node", "least", "--broker", broker.address, "--json")
    [process] = [line for line in listed if line["pid"] == shell.pid]
    assert (process["ppid"], process["uid"], process["comm"]) == (os.getpid(), os.getuid(), "sh")
    assert process["start_time"] == registered["process"]["start_time"]

    shell.say("go")
    assert watch.wait() == 0, "all that it watched has ended"
    watch.wait_closed()
    [executed] = [line for line in watch.events() if line["type"] == "PROCESS_EXEC"]
    assert (executed["filename"], executed["args"]) == ("/bin/echo", ["/bin/echo", "hello"])
    abort, end = watch.events()[-2:]
    assert (abort["type"], end["type"]) == ("PROCESS_ABORT", "PROCESS_EXIT")
    assert end["exit_signal"] == signal.SIGKILL
    assert end["killed_by"] == {"pid": shell.pid, "comm": "sh", "uid": os.getuid()}


@pytest.fixture
def own_pins(pins: Path) -> Iterator[Path]:
    """The user's folder, in a bpffs that is root's alone."""
    folder = pins / "of-nobody"
    folder.mkdir(mode=0o700)
    os.chown(folder, NOBODY, NOBODY)
    yield folder
    remove_pins(folder)


@pytest.fixture
def as_service(own_pins: Path, tmp_path: Path) -> list[str]:
    """The command line's beginning for what the unit's options do: the folder of pins at another place, the rest of sysfs
    read-only, no look at the kernel's addresses, no new executable memory."""
    need(lambda: tools_lack(Lack.NAMESPACES, "unshare"))
    closed = tmp_path / "closed"
    closed.touch(mode=0)
    mounts = [
        f"mount --bind {own_pins} {SEEN_AT}",
        "mount --rbind /sys /sys",
        "mount -o remount,bind,ro /sys",
        f"mount --bind {closed} /proc/kallsyms",
    ]
    inner = [sys.executable, "-c", NO_WRITE_EXECUTE, *as_nobody(*ENOUGH)]
    return ["unshare", "--mount", "sh", "-c", f'{" && ".join(mounts)} && exec "$0" "$@"', *inner]


def test_pins_of_a_user_outlive_its_agent(lab: Lab, own_pins: Path, as_service: list[str]) -> None:
    broker = lab.broker()
    options = ("--pin-root", SEEN_AT)
    first = lab.agent("unit", broker.address, *options, pin=True, prefix=as_service)
    assert {path.stat().st_uid for path in own_pins.glob("unit@*/*")} == {NOBODY}
    shell = lab.command("sh", "-c", "read go; exit 7")
    watch = lab.watch(broker.address, "--node", "unit", "--pid", str(shell.pid), "--events", "exit")
    watch.wait_registered(1, "RUNNING")
    lab.stop(first)
    shell.say("go")
    assert shell.wait() == 7

    second = lab.agent("unit", broker.address, *options, pin=True, prefix=as_service)
    assert "carrying on with the pinned probe of source core" in second.stderr_text()
    assert watch.wait() == 0, "all that it watched has ended"
    watch.wait_closed()
    [end] = watch.events()
    assert (end["exit_code"], end["inferred"]) == (7, False)
    second.send(signal.SIGINT)
    assert second.wait() == 0
    assert not list(own_pins.iterdir()), "it removes its pins"


def test_pins_of_another_user(lab: Lab, own_pins: Path, as_service: list[str]) -> None:
    """Neither takes what the other has made: root's agent cannot know that it is a probe at all, and the user's may not open it."""
    words: list[str | Path] = [*lab.agent_command("unit", NOBODY_THERE, "--pin-root", str(own_pins), pin=True)]
    refused(lab.run(*words), 2, f"{own_pins} belongs to another user, uid {NOBODY}")
    os.chown(own_pins, 0, 0)
    broker = lab.broker()
    lab.stop(lab.agent("unit", broker.address, "--pin-root", str(own_pins), pin=True))
    os.chown(own_pins, NOBODY, NOBODY)
    words = [*as_service, *lab.agent_command("unit", NOBODY_THERE, "--pin-root", SEEN_AT, pin=True)]
    refused(lab.run(*words), 2, f"{SEEN_AT}/unit@host@v", "Permission denied", "--pin-root")


def test_a_bpffs_that_is_closed_to_the_user(lab: Lab) -> None:
    """As systemd mounts it."""
    words: list[str | Path] = [*as_nobody(*ENOUGH), *lab.agent_command("unit", NOBODY_THERE, pin=True)]
    refused(lab.run(*words, "--pin-root", lab.pins / "kmonitor"), 2, "Permission denied", "--pin-root", "--no-pin")


@pytest.mark.parametrize(
    ("source", "given", "lacks", "words"),
    [
        ("core", ["perfmon"], "CAP_BPF is missing", "with CAP_BPF and CAP_PERFMON"),
        ("core", ["bpf"], "CAP_PERFMON is missing", "with CAP_BPF and CAP_PERFMON"),
        ("core", ["net_admin"], "CAP_BPF and CAP_PERFMON are missing", "as root"),
        ("bcc", ["perfmon"], "CAP_BPF is missing", "with CAP_BPF and CAP_PERFMON"),
        ("bcc", ["bpf"], "CAP_PERFMON is missing", "with CAP_BPF and CAP_PERFMON"),
    ],
)
def test_the_missing_capability_is_named(lab: Lab, source: str, given: list[str], lacks: str, words: str) -> None:
    command: list[str | Path] = [BIN / "kmonitor-agent", "--node", "bad", "--broker", NOBODY_THERE, "--no-pin", "--source", source]
    refused(lab.run(*as_nobody(*given), *command), 4, lacks, words)


def test_capabilities_of_a_user_namespace_do_not_count(lab: Lab) -> None:
    need(lambda: tools_lack(Lack.NAMESPACES, "unshare"))
    done = lab.run("unshare", "--user", "--map-root-user", *lab.agent_command("bad", NOBODY_THERE))
    refused(done, 4, "do not count in a user namespace", "CAP_BPF and CAP_PERFMON")
