# SPDX-License-Identifier: Apache-2.0
"""What becomes of Pacemaker's commands where there is no Pacemaker, or one that says nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from kmonitor.clients.ha.crm import Crm, CrmAwayError, CrmError


def program(folder: Path, name: str, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of that name, found first."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="ascii")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


async def test_it_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("kmonitor.clients.ha.crm._ELSEWHERE", str(tmp_path))
    with pytest.raises(CrmError, match="crm_node is not here: install"):
        await Crm().local_node()


async def test_it_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program(tmp_path, "crm_node", f"echo $$ > {tmp_path}/pid; exec sleep 100", monkeypatch)
    began = time.monotonic()
    with pytest.raises(CrmAwayError, match=r"crm_node did not answer in 1 s"):
        await Crm(limit=1).local_node()
    assert time.monotonic() - began < 20
    pid = (tmp_path / "pid").read_text(encoding="ascii").strip()
    assert not Path("/proc", pid).exists()  # noqa: ASYNC240


async def test_a_question_whose_answer_is_lost_is_asked_again_soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And on a machine that is slow it has more time the next time."""
    answer = "echo '<pacemaker-result><crmd state=\"S_IDLE\"/></pacemaker-result>'"
    program(tmp_path, "crmadmin", "exec sleep 100", monkeypatch)
    crm, began = Crm(), time.monotonic()
    with pytest.raises(CrmAwayError, match=r"crmadmin did not answer in 0.5 s"):
        await crm.controller_state("alpha")
    with pytest.raises(CrmAwayError, match=r"crmadmin did not answer in 1 s"):
        await crm.controller_state("alpha")
    assert time.monotonic() - began < 10
    program(tmp_path, "crmadmin", answer, monkeypatch)
    assert await crm.controller_state("alpha") == "S_IDLE"
    program(tmp_path, "crmadmin", "exec sleep 100", monkeypatch)
    with pytest.raises(CrmAwayError, match=r"crmadmin did not answer in 0.5 s"):
        await crm.controller_state("alpha")


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        (102, CrmAwayError, "crm_node: Not connected: Pacemaker does not answer on this node"),
        (105, CrmError, "crm_node: Not connected"),
    ],
)
async def test_it_fails(code: int, error: type[CrmError], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program(tmp_path, "crm_node", f"echo details >&2; echo 'crm_node: Not connected' >&2; exit {code}", monkeypatch)
    with pytest.raises(error) as raised:
        await Crm().local_node()
    assert type(raised.value) is error
    assert str(raised.value).startswith(said)


async def test_what_it_prints_is_no_xml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program(tmp_path, "crm_mon", "echo hello", monkeypatch)
    with pytest.raises(CrmError, match="crm_mon printed what is no XML"):
        await Crm().monitor("<cib/>")


async def test_much_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """More than a pipe holds."""
    program(tmp_path, "cibadmin", "head -c 3000000 /dev/zero | tr '\\0' x", monkeypatch)
    assert len(await Crm().cib()) == 3_000_000
