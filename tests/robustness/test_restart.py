# SPDX-License-Identifier: Apache-2.0
"""A small run of `python -m tests.robustness.restart`. What many do to a broker is there, and in `tests/broker/test_linger.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.robustness.restart import restart


@pytest.mark.timeout(150)
def test_fifty_agents_and_twenty_monitors(tmp_path: Path) -> None:
    done = restart(tmp_path, agents=50, monitors=20, each=20, down_s=0.5)
    print(f"\n{done.summary}")
    assert done.wrong == []
