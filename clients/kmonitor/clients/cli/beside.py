# SPDX-License-Identifier: Apache-2.0
"""Where the other programs of this installation are."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from kmonitor.wire.errors import UsageError


def program(name: str) -> str:
    """Path of an installed script: beside this one, beside the interpreter, on the PATH. Raises UsageError."""
    for folder in (Path(sys.argv[0]).resolve().parent, Path(sys.executable).parent):
        if os.access(folder / name, os.X_OK):
            return str(folder / name)
    found = shutil.which(name)
    if found is None:
        raise UsageError(f"{name} is not installed here, neither beside kmon nor on the PATH: install kmonitor's wheel as a whole")
    return found
