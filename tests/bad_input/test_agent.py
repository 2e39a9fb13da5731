# SPDX-License-Identifier: Apache-2.0
"""`kmonitor-agent` with what cannot be, and on machines that lack what it takes."""

from __future__ import annotations

import signal
import time
from functools import partial
from pathlib import Path

import pytest

from tests.bad_input.refusal import refused, run_all
from tests.lab.privileges import AS_NOBODY, need_another_user
from tests.lab.requires import Lack, need, tools_lack
from tests.lab.services import BIN, Done, Lab

NOBODY_THERE = "127.0.0.1:1"
SOON = 8.0
"""Seconds: an agent that is to end at once must not try a broker first, which takes it 10."""

CAPABILITIES = "-bpf,-perfmon,-sys_admin"
CORE = ("--source", "core")
"""Else another source might do, and the agent would look for its broker."""
NEW_MOUNTS = ("unshare", "--mount", "sh", "-c")


def agent(lab: Lab, *options: str | Path, prefix: tuple[str, ...] = (), node: str = "bad", pin: bool = False) -> Done:
    """Run one to its end."""
    pins = [] if pin else ["--no-pin"]
    return lab.run(*prefix, BIN / "kmonitor-agent", "--node", node, "--broker", NOBODY_THERE, *pins, *options, limit=SOON)


def test_bad_value(lab: Lab) -> None:
    cases = {
        ("--scope", "moon"): "scope 'moon': write host or pidns",
        ("--source", "moon"): "source 'moon'",
        ("--source", "ebpf"): "write auto, core, bcc or netlink",
        ("--ring-size", "3M"): "ring size '3M': give a power of two",
        ("--ring-size", "1K"): "from 64K",
        ("--ring-size", "2G"): "to 1G",
        ("--ring-size", "much"): "such as 16M",
        ("--gather", "soon"): "'soon' is not a duration: write 250ms",
        ("--gather", "2s"): "--gather 2s: give 0s to 1s",
        ("--label", "rack"): "label 'rack': write NAME=VALUE",
        ("--label", "=7"): "cannot be a label's name",
        ("--broker", "moon"): "'moon' is no broker address: write HOST:PORT",
        ("--broker", "moon:0"): "HOST:PORT",
        ("--broker", "moon:65536"): "HOST:PORT",
        ("--node", "a b"): "'a b' cannot be a node's name",
        ("--node", "[a"): "'[a' cannot be a node's name",
    }
    for words, done in zip(cases.values(), run_all(lab, [["kmonitor-agent", "--no-pin", *options] for options in cases]), strict=True):
        refused(done, 2, words)


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--broker", "::1:7221"], "in brackets"), (["--broker", "moon:\u00b2"], "HOST:PORT"), (["--label", "a b=7"], "a label's name")],
    ids=["address without brackets", "superscript port", "label"],
)
def test_bad_value_found_only_by_a_close_look(lab: Lab, options: list[str], said: str) -> None:
    # With a broker's address that it takes, it would try for ever: the scope ends it before.
    done = agent(lab, *options, prefix=("unshare", "--pid", "--fork", "--mount-proc"))
    refused(done, 2, said)


def test_usage(lab: Lab) -> None:
    cases = {
        ("--nosuch",): "no such option: --nosuch",
        ("--verb",): "perhaps --verbose",
        ("--nod=moon",): "perhaps --node",
        ("--watched-max", "1"): "--watched-max: '1': give a whole number from 16 to 4194304",
        ("--nice", "much"): "--nice: 'much': give a whole number from -20 to 19",
        ("--no-pin=1",): "--no-pin",
        ("--node",): "--node: expected one argument",
        ("moon",): "unexpected argument 'moon'",
        ("--", "moon"): "unexpected argument 'moon'",
    }
    for words, done in zip(cases.values(), run_all(lab, [["kmonitor-agent", *options] for options in cases]), strict=True):
        refused(done, 2, words, "kmonitor-agent --help")


def test_help(lab: Lab) -> None:
    done = lab.run("kmonitor-agent", "--help")
    assert done.code == 0
    assert done.stderr == ""
    for words in ("[env var: KMONITOR_BROKER]", "[default: 127.0.0.1:7221]", "--pin-root FOLDER", "[default: 16M]", "--verbose, -v"):
        assert words in done.stdout


def test_no_broker(lab: Lab) -> None:
    """It keeps trying, says so once, and ends well when it is told to."""
    words = lab.agent_command("bad", NOBODY_THERE)
    process = lab.command("sh", "-c", 'exec "$0" "$@" 2>&1', *words)
    said = f"kmonitor-agent: no broker answers at {NOBODY_THERE}".encode()
    process.wait_line(lambda line: line.startswith(said) and line.endswith(b"trying again"), "no broker")
    process.send(signal.SIGTERM)
    assert process.wait() == 0
    process.wait_closed()
    assert len(process.lines) == 1, process.lines


def test_name_in_use_on_this_machine(lab: Lab) -> None:
    """By an agent with the same pins: the second one ends at once."""
    broker = lab.broker()
    first = lab.agent("taken", broker.address, pin=True)
    began = time.monotonic()
    done = lab.run(*lab.agent_command("taken", broker.address, pin=True))
    refused(done, 2, "another agent runs as node taken", "--node")
    assert time.monotonic() - began < SOON
    [line] = lab.json_lines("nodes", "--json", "--broker", broker.address)
    assert (line["name"], line["state"]) == ("taken", "UP")
    lab.stop(first)
    assert lab.run(*lab.agent_command("taken", broker.address, "--unpin", pin=True)).code == 0
    assert not list(lab.pins.glob("taken@*"))


@pytest.mark.parametrize("dropped", [CAPABILITIES, "-bpf,-sys_admin", "-perfmon,-sys_admin"])
def test_missing_capability(lab: Lab, dropped: str) -> None:
    need(partial(tools_lack, Lack.SETPRIV, "setpriv"))
    done = agent(lab, *CORE, prefix=("setpriv", "--bounding-set", dropped))
    assert done.code == 4, done
    refused(done, done.code, "CAP_BPF and CAP_PERFMON", "root")


def test_unprivileged_user(lab: Lab) -> None:
    need_another_user()
    done = agent(lab, *CORE, prefix=AS_NOBODY)
    assert done.code == 4, done
    refused(done, done.code, "CAP_BPF and CAP_PERFMON", "root")


def test_no_btf(lab: Lab) -> None:
    need(partial(tools_lack, Lack.NAMESPACES, "unshare"))
    done = agent(lab, *CORE, prefix=(*NEW_MOUNTS, 'mount -t tmpfs none /sys/kernel/btf && exec "$0" "$@"'))
    refused(done, 2, "no BTF", "/sys/kernel/btf/vmlinux", "CONFIG_DEBUG_INFO_BTF")


def test_pin_root_not_in_a_bpffs(lab: Lab, tmp_path: Path) -> None:
    done = agent(lab, "--pin-root", tmp_path / "pins", pin=True)
    refused(done, 2, f"{tmp_path / 'pins'} is not in a bpffs", "mount -t bpf", "--pin-root", "--no-pin")
    assert not list(tmp_path.iterdir())


def test_pin_root_that_was_there_stays(lab: Lab, tmp_path: Path) -> None:
    root = tmp_path / "pins"
    root.mkdir()
    refused(agent(lab, "--pin-root", root, pin=True), 2, "is not in a bpffs")
    assert root.exists()


@pytest.mark.parametrize("how", ["mount -t tmpfs none /sys/fs/bpf", "umount /sys/fs/bpf"])
def test_no_bpffs(lab: Lab, how: str) -> None:
    need(partial(tools_lack, Lack.NAMESPACES, "unshare"))
    done = agent(lab, prefix=(*NEW_MOUNTS, f'{how} && exec "$0" "$@"'), pin=True)
    refused(done, 2, "mount -t bpf bpf /sys/fs/bpf", "--no-pin")


def test_scope_host_in_a_child_namespace(lab: Lab) -> None:
    need(partial(tools_lack, Lack.NAMESPACES, "unshare"))
    done = agent(lab, *CORE, "--scope", "host", prefix=("unshare", "--pid", "--fork", "--mount-proc"))
    refused(done, 2, "scope host", "--scope pidns")
