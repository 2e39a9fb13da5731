# SPDX-License-Identifier: Apache-2.0
"""All tests in here need real kernel events: .ci/run fails if one of them is skipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab import knowledge

HERE = Path(__file__).parent


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make each test that an agent takes part in for each source that knows what it is about."""
    if "source" in metafunc.fixturenames:
        about = {word for mark in metafunc.definition.iter_markers("knows") for word in mark.args}
        assert about <= knowledge.EVERYTHING, about
        names = [name for name in knowledge.SOURCES if about <= knowledge.of(name).knows]
        if metafunc.definition.get_closest_marker("one_source"):
            names = names[:1]
        metafunc.parametrize("source", names, scope="module")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.capture)
