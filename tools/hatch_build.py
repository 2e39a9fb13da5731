# SPDX-License-Identifier: Apache-2.0
"""Build hook: the BPF object is compiled before a wheel, an sdist or an editable install is made, so that it always ships."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class BpfBuildHook(BuildHookInterface[Any]):
    """Runs tools/build_bpf.sh, which does nothing if the object is newer than its sources."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling; arguments are its own and are not needed."""
        del version, build_data
        script = Path(self.root, "tools", "build_bpf.sh")
        done = subprocess.run(["sh", str(script)], stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            # The script's last line says what is missing; a traceback of ours would bury it.
            self.app.abort(done.stderr.strip())
