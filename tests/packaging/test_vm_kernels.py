# SPDX-License-Identifier: Apache-2.0
"""Which packages `make vm-load` takes for a kernel's version."""

from __future__ import annotations

import pytest

from tools.vm.boot import packages_of

NAMES = [
    "linux-image-5.10.0-9-amd64",
    "linux-image-5.10.0-32-amd64",
    "linux-image-5.10.0-32-cloud-amd64",
    "linux-image-5.10.0-32-amd64-dbg",
    "linux-image-6.1.0-50-amd64",
    "linux-image-6.1.0-50-amd64-unsigned",
    "linux-headers-6.1.0-50-amd64",
    "linux-image-6.12.117+deb13-amd64",
    "linux-image-6.19.14+deb13-amd64",
    "linux-binary-7.3.4+deb13-amd64",
    "linux-image-7.3.4+deb13-amd64",
    "linux-modules-7.3.4+deb13-amd64",
    "linux-modules-7.3.4+deb13-rt-amd64",
]


@pytest.mark.parametrize(
    ("version", "packages"),
    [
        ("5.10", ["linux-image-5.10.0-32-amd64"]),
        ("6.1", ["linux-image-6.1.0-50-amd64"]),
        ("6.12", ["linux-image-6.12.117+deb13-amd64"]),
        ("7.3", [f"linux-{part}-7.3.4+deb13-amd64" for part in ("binary", "image", "modules")]),
        ("7.3.4", [f"linux-{part}-7.3.4+deb13-amd64" for part in ("binary", "image", "modules")]),
        ("5.1", []),
    ],
)
def test_the_newest_of_the_version_that_was_named(version: str, packages: list[str]) -> None:
    assert packages_of(version, NAMES) == packages
