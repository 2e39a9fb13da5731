# SPDX-License-Identifier: Apache-2.0
"""What a refusal must be: of a command one line and an exit status, of gRPC a status and a text. Never a traceback."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.lab.services import Done, Lab

GRPC_LIMIT = 20.0


def refused(done: Done, code: int, *words: str) -> None:
    """One line on stderr that has all `words`, and the exit status."""
    assert "Traceback" not in done.stderr, done
    assert done.code == code, done
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done
    for word in words:
        assert word in lines[0], done


def run_all(lab: Lab, commands: Iterable[Sequence[str | Path]]) -> list[Done]:
    """Run commands to their ends, a few at a time: most of each is the start of an interpreter."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda words: lab.run(*words), commands))


def status_of(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    """How a gRPC call ends that is to fail. A stream is read to its end."""
    with pytest.raises(grpc.RpcError) as caught:
        list(call())
    error = caught.value
    assert isinstance(error, grpc.Call)
    code, details = error.code(), error.details() or ""
    assert code is not None
    assert "Traceback" not in details
    assert len(details.splitlines()) == 1
    return code, details
