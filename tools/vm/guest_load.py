# SPDX-License-Identifier: Apache-2.0
"""In a guest: have this kernel's verifier take every program of the probe, as each source loads it. Nothing is captured."""

from __future__ import annotations

import platform
import sys
import time

from kmonitor.agent.errors import BpfError
from kmonitor.agent.probe import ProbeOptions
from kmonitor.agent.sources import start
from kmonitor.wire.errors import KmonitorError


def main() -> int:
    """0 if all were taken. Arguments: names of sources; core and bcc if there are none."""
    status = 0
    for name in sys.argv[1:] or ("core", "bcc"):
        began = time.monotonic()
        try:
            start(name, ProbeOptions(ring_bytes=64 << 10), None).close()  # type: ignore[arg-type]
        except KmonitorError as error:
            status = 1
            print(f"{platform.release()}: {name}: {error}")
            if isinstance(error, BpfError):
                print("\n".join(error.log.splitlines()[-30:]))
        else:
            print(f"{platform.release()}: {name}: loaded in {time.monotonic() - began:.1f} s", flush=True)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
