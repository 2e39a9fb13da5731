# SPDX-License-Identifier: Apache-2.0
"""What an agent and a broker load, and when: it is most of the time that they take to start, and of their memory."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata

import pytest

from kmonitor.wire.version import installed_version
from tests.lab.requires import capture_lack, need

OPTIONS_OF_KMON = {"typer", "click", "rich", "pydantic"}
NETWORK = {"asyncio", "ssl", "grpc", "google.protobuf"}


def loaded(code: str) -> set[str]:
    """The modules of an interpreter that has run this."""
    words = [sys.executable, "-c", f"{code}\nimport json, sys\nprint(json.dumps([m for m, at in sys.modules.items() if at is not None]))"]
    done = subprocess.run(words, capture_output=True, check=True, text=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_agent_loads_the_probe_before_the_network() -> None:
    modules = loaded("import kmonitor.agent.cli, kmonitor.agent.sources.core\nkmonitor.agent.cli.parser()")
    assert not modules & (OPTIONS_OF_KMON | NETWORK | {"shutil", "importlib.resources", "importlib.metadata"})


def test_agent_runs_without_ssl() -> None:
    modules = loaded("import kmonitor.agent.cli as cli\ncli._import_service()")
    assert {"asyncio", "grpc"} <= modules
    assert not modules & (OPTIONS_OF_KMON | {"ssl", "_ssl", "importlib.metadata", "email"})


def test_broker() -> None:
    modules = loaded("import kmonitor.broker.cli\nkmonitor.broker.cli.parser()\nimport kmonitor.broker.server")
    assert not modules & OPTIONS_OF_KMON


LOADING = """
from kmonitor.agent.sources import core
from kmonitor.agent.probe import ProbeOptions
source = core.load(ProbeOptions(ring_bytes=1 << 16), None)
source.close()
"""


@pytest.mark.capture
def test_source_core_needs_no_protobuf() -> None:
    need(capture_lack)
    assert not loaded(LOADING) & NETWORK


def test_version() -> None:
    assert installed_version() == metadata.version("kmonitor")
