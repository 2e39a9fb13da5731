# SPDX-License-Identifier: Apache-2.0
"""What a start leaves that was refused or cut off, what `--unpin` says, and a source that has no use for pins."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from tests.bad_input.refusal import refused
from tests.lab.privileges import as_nobody, need_another_user
from tests.lab.requires import Lack, capture_lack, need, tools_lack
from tests.lab.services import Lab

NOBODY_THERE = "127.0.0.1:1"
NO_BTF = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /sys/kernel/btf && exec "$0" "$@"')


@pytest.mark.parametrize("source", ["netlink", "auto"])
def test_netlink_needs_no_pins(lab: Lab, source: str) -> None:
    """The user may do what netlink takes, and may not write to the bpffs: `kmon doctor` says that it works, and so it does."""
    need(capture_lack)
    need_another_user()
    broker = lab.broker()
    prefix = as_nobody("net_admin", "sys_ptrace")
    agent = lab.agent("linked", broker.address, source=source, pin=True, prefix=prefix)
    (node,) = lab.json_lines("nodes", "--json", "--broker", broker.address)
    assert node["source"] == "netlink"
    lab.stop(agent)
    refused(
        lab.run(*as_nobody("bpf", "perfmon"), *lab.agent_command("linked", broker.address, pin=True)), 2, "Permission denied", "--no-pin"
    )


def test_a_refused_start_leaves_no_folder(lab: Lab) -> None:
    need(capture_lack, partial(tools_lack, Lack.NAMESPACES, "unshare"))
    refused(lab.run(*NO_BTF, *lab.agent_command("refused", NOBODY_THERE, pin=True)), 2, "no BTF")
    assert not list(lab.pins.glob("refused@*"))


def test_unpin_tells_what_it_removed(lab: Lab) -> None:
    """Of both scopes, unless one is named."""
    need(capture_lack)
    broker = lab.broker()
    lab.kill(lab.agent("pinned", broker.address, scope="pidns", pin=True))
    (folder,) = lab.pins.glob("pinned@*")
    words = ("kmonitor-agent", "--node", "pinned", "--pin-root", lab.pins, "--unpin")
    nothing = "kmonitor-agent: there are no such pins: nothing to remove"
    assert lab.run(*words, "--scope", "host").stdout == nothing
    assert folder.exists()
    assert lab.run(*words).stdout == f"kmonitor-agent: removed {folder}"
    assert not folder.exists()
    assert lab.run(*words).stdout == nothing


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_start_that_is_cut_off(lab: Lab, tmp_path: Path, number: signal.Signals) -> None:
    """While bcc compiles: its folder of headers goes, and nothing is said."""
    need(capture_lack)
    command = lab.agent_command("cut", NOBODY_THERE, source="bcc", pin=True)
    agent = lab.command(*command, env={**os.environ, "TMPDIR": str(tmp_path)})
    until = time.monotonic() + 20
    while not list(tmp_path.glob("*/*")) and agent.process.poll() is None:  # a moment sooner it is made, and not yet anybody's
        assert time.monotonic() < until
        time.sleep(0.001)
    if agent.process.poll() is not None:
        pytest.skip("bcc is not installed")
    agent.send(number)
    agent.wait(20)
    agent.wait_closed()
    assert (agent.process.returncode, agent.stderr_text()) == (128 + number, "")
    assert not list(tmp_path.iterdir())
    assert not list(lab.pins.glob("cut@*"))


def test_ctrl_c_removes_pins_that_were_just_made(lab: Lab) -> None:
    """Between them and the event loop, which else takes the signal."""
    need(capture_lack)
    agent = lab.command(*lab.agent_command("just", NOBODY_THERE, pin=True))
    until = time.monotonic() + 20
    while not list(lab.pins.glob("just@*/link_*")):
        assert time.monotonic() < until
        time.sleep(0.001)
    agent.send(signal.SIGINT)
    agent.wait(20)
    agent.wait_closed()
    assert not list(lab.pins.glob("just@*"))
