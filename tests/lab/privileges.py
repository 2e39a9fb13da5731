# SPDX-License-Identifier: Apache-2.0
"""Commands as another user, or with few capabilities: prefixes of setpriv(1)."""

from __future__ import annotations

import subprocess
from functools import cache, partial

from tests.lab.requires import Lack, need, tools_lack
from tests.lab.services import BIN

NOBODY = 65534
AS_NOBODY = ("setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups")


def as_nobody(*capabilities: str) -> list[str]:
    """As a service manager starts a service: an ordinary user with just these (such as "bpf"), which no program can exceed."""
    only = ",".join(["-all", *(f"+{name}" for name in capabilities)])
    return [*AS_NOBODY, "--no-new-privs", f"--bounding-set={only}", f"--inh-caps={only}", f"--ambient-caps={only}"]


def need_another_user() -> None:
    """Skip the running test where setpriv is missing, or every user may not read the checkout and the interpreter."""
    need(partial(tools_lack, Lack.SETPRIV, "setpriv"), _program_is_hidden)


@cache
def _program_is_hidden() -> Lack | None:
    seen = subprocess.run([*AS_NOBODY, BIN / "kmonitor-agent", "--help"], capture_output=True, check=False)
    return None if seen.returncode == 0 else Lack.READABLE
