# SPDX-License-Identifier: Apache-2.0
"""A short run of `make soak`."""

from __future__ import annotations

import re
import sys

import pytest

from tests.lab.namespaces import namespaces_lack
from tests.lab.requires import capture_lack, need
from tests.lab.services import Lab
from tests.robustness.listener import REPOSITORY

SEED = "20"
LIMIT = 110.0


@pytest.mark.timeout(120)
def test_for_a_while(lab: Lab) -> None:
    """The books balance."""
    need(capture_lack, namespaces_lack)
    soak = lab.command(sys.executable, "-m", "tests.robustness.soak", "--for", "12s", "--seed", SEED, cwd=REPOSITORY)
    code = soak.wait(LIMIT)
    soak.wait_closed()
    said = b"\n".join(soak.lines).decode()
    print(f"\n{said}")
    assert code == 0
    books = re.findall(r"monitor ([a-z ]+): generated (\d+), delivered (\d+), duplicated (\d+), in gaps (\d+)", said)
    assert {name for name, *_ in books} == {"of nodes", "following", "resuming", "slow"}
    for _, generated, delivered, duplicated, in_gaps in books:
        assert int(generated) == int(delivered) + int(in_gaps) > 0
        assert int(duplicated) == 0
